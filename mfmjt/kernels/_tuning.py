"""`mfmjt.kernels.triton.tuning` for op files that still hold their Triton kernels."""

from mfmjt.kernels._backends import AVAILABLE

if AVAILABLE:
    from mfmjt.kernels.triton.tuning import *  # noqa: F403
