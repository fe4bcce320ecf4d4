"""The operations of the network, each right in value, tangent and gradient, eager and compiled."""

from __future__ import annotations

from mfmjt.kernels import _flops, streams, vocoder
from mfmjt.kernels._accelerate import accelerate_jvp
from mfmjt.kernels._dual import differentiable_tangents
from mfmjt.kernels._jvp_rows import jvp_rows
from mfmjt.kernels._op import reference
from mfmjt.kernels._recompute import recompute
from mfmjt.kernels.adaln import adaln
from mfmjt.kernels.conv1d import conv1d
from mfmjt.kernels.gated_residual_adaln import gated_residual_adaln
from mfmjt.kernels.joint_attention import joint_attention
from mfmjt.kernels.linear import linear
from mfmjt.kernels.qk_norm_rope import qk_norm_rope
from mfmjt.kernels.snake import snake
from mfmjt.kernels.swiglu import swiglu
from mfmjt.kernels.swiglu_product import swiglu_product

__all__ = [
    "accelerate_jvp",
    "adaln",
    "conv1d",
    "differentiable_tangents",
    "gated_residual_adaln",
    "joint_attention",
    "jvp_rows",
    "linear",
    "qk_norm_rope",
    "recompute",
    "reference",
    "snake",
    "streams",
    "swiglu",
    "swiglu_product",
    "vocoder",
]

_flops.install()
