"""Weights that are read when they are needed and dropped after."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import chain

import torch
from torch import nn

from mfmjt.errors import RunError
from mfmjt.memory import return_memory

__all__ = ["OnDemand"]


class OnDemand:
    """The weights of a module, which is itself always there, with its sizes and tables.

    Args:
        module: Keeps its identity; without weights, its tensors are on the meta device.
        open_again: Makes the module again, from its files; None keeps the weights on the CPU.
    """

    def __init__(
        self, module: nn.Module, open_again: Callable[[], nn.Module] | None = None
    ) -> None:
        self._module, self._open_again = module, open_again
        self.drop()

    @torch.no_grad()
    def load(self) -> None:
        """Read the weights, where the module has none.

        Raises:
            MfmjtError: Their files have gone, or hold something else by now.
        """
        if self._open_again is None or not next(self._module.parameters()).is_meta:
            return
        with torch.inference_mode(False):  # whose tensors are of use inside of it alone
            fresh = self._open_again()
        held, found = (
            {name: value.shape for name, value in module.state_dict().items()}
            for module in (self._module, fresh)
        )
        if held != found:
            raise RunError(
                f"The files of the {type(fresh).__name__} were changed while they were used. Open "
                "the model again."
            )
        for module, other in zip(self._module.modules(), fresh.modules(), strict=True):
            for name, value in chain(
                other.named_parameters(recurse=False), other.named_buffers(recurse=False)
            ):
                setattr(module, name, value)
        del fresh, other
        gc.collect()  # `torch.load` leaves files mapped in cycles of references
        return_memory()

    def drop(self) -> None:
        """Free the weights on the device, and in memory where there are files of them."""
        kind = next(self._module.parameters()).device.type
        self._module.to("cpu" if self._open_again is None else "meta")
        if kind == "cuda":
            torch.cuda.empty_cache()
        elif kind == "cpu" and self._open_again is not None:
            gc.collect()
            return_memory()
