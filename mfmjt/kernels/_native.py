"""The C++ kernels for the CPU, where they were built: what they serve, and why not.

They are functions of the same arguments as the library ops, in a namespace of their own
(`torch.ops.mfmjt_cpu`). `kernel` puts one in front of an op's PyTorch formula; inputs that it does
not take (float64, no elements, modulations of other shapes) run the formula, float16 in copies.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["floats", "formulas", "in_use", "kernel", "native", "op", "status", "takes"]

_DTYPES = (torch.float32, torch.bfloat16)


def _load() -> tuple[Any, str]:
    """The extension module, or None and why."""
    try:
        return importlib.import_module("mfmjt._C"), ""
    except ModuleNotFoundError:
        return None, "not built: no C++ compiler when mfmjt was installed, or MFMJT_EXT=0"
    except ImportError as error:
        return None, f"built, but it cannot be loaded: {error}"


_module, _reason = _load()
in_use = _module is not None
_wide = _module is not None and _module.build_info()["cpu"] != "portable"


def status() -> dict[str, str]:
    """What the extension is and does, for reports.

    Returns:
        `{"missing": why}`, or `compiler`, `cpu` (best instruction set of this CPU: `portable`,
        `avx2` or `avx512`), `used` (the one in use) and `ops` (library ops it serves).
    """
    if _module is None:
        return {"missing": _reason}
    return {**_module.build_info(), "ops": " ".join(sorted(_TAKES))}


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
    return (
        first.dtype in _DTYPES
        and first.numel() > 0
        and all(t is None or t.dtype in _DTYPES for t in others)
    )


def native(name: str) -> Callable[..., Any] | None:
    """The C++ kernel of the library op `mfmjt::<name>`, or None where there is none.

    Raises:
        ImportError: The extension was built from other sources.
    """
    if _module is None or name not in _TAKES:
        return None
    try:
        return getattr(torch.ops.mfmjt_cpu, name).default
    except AttributeError as error:
        raise ImportError(
            f"mfmjt._C has no kernel {name}: it was built from older sources than these. "
            "Install mfmjt again, for example with: pip install ."
        ) from error


def kernel(name: str, formula: Callable[..., Any]) -> Callable[..., Any] | None:
    """What the library op `mfmjt::<name>` runs on a CPU, or None where that is the formula alone.

    Args:
        name: Name of the library op.
        formula: Its PyTorch implementation, for inputs that the C++ kernel does not take.

    Raises:
        ImportError: The extension was built from other sources.
    """
    in_cpp = native(name)
    if in_cpp is None:
        return None

    def choose(*args: Any) -> Any:
        return in_cpp(*args) if takes(name, *args) else formula(*args)

    return choose


def takes(name: str, *args: Any) -> bool:
    """Whether the library op `mfmjt::<name>` would run these arguments, on a CPU, in C++."""
    return in_use and _TAKES[name](*args)


def _alike(first: Tensor, *others: Tensor | None) -> bool:
    """One shape and one dtype, and elements."""
    return (
        first.dtype in _DTYPES
        and first.numel() > 0
        and all(t is None or (t.dtype == first.dtype and t.shape == first.shape) for t in others)
    )


def _modulated(x: Tensor, *others: Tensor | None, dots: tuple[Tensor | None, ...] = ()) -> bool:
    """X (B, N, C) and what has a row for each token or for each sample; like them their tangents.

    A single channel is left to PyTorch: its normalised value is zero up to rounding, of which the
    formula has none.
    """
    if x.ndim != 3 or x.dtype not in _DTYPES or x.numel() == 0 or x.shape[2] == 1:
        return False
    batch, tokens, width = x.shape
    shapes = ((batch, tokens, width), (batch, 1, width))
    if not all(t is None or (t.dtype == x.dtype and t.shape in shapes) for t in others):
        return False
    pairs = zip(dots, (x, *others), strict=True) if dots else ()
    return all(
        d is None or (t is not None and d.dtype == t.dtype and d.shape == t.shape) for d, t in pairs
    )


def _heads(qkv: Tensor, *others: Tensor | None) -> bool:
    """Qkv (B, N, 3, H, D) with pairs to rotate, and what is small or checked by the front door."""
    return (
        qkv.dtype in _DTYPES
        and qkv.numel() > 0
        and qkv.shape[4] % 2 == 0
        and all(t is None or t.dtype in _DTYPES for t in others)
    )


def _scores(s: Tensor, other: Tensor | None) -> bool:
    """Scores (G, R, M) on the CPU: these are no library ops, and formulas call them anywhere."""
    return s.device.type == "cpu" and _alike(s, other)


def _pairs(q: Tensor, *_: Any) -> bool:
    """Queries (B, N, H, D) in bfloat16, on a CPU that multiplies pairs of it."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and q.numel() > 0
        and q.shape[3] % 2 == 0
        and bool(torch.cpu._is_avx512_bf16_supported())
        and _module.build_info()["used"] == "avx512"
    )


# For every op with a C++ kernel, whether that takes these arguments.
_TAKES: dict[str, Callable[..., bool]] = {
    "adaln_fwd": lambda x, shift, scale, eps: _modulated(x, shift, scale),
    "adaln_jvp": lambda x, shift, scale, *others: _modulated(x, shift, scale, dots=others[:-1]),
    "adaln_bwd": lambda y_bar, x, shift, scale, mean, rstd: _modulated(x, y_bar, shift, scale),
    "conv1d_toom": lambda *_: True,  # `cpu/conv1d.py` knows
    "gated_residual_adaln_fwd": lambda x, *others: _modulated(x, *others[:-1]),
    "gated_residual_adaln_jvp": lambda x, *others: _modulated(x, *others[:4], dots=others[4:-1]),
    "gated_residual_adaln_bwd": lambda total_bar, y_bar, total, *others: _modulated(
        total, total_bar, y_bar, *others[:-2]
    ),
    "joint_attention_rows": _pairs,
    "joint_attention_rows_bar": lambda o_bar, q, *others: _pairs(q),
    "joint_attention_softmax": lambda s, s_dot, bias, scale: _scores(s, s_dot),
    "joint_attention_softmax_bar": lambda s, p_bar, bias, lse, scale: _scores(s, p_bar),
    "qk_norm_rope_fwd": lambda qkv, q_weight, k_weight, rope, eps: _heads(
        qkv, q_weight, k_weight, rope
    ),
    "qk_norm_rope_jvp": lambda qkv, qkv_dot, *others: (
        _alike(qkv, qkv_dot) and _heads(qkv, *others[:-1])
    ),
    "qk_norm_rope_bwd": lambda q_bar, k_bar, v_bar, qkv, *others: (
        _heads(qkv, *others)
        and all(bar is None or bar.dtype == qkv.dtype for bar in (q_bar, k_bar, v_bar))
    ),
    "snake_fwd": lambda x, alpha, beta: (
        _alike(x) and alpha.dtype in _DTYPES and beta.dtype in _DTYPES
    ),
    "swiglu_fwd": _alike,
    "swiglu_jvp": _alike,
    "swiglu_bwd": _alike,
}
