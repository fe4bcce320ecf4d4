"""Blocks whose inside is computed again for the backward pass, at the set of a flag."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from mfmjt.kernels import recompute

__all__ = ["recomputable"]


def recomputable(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the `forward` of a module that has a flag `recompute` and draws nothing at random.

    While the flag is set, the call is one of `mfmjt.kernels.recompute`. It is the inside of the
    module that is wrapped, so that hooks of FSDP, which fetch its weights, run before the first
    computation and before the second.
    """

    @functools.wraps(forward)
    def wrapped(self: nn.Module, *args: Any) -> Any:
        if not self.recompute:
            return forward(self, *args)
        method = forward.__get__(self)  # of this module, whose parameters get gradients
        return recompute(method, *args, preserve_rng_state=False)

    return wrapped
