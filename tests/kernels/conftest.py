from __future__ import annotations

from mfmjt.kernels import _triton

# Triton's interpreter takes the place of the C++ kernels, whose own tests then judge nothing.
collect_ignore = ["test_ext.py"] if _triton.INTERPRETED else []
