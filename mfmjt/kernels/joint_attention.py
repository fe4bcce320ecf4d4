"""Softmax attention over the concatenation of several token streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

__all__ = ["joint_attention", "joint_attention_ref"]

Streams = Tensor | Sequence[Tensor]
Lengths = Tensor | Sequence[Tensor | None] | None


def _tuple(streams: Streams) -> tuple[Tensor, ...]:
    return (streams,) if isinstance(streams, Tensor) else tuple(streams)


def _key_mask(keys: tuple[Tensor, ...], lengths: Lengths) -> Tensor | None:
    """True where a key counts, (B, sum of N); None where every key does."""
    given = (lengths,) if lengths is None or isinstance(lengths, Tensor) else tuple(lengths)
    if all(length is None for length in given):
        return None
    rows = []
    for key, length in zip(keys, given, strict=True):
        position = torch.arange(key.shape[1], device=key.device)
        limit = key.shape[1] if length is None else length.to(key.device)[:, None]
        rows.append((position < limit).expand(key.shape[0], -1))
    return torch.cat(rows, dim=1)


@overload
def joint_attention_ref(
    q: Tensor, k: Streams, v: Streams, scale: float | None = None, lengths: Lengths = None
) -> Tensor: ...
@overload
def joint_attention_ref(
    q: Sequence[Tensor], k: Streams, v: Streams, scale: float | None = None, lengths: Lengths = None
) -> tuple[Tensor, ...]: ...
def joint_attention_ref(
    q: Streams, k: Streams, v: Streams, scale: float | None = None, lengths: Lengths = None
) -> Tensor | tuple[Tensor, ...]:
    """Plain PyTorch `joint_attention`; the definition of correct."""
    queries, keys, values = _tuple(q), _tuple(k), _tuple(v)
    mask = _key_mask(keys, lengths)
    all_q, all_k, all_v = (torch.cat(s, dim=1) for s in (queries, keys, values))
    if mask is not None:
        # Padding may hold anything: zeroed here, so that 0 * NaN cannot reach the result.
        all_k = torch.where(mask[:, :, None, None], all_k, 0)
        all_v = torch.where(mask[:, :, None, None], all_v, 0)
    scale = all_q.shape[-1] ** -0.5 if scale is None else scale
    work = torch.promote_types(all_q.dtype, torch.float32)
    scores = torch.einsum("bnhd,bmhd->bhnm", all_q * scale, all_k).to(work)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], torch.finfo(work).min)
    probability = scores.softmax(-1)
    if mask is not None:  # a sample without any valid key attends to nothing: zero
        probability = torch.where(mask[:, None, None], probability, 0)
    out = torch.einsum("bhnm,bmhd->bnhd", probability.to(all_v.dtype), all_v).to(all_q.dtype)
    if isinstance(q, Tensor):
        return out
    return out.split([query.shape[1] for query in queries], dim=1)


joint_attention = joint_attention_ref
