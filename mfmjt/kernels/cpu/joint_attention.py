"""`joint_attention` on a CPU: who computes it, and what is not the formula.

rows     One C++ pass over six rows of queries at a time, matmuls included, where the CPU
         multiplies pairs of bfloat16 (AVX-512 BF16). S and S_dot stay float32 in the
         first-level cache; only P, W and S_bar are rounded.
blocks   The formula: PyTorch's matmuls on blocks of heads and of query rows. All that has a mask,
         causal order, grouped queries or values of a width of their own.
flash    PyTorch's flash kernels for value and gradient, the formula for a tangent. A value
         without a tangent has their own backward: a library op owes copies of results, which
         made it 3 to 9 % slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels import _native
from mfmjt.kernels._attention import (
    additive,
    joined,
    multiplies_bfloat16,
    parted,
    tangents,
    valid_keys,
    without_padding,
)
from mfmjt.kernels._op import work_dtype

__all__ = ["bwd", "flash", "fwd", "jvp", "route"]

_rows = _native.op("joint_attention_rows")
_rows_bar = _native.op("joint_attention_rows_bar")
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_bar = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def route(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    mask: Tensor | None,
    causal: bool,
) -> str:
    """Return "rows", "blocks" or "flash" for streams (B, N, H, D) on this CPU."""
    if mask is not None or causal or q[0].shape[2:] != k[0].shape[2:] or k[0].shape != v[0].shape:
        return "blocks"
    if (
        q[0].dtype == torch.bfloat16
        and torch.cpu._is_avx512_bf16_supported()
        and _native.in_use
        and _native.status()["used"] == "avx512"
        and q[0].numel() > 0
        and q[0].shape[3] % 2 == 0
    ):
        return "rows"
    return "blocks" if multiplies_bfloat16(q[0]) else "flash"


def fwd(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    mask: Tensor | None,
    lengths: list[Tensor | None],
    causal: bool,
    scale: float,
) -> Any:
    """Compute o and lse by rows or by flash."""
    by = route(q, k, v, mask, causal)
    if by == "blocks":
        return NotImplemented
    if by == "flash":
        o, lse = _by_flash(q, k, v, lengths, scale)
        return parted(o, q), lse.contiguous()
    fixed: list[Tensor | None] = [None] * len(k)
    o, _, lse = _by_rows(q, k, v, [None] * len(q), fixed, fixed, lengths, scale)
    return parted(o, q), lse


def jvp(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    q_dot: list[Tensor | None],
    k_dot: list[Tensor | None],
    v_dot: list[Tensor | None],
    mask: Tensor | None,
    lengths: list[Tensor | None],
    causal: bool,
    scale: float,
) -> Any:
    """Compute o, o_dot and lse by rows."""
    if route(q, k, v, mask, causal) != "rows":
        return NotImplemented
    o, o_dot, lse = _by_rows(q, k, v, q_dot, k_dot, v_dot, lengths, scale)
    o_dot = o_dot if o_dot.shape == o.shape else torch.zeros_like(o)  # nothing moves
    return parted(o, q), parted(o_dot, q), lse


def _by_rows(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    q_dot: list[Tensor | None],
    k_dot: list[Tensor | None],
    v_dot: list[Tensor | None],
    lengths: list[Tensor | None],
    scale: float,
) -> Any:
    valid = valid_keys(k, lengths)
    streams = ((q, None), (k, valid), (v, valid))
    values = [joined(x, padding) for x, padding in streams]
    dots = [
        joined(tangents(x, dot), padding)
        for (x, padding), dot in zip(streams, (q_dot, k_dot, v_dot), strict=True)
    ]
    assert _rows is not None
    return _rows(*values, *dots, additive(valid, torch.float32), scale)


def bwd(
    o_bar: list[Tensor],
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    o: list[Tensor],
    lse: Tensor,
    mask: Tensor | None,
    lengths: list[Tensor | None],
    causal: bool,
    scale: float,
    needs: list[bool],
) -> Any:
    """Compute q_bar, k_bar, v_bar and an empty mask_bar by rows or by flash."""
    by = route(q, k, v, mask, causal)
    if by == "blocks":
        return NotImplemented
    valid = valid_keys(k, lengths)
    operands = joined(o_bar), joined(q), joined(k, valid), joined(v, valid)
    if by == "rows":
        assert _rows_bar is not None
        q_bar, k_bar, v_bar = _rows_bar(*operands, lse, additive(valid, torch.float32), scale)
    else:
        heads_first = [x.transpose(1, 2) for x in (*operands, joined(o))]
        bars = _flash_bar(
            *heads_first, lse, 0.0, False, attn_mask=_mask(valid, lse.dtype), scale=scale
        )
        q_bar, k_bar, v_bar = (bar.transpose(1, 2) for bar in bars)
    k_bar, v_bar = without_padding(k_bar, valid), without_padding(v_bar, valid)
    return parted(q_bar, q), parted(k_bar, k), parted(v_bar, v), q[0].new_empty(0)


def flash(
    q: list[Tensor], k: list[Tensor], v: list[Tensor], lengths: list[Tensor | None], scale: float
) -> list[Tensor]:
    """Compute o by PyTorch's flash attention for CPUs, with its own gradient."""
    o, _ = _by_flash(q, k, v, lengths, scale)
    return list(o.split([x.shape[1] for x in q], dim=1))


def _by_flash(
    q: list[Tensor], k: list[Tensor], v: list[Tensor], lengths: list[Tensor | None], scale: float
) -> tuple[Tensor, Tensor]:
    valid = valid_keys(k, lengths)
    operands = joined(q), joined(k, valid), joined(v, valid)
    heads_first = [x.transpose(1, 2) for x in operands]
    o, lse = _flash(*heads_first, attn_mask=_mask(valid, work_dtype(q[0])), scale=scale)
    return o.transpose(1, 2), lse


def _mask(valid: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    bias = additive(valid, dtype)
    return None if bias is None else bias[:, None, None]
