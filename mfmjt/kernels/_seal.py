"""A tangent without a tape: an op that hands a tangent on and refuses its gradient.

The tangents of the ops in this package are results of library ops whose backward refuses their
gradient. What `accelerate_jvp` computes by PyTorch's own functions is sealed here instead: `seal`
gives the same memory, attached to the value's tape by a node that keeps no tensor and raises when
a gradient other than zero arrives. No `autograd.Function` does this by itself: applied under
`torch.func.jvp` it would lose the node, since that level has no tape; a library op reaches the
level that has one. `torch.compile` traces through it and leaves nothing of it in the forward graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels import _op

__all__ = ["seal"]


class _Sealed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, y_dot: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return y_dot.detach()

    @staticmethod
    def backward(ctx: Any, y_dot_bar: Tensor | None) -> tuple[Tensor | None, None]:
        return _op.refuse_gradient(None, y_dot_bar), None


def _alias(y: Tensor, y_dot: Tensor) -> Tensor:
    return y_dot.detach()


def _with_tape(keyset: Any, y: Tensor, y_dot: Tensor) -> Tensor:
    if torch._C._are_functorch_transforms_active():  # on to the level below
        with torch._C._AutoDispatchBelowAutograd():
            return _seal_op.redispatch(keyset & torch._C._after_autograd_keyset, y, y_dot)
    if torch.is_grad_enabled() and y.requires_grad:
        return _Sealed.apply(y, y_dot)
    return _alias(y, y_dot)


_library = torch.library.Library("mfmjt", "FRAGMENT")
_library.define("seal(Tensor y, Tensor(a) y_dot) -> Tensor(a)", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("seal", _alias, "CompositeExplicitAutograd")
_library.impl("seal", _with_tape, "Autograd", with_keyset=True)
_seal_op = torch.ops.mfmjt.seal.default


def seal(y: Tensor, y_dot: Tensor) -> Tensor:
    """The tangent y_dot of y, whose gradient is refused; both of one shape."""
    return _seal_op(y, y_dot) if torch.is_grad_enabled() else y_dot
