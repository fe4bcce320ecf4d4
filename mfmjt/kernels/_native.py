"""The C++ kernels for the CPU, where they were built: what they serve, and why not.

They have the arguments of the library ops, in a namespace of their own (`torch.ops.mfmjt_cpu`). An
op finds them by name; what its `takes` declines (float64, no elements, modulations of other shapes)
runs the formula. float16 comes in float32 copies (`precision`).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "floats", "formulas", "in_use", "op", "status"]

DTYPES = (torch.float32, torch.bfloat16)


def _load() -> tuple[Any, str]:
    """Return the extension module, or None and why."""
    try:
        return importlib.import_module("mfmjt._C"), ""
    except ModuleNotFoundError:
        return None, "not built: no C++ compiler when mfmjt was installed, or MFMJT_EXT=0"
    except ImportError as error:
        return None, f"built, but it cannot be loaded: {error}"


_module, _reason = _load()
in_use = _module is not None


def status() -> dict[str, str]:
    """Return what the extension is and does, for reports.

    Returns:
        `{"missing": why}`, or `compiler`, `cpu` (best instruction set of this CPU: `portable`,
        `avx2` or `avx512`), `used` (the one in use) and `ops` (library ops it serves).
    """
    if _module is None:
        return {"missing": _reason}
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    ops = sorted(name for namespace, name in names if namespace == "mfmjt_cpu")
    return {**_module.build_info(), "ops": " ".join(ops)}


@contextlib.contextmanager
def formulas() -> Iterator[None]:
    """Let library ops run their PyTorch formulas inside the block, as without the extension."""
    global in_use
    before, in_use = in_use, False
    try:
        yield
    finally:
        in_use = before


def op(name: str, required: bool = False) -> Callable[..., Any] | None:
    """Return the C++ kernel `mfmjt_cpu::<name>`, or None where the extension or it is not built.

    Raises:
        ImportError: It is required, and the extension was built from other sources.
    """
    if _module is None:
        return None
    try:
        return getattr(torch.ops.mfmjt_cpu, name).default
    except AttributeError as error:
        if not required:
            return None
        raise ImportError(
            f"mfmjt._C has no kernel {name}: it was built from older sources than these. "
            "Install mfmjt again, for example with: pip install ."
        ) from error


def floats(first: Tensor, *others: Tensor | None) -> bool:
    """Return True for tensors of float32 and bfloat16 of which the first has elements."""
    for t in others:
        if t is not None and t.dtype not in DTYPES:
            return False
    return first.dtype in DTYPES and first.numel() > 0
