"""Inference over several streams at once: one launch where a network would need one per stream.

    project              y = act(x W^T + b), or silu(x W1^T) (x W3^T); W of a layer or a convolution
    project_qkv          q, k, v of a projection; q and k RMS-normalised per head and rotated
    gated_residual_norm  x' = x + gate h,  y = LN(x') (1 + scale) + shift

and, once a step, what PyTorch does: pool, silu_conditions, guide.

The streams of a joint block (latent, video, text) have weights and lengths of their own, and at
batch 1 their sub-layers are so short that launching them takes longer than running them. Here a
launch has programs of all streams. Nothing is kept for a gradient and no tangent is propagated:
what asks for either is refused.

A convolution is a product too: the K tokens around a token, (K C) numbers that lie one after the
other in memory, times a weight that is packed as (O, K C). Zeros stand for what a window has
beyond the ends of its sample. Stored in the dtype of x, summed in float32 (float64 for float64).
On the CPU the same windows are copied out and multiplied by oneDNN; next to its convolution, which
reads the same packed weight, this takes 0.74 to 1.00 times as long in bfloat16 for the network's
layers and 0.91 to 1.13 in float32 (one thread of a Zen 4 server, B = 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _op, _streams, _triton, precision
from mfmjt.kernels.cpu import winograd

__all__ = [
    "ACTIVATIONS",
    "Packed",
    "gated_residual_norm",
    "guide",
    "pack",
    "pool",
    "project",
    "project_qkv",
    "silu_conditions",
]

ACTIVATIONS = ("none", "silu", "selu")
"""What `project` may apply."""
_ROWS = 512  # for which a weight is arranged: tokens of a guided step
GUIDANCE = ("none", "cfg", "cfg_scaled")
_GUIDANCE_EPS = 1e-8  # as mfmjt.meanflow.guide

T = TypeVar("T")


class Packed(NamedTuple):
    """A weight as `project` reads it.

    Attributes:
        data: (O, K, C), or (2 O, K, C) for a gated unit, first those that go through silu.
        glu: Whether it is a gated unit.
        blocked: The same once more as a CPU multiplies it fastest: opaque to all but oneDNN, or
            (4, O, C) of `cpu.winograd`; None elsewhere.
    """

    data: Tensor
    glu: bool = False
    blocked: Tensor | None = None

    @property
    def out(self) -> int:
        """Channels of the result."""
        return self.data.shape[0] // (2 if self.glu else 1)


def pack(weight: Tensor, *more: Tensor) -> Packed:
    """Arrange a weight for `project`; once, when a network is loaded.

    Args:
        weight: `(O, C)` of a linear layer or `(O, C, K)` of a convolution with K odd.
        *more: For a gated unit, one more of the same shape: then `weight` goes through silu.

    Raises:
        ValueError: The shapes do not fit.
    """
    weights = (weight, *more)
    fits = weight.ndim in (2, 3) and weight.is_floating_point() and len(weights) <= 2
    fits = fits and all(w.shape == weight.shape and w.dtype == weight.dtype for w in weights)
    fits = fits and (weight.ndim == 2 or weight.shape[2] % 2 == 1)
    needs = "one weight, or two alike, (O, C) or (O, C, K) with K odd"
    _op.check(fits, "streams.pack", needs, **{f"weight {i}": w for i, w in enumerate(weights)})
    data = torch.cat([w.detach() for w in weights])
    data = (data[:, None] if data.ndim == 2 else data.transpose(1, 2)).contiguous()
    return Packed(data, bool(more), _blocked(data))


def _blocked(data: Tensor) -> Tensor | None:
    """Return the weight as this CPU multiplies it fastest; None if that is as it lies.

    With AVX-512, oneDNN's own layout, what `torch.compile` calls freezing: matmuls are 1.2 to 1.7
    times as fast in float32 as those of F.linear. With AVX2 they are slower, and a convolution of
    three taps is Winograd's.
    """
    plain = type(data) is Tensor and data.is_cpu and data.numel() > 0
    if not plain or _triton.ON_CPU or _watched():
        return None
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        fits = data.shape[1] == 3 and data.dtype == torch.float32
        return winograd.transform(data) if fits else None
    if data.dtype not in {torch.float32, torch.bfloat16} - precision.SLOW:
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight(data.flatten(1), _ROWS)
    except (AttributeError, RuntimeError):  # not this build of PyTorch's
        return None


def _watched() -> bool:
    """Whether somebody traces or counts what is called, and must see our ops."""
    return torch.compiler.is_compiling() or _op.is_watched()


# --- References


def project_ref(
    xs: Sequence[Tensor],
    weights: Sequence[Packed],
    biases: Sequence[Tensor | None],
    acts: Sequence[str],
) -> list[Tensor]:
    """Plain PyTorch `project`; the definition of correct."""
    results = []
    for x, (data, glu, _), bias, act in zip(xs, weights, biases, acts, strict=True):
        y = x.new_empty(x.shape[0], 0, data.shape[0])
        if x.shape[1]:  # PyTorch convolves no sequence without tokens
            filters, padding = data.transpose(1, 2), data.shape[1] // 2
            y = F.conv1d(x.transpose(1, 2), filters, padding=padding).transpose(1, 2)
        y = y if bias is None else y + bias.to(y.dtype)
        if glu:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        results.append(F.silu(y) if act == "silu" else F.selu(y) if act == "selu" else y)
    return results


def _rotated(x: Tensor, rope: Tensor) -> Tensor:
    cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]  # (N, 1, D/2)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def project_qkv_ref(
    xs: Sequence[Tensor],
    weights: Sequence[Packed],
    biases: Sequence[Tensor | None],
    q_norms: Sequence[Tensor],
    k_norms: Sequence[Tensor],
    ropes: Sequence[Tensor | None],
    num_heads: int,
    eps: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Plain PyTorch `project_qkv`; the definition of correct."""
    results = []
    projected = project_ref(xs, weights, biases, ["none"] * len(xs))
    for y, q_norm, k_norm, rope in zip(projected, q_norms, k_norms, ropes, strict=True):
        work = _op.work_dtype(y)
        *qk, v = y.unflatten(-1, (3, num_heads, -1)).unbind(2)
        for i, norm in enumerate((q_norm, k_norm)):
            x = qk[i].to(work)
            x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * norm.to(work)
            qk[i] = (x if rope is None else _rotated(x, rope.to(work))).to(y.dtype)
        results.append((*qk, v))
    qs, ks, vs = zip(*results, strict=True)
    return list(qs), list(ks), list(vs)


def gated_residual_norm_ref(
    xs: Sequence[Tensor],
    hs: Sequence[Tensor] | None,
    gates: Sequence[Tensor] | None,
    shifts: Sequence[Tensor],
    scales: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    eps: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Plain PyTorch `gated_residual_norm`; the definition of correct."""
    totals, results = [], []
    for i, (x, row) in enumerate(zip(xs, rows, strict=True)):
        if hs is not None and gates is not None:
            x = x + _of_tokens(gates[i], row) * hs[i]
        n = F.layer_norm(x, x.shape[-1:], eps=eps)
        totals.append(x)
        results.append(n * (1 + _of_tokens(scales[i], row)) + _of_tokens(shifts[i], row))
    return totals, results


# --- Formulas: what runs where there is no Triton


def _of_tokens(m: Tensor, row: Tensor | None) -> Tensor:
    """The modulation of every token; a single row serves all of them."""
    return m if row is None or m.shape[1] == 1 else m.index_select(1, row)


def _windows(x: Tensor, taps: int) -> Tensor:
    """(B, N, C) as (B, N, K C): the tokens around every token, zeros beyond the ends."""
    if taps == 1:
        return x
    batch, tokens, channels = x.shape
    padded = F.pad(x, (0, 0, taps // 2, taps // 2))
    sample, token, channel = padded.stride()
    size, stride = (batch, tokens, taps, channels), (sample, token, token, channel)
    return padded.as_strided(size, stride).reshape(batch, tokens, taps * channels)


def _product(x: Tensor, weight: Tensor | Packed, bias: Tensor | None) -> Tensor:
    data, blocked = (weight.data, weight.blocked) if isinstance(weight, Packed) else (weight, None)
    if precision.is_slow(x):
        return precision.in_float32(_product, (x, data, bias), 1)
    flat = bias if bias is not None and bias.ndim == 1 and bias.dtype == x.dtype else None
    if blocked is not None and not blocked.is_mkldnn and x.numel():
        y = winograd.convolve(x, blocked)
        return y if bias is None else y.add_(bias)
    # Rows of all samples in one matrix: matmul makes a product of each, and copies the weight.
    rows = _windows(x, data.shape[1]).flatten(0, 1)
    if blocked is None or rows.shape[0] == 0:
        y = F.linear(rows, data.flatten(1), flat)
    else:
        y = torch.ops.mkldnn._linear_pointwise(rows, blocked, flat, "none", [], "")
    y = y.unflatten(0, x.shape[:2])
    return y if bias is None or flat is not None else y.add_(bias)


def _project(
    xs: list[Tensor],
    weights: Sequence[Tensor | Packed],
    biases: list[Tensor | None],
    acts: list[int],
    glu: bool,
) -> list[Tensor]:
    results = []
    for x, weight, bias, act in zip(xs, weights, biases, acts, strict=True):
        y = _product(x, weight, bias)
        if glu:
            y = torch.ops.mfmjt.swiglu_fwd(*y.chunk(2, dim=-1))
        elif act:
            y = (F.silu if ACTIVATIONS[act] == "silu" else F.selu)(y, inplace=True)
        results.append(y)
    return results


def _project_qkv(
    xs: list[Tensor],
    weights: Sequence[Tensor | Packed],
    biases: list[Tensor | None],
    q_norms: list[Tensor],
    k_norms: list[Tensor],
    ropes: list[Tensor | None],
    num_heads: int,
    eps: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    qs, ks, vs = [], [], []
    for x, weight, bias, *of_heads in zip(
        xs, weights, biases, q_norms, k_norms, ropes, strict=True
    ):
        qkv = _product(x, weight, bias)
        qkv = qkv.view(*qkv.shape[:2], 3, num_heads, qkv.shape[2] // (3 * num_heads))
        q, k, v, *_ = torch.ops.mfmjt.qk_norm_rope_fwd(qkv, *of_heads, eps)
        qs.append(q)
        ks.append(k)
        vs.append(v)
    return qs, ks, vs


def _gated_residual_norm(
    xs: list[Tensor],
    hs: list[Tensor],
    gates: list[Tensor],
    shifts: list[Tensor],
    scales: list[Tensor],
    rows: list[Tensor | None],
    eps: float,
) -> tuple[list[Tensor], list[Tensor]]:
    totals, results = [], []
    for i, (x, row) in enumerate(zip(xs, rows, strict=True)):
        shift, scale = (_spread(m[i], row, x) for m in (shifts, scales))
        if hs:
            gate = _spread(gates[i], row, x)
            total, y, *_ = torch.ops.mfmjt.gated_residual_adaln_fwd(
                x, hs[i], gate, shift, scale, eps
            )
            totals.append(total)
        else:
            y, *_ = torch.ops.mfmjt.adaln_fwd(x, shift, scale, eps)
        results.append(y)
    return totals, results


def _spread(m: Tensor, row: Tensor | None, x: Tensor) -> Tensor:
    """The modulation of every token, or one for all, of every sample."""
    return _of_tokens(m, row).expand(x.shape[0], -1, -1)


# --- Fakes: shapes of the results


def _project_fake(
    xs: list[Tensor], weights: list[Tensor], biases: Any, acts: Any, glu: bool
) -> list[Tensor]:
    return [
        x.new_empty(*x.shape[:2], w.shape[0] // (2 if glu else 1))
        for x, w in zip(xs, weights, strict=True)
    ]


def _project_qkv_fake(
    xs: list[Tensor], weights: list[Tensor], *others: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    heads = others[-2]

    def part() -> list[Tensor]:
        return [
            x.new_empty(*x.shape[:2], heads, weight.shape[0] // (3 * heads))
            for x, weight in zip(xs, weights, strict=True)
        ]

    return part(), part(), part()


def _gated_residual_norm_fake(
    xs: list[Tensor], hs: list[Tensor], *_: Any
) -> tuple[list[Tensor], list[Tensor]]:
    return [h.new_empty(h.shape) for h in hs], [x.new_empty(x.shape) for x in xs]


# --- Where there is Triton


def _project_triton(
    xs: list[Tensor], weights: list[Tensor], biases: list[Tensor | None], acts: list[int], glu: bool
) -> list[Tensor]:
    if not _streams.takes(xs):
        return _project(xs, weights, biases, acts, glu)
    results = _project_fake(xs, weights, biases, acts, glu)
    _streams.project(results, xs, weights, biases, acts, glu)
    return results


def _project_qkv_triton(
    xs: list[Tensor], weights: list[Tensor], *others: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    if not _streams.takes(xs) or weights[0].shape[0] > 3 * others[-2] * _streams.MAX_HEAD:
        return _project_qkv(xs, weights, *others)
    results = _project_qkv_fake(xs, weights, *others)
    _streams.project_qkv(results, xs, weights, *others)
    return results


def _gated_residual_norm_triton(
    xs: list[Tensor], hs: list[Tensor], *others: Any
) -> tuple[list[Tensor], list[Tensor]]:
    if max(x.shape[2] for x in xs) > _streams.MAX_WIDTH:
        return _gated_residual_norm(xs, hs, *others)
    results = _gated_residual_norm_fake(xs, hs)
    _streams.gated_residual_norm(*results, xs, hs, *others)
    return results


# --- Library ops


_project_op = _op.define(
    "streams_project(Tensor[] xs, Tensor[] weights, Tensor?[] biases, int[] acts, bool glu) "
    "-> Tensor[]",
    _project,
    _project_fake,
    triton=_project_triton,
)
_project_qkv_op = _op.define(
    "streams_project_qkv(Tensor[] xs, Tensor[] weights, Tensor?[] biases, Tensor[] q_norms, "
    "Tensor[] k_norms, Tensor?[] ropes, SymInt num_heads, float eps) "
    "-> (Tensor[], Tensor[], Tensor[])",
    _project_qkv,
    _project_qkv_fake,
    triton=_project_qkv_triton,
)
_gated_residual_norm_op = _op.define(
    "streams_gated_residual_norm(Tensor[] xs, Tensor[] hs, Tensor[] gates, Tensor[] shifts, "
    "Tensor[] scales, Tensor?[] rows, float eps) -> (Tensor[], Tensor[])",
    _gated_residual_norm,
    _gated_residual_norm_fake,
    triton=_gated_residual_norm_triton,
)
# --- Front doors


def _inference_only(op: str, instead: str, *tensors: Tensor | None) -> None:
    """Raise if a gradient or a tangent is wanted of any of these.

    Raises:
        NotImplementedError: Names the ops to use instead.
    """
    wanted = [t for t in tensors if t is not None]
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in wanted)
    if gradient or any(_op.split(t)[1] is not None for t in wanted):
        raise NotImplementedError(
            f"mfmjt.kernels.streams.{op} is for inference and has no derivatives; an input "
            f"{'requires a gradient' if gradient else 'carries a tangent'}. Use "
            f"mfmjt.kernels.{instead} for each stream, or torch.no_grad() where no gradient is "
            "wanted."
        )


def _named(**groups: Sequence[Tensor | None] | None) -> dict[str, Tensor | None]:
    """Tensors of lists by their places, for messages."""
    return {f"{name}[{i}]": t for name, group in groups.items() for i, t in enumerate(group or ())}


def _each(given: Sequence[T] | None, count: int) -> list[T | None]:
    """One for each stream; None for none."""
    return [None] * count if given is None else list(given)


def _fits_product(x: Tensor, weight: Packed, bias: Tensor | None) -> bool:
    fits = x.ndim == 3 and weight.data.ndim == 3 and x.shape[2] == weight.data.shape[2]
    fits = fits and x.dtype == weight.data.dtype and x.is_floating_point()
    if bias is None:
        return fits
    fits = fits and not weight.glu and bias.is_floating_point() and 1 <= bias.ndim <= 2
    return fits and tuple(bias.shape) in ((weight.out,), (x.shape[1], weight.out))


def project(
    xs: Sequence[Tensor],
    weights: Sequence[Packed],
    biases: Sequence[Tensor | None] | None = None,
    act: str | Sequence[str] = "none",
) -> list[Tensor]:
    """A linear layer, convolution of same padding or gated unit of every stream, in one launch.

    Args:
        xs: `(B_i, N_i, C_i)` each; sizes may differ.
        weights: What `pack` made for each stream; all gated units, or none of them.
        biases: For each stream `(O_i,)`, `(N_i, O_i)` for a bias of every token, or None. A gated
            unit has none.
        act: One of `ACTIVATIONS`, or one for each stream; "none" for a gated unit.

    Returns:
        `(B_i, N_i, O_i)` each, in the dtype of x.

    Raises:
        ValueError: The shapes or dtypes do not fit, or there is no such activation.
        NotImplementedError: A gradient or a tangent is wanted.
    """
    count, xs, weights = len(xs), list(xs), list(weights)
    of_streams, acts = _each(biases, count), [act] * count if isinstance(act, str) else list(act)
    glu = any(weight.glu for weight in weights)
    fits = count == len(weights) == len(of_streams) == len(acts) and count > 0
    fits = fits and all(map(_fits_product, xs, weights, of_streams))
    fits = fits and all(weight.glu == glu for weight in weights)
    fits = fits and all(x.dtype == xs[0].dtype for x in xs)
    fits = fits and all(a in ACTIVATIONS[: 1 if glu else None] for a in acts)
    packed = [weight.data for weight in weights]
    if not fits:
        needs = (
            "for each stream x (B, N, C), a packed weight (O, K, C) of its dtype, a bias (O,) or "
            f"(N, O) or None, and an activation of {', '.join(ACTIVATIONS)}; gated units have "
            f"neither bias nor activation and come alone (got {', '.join(acts)}, "
            f"glu {', '.join(str(weight.glu) for weight in weights)})"
        )
        _op.check(False, "streams.project", needs, **_named(x=xs, weight=packed, bias=of_streams))
    if _op.use_reference():
        return project_ref(xs, weights, of_streams, acts)
    _inference_only("project", "linear or conv1d", *xs, *packed, *of_streams)
    numbers = [ACTIVATIONS.index(a) for a in acts]
    if any(weight.blocked is not None for weight in weights) and not _watched():
        return _project(xs, weights, of_streams, numbers, glu)
    results: list[Tensor] = _project_op(xs, packed, of_streams, numbers, glu)
    return results


def project_qkv(
    xs: Sequence[Tensor],
    weights: Sequence[Packed],
    biases: Sequence[Tensor | None] | None,
    q_norms: Sequence[Tensor],
    k_norms: Sequence[Tensor],
    ropes: Sequence[Tensor | None] | None,
    num_heads: int,
    eps: float = 2**-23,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Queries, keys and values of every stream in one launch; `linear`, then `qk_norm_rope`.

    Args:
        xs: `(B_i, N_i, C_i)` each.
        weights: What `pack` made of planar rows, (3, H, D), for each stream.
        biases: `(3 H D,)` or None for each stream.
        q_norms: `(D,)` each.
        k_norms: `(D,)` each.
        ropes: `(N_i, D/2, 2)` cosines and sines, or None for no rotation; D must be even.
        num_heads: H.
        eps: Added to the mean square.

    Returns:
        q, k and v of every stream, `(B_i, N_i, H, D)` each.

    Raises:
        ValueError: The shapes or dtypes do not fit.
        NotImplementedError: A gradient or a tangent is wanted.
    """
    count, xs, weights = len(xs), list(xs), list(weights)
    q_norms, k_norms = list(q_norms), list(k_norms)
    of_streams, angles = _each(biases, count), _each(ropes, count)
    lists = (weights, of_streams, q_norms, k_norms, angles)
    fits = count > 0 and all(len(given) == count for given in lists)
    if fits:
        for x, weight, bias, q_norm, k_norm, rope in zip(xs, *lists, strict=True):
            width, rest = divmod(weight.data.shape[0], 3 * num_heads)
            fits = fits and _fits_product(x, weight, bias) and rest == 0 and not weight.glu
            fits = fits and q_norm.shape == k_norm.shape == (width,) and x.dtype == xs[0].dtype
            fits = fits and width == weights[0].data.shape[0] // (3 * num_heads)
            if rope is not None:
                fits = fits and width % 2 == 0 and rope.shape == (x.shape[1], width // 2, 2)
    packed = [weight.data for weight in weights]
    if not fits:
        needs = (
            f"for each stream x (B, N, C), a packed weight (3 H D, K, C) of its dtype with H = "
            f"{num_heads}, a bias or None, norms (D,) and rope (N, D/2, 2) or None"
        )
        norms = _named(q_norm=q_norms, k_norm=k_norms, rope=angles)
        named = _named(x=xs, weight=packed, bias=of_streams) | norms
        _op.check(False, "streams.project_qkv", needs, **named)
    if _op.use_reference():
        return project_qkv_ref(xs, weights, of_streams, q_norms, k_norms, angles, num_heads, eps)
    everything = (*xs, *packed, *of_streams, *q_norms, *k_norms, *angles)
    _inference_only("project_qkv", "linear and qk_norm_rope", *everything)
    if any(weight.blocked is not None for weight in weights) and not _watched():
        return _project_qkv(xs, weights, of_streams, q_norms, k_norms, angles, num_heads, eps)
    results: tuple[list[Tensor], list[Tensor], list[Tensor]] = _project_qkv_op(
        xs, packed, of_streams, q_norms, k_norms, angles, num_heads, eps
    )
    return results


def _fits_norm(
    x: Tensor, h: Tensor | None, row: Tensor | None, modulations: Sequence[Tensor | None]
) -> bool:
    fits = x.ndim == 3 and (h is None or (h.shape == x.shape and h.dtype == x.dtype))
    fits = fits and x.is_floating_point()
    if row is not None:
        fits = fits and row.shape == x.shape[1:2] and row.dtype in (torch.int32, torch.int64)
    for m in modulations:
        if fits and m is not None:
            fits = m.ndim == 3 and m.shape[2] == x.shape[2] and m.dtype == x.dtype
            fits = fits and m.shape[0] in (1, x.shape[0])
            fits = fits and (row is not None or m.shape[1] in (1, x.shape[1]))
    return fits


def gated_residual_norm(
    xs: Sequence[Tensor],
    hs: Sequence[Tensor] | None,
    gates: Sequence[Tensor] | None,
    shifts: Sequence[Tensor],
    scales: Sequence[Tensor],
    rows: Sequence[Tensor | None] | None,
    eps: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gated residual add and adaptive layer norm of the sum, of every stream, in one launch.

    Args:
        xs: `(B_i, N_i, D_i)` each.
        hs: The same shapes; None where nothing is added, and then `gates` is None too.
        gates: `(B_i or 1, S_i, D_i)` each, any view whose channels are dense.
        shifts: Likewise.
        scales: Likewise.
        rows: For each stream `(N_i,)` int64 or int32, which of the S_i rows modulates a token, or
            None: then S_i is N_i. An S_i of 1 is a row that all tokens share in either case.
        eps: Added to the variance.

    Returns:
        The new residual streams x + gate h (`xs` themselves without `hs`) and their
        LN(.) (1 + scale) + shift.

    Raises:
        ValueError: The shapes or dtypes do not fit.
        NotImplementedError: A gradient or a tangent is wanted.
    """
    count, xs, shifts, scales = len(xs), list(xs), list(shifts), list(scales)
    added, gated, of_tokens = _each(hs, count), _each(gates, count), _each(rows, count)
    lists = (added, of_tokens, gated, shifts, scales)
    fits = count > 0 and all(len(given) == count for given in lists)
    fits = fits and (hs is None) == (gates is None) and all(x.dtype == xs[0].dtype for x in xs)
    fits = fits and all(
        _fits_norm(x, h, row, modulations)
        for x, h, row, *modulations in zip(xs, *lists, strict=True)
    )
    if not fits:
        needs = (
            "for each stream x and h (B, N, D), gate, shift and scale (B or 1, S, D) of its dtype, "
            "with rows (N,) of integers below S, or None for an S of N or 1; h and gate, or neither"
        )
        modulations = _named(gate=gated, shift=shifts, scale=scales, rows=of_tokens)
        named = _named(x=xs, h=added) | modulations
        _op.check(False, "streams.gated_residual_norm", needs, **named)
    if _op.use_reference():
        return gated_residual_norm_ref(xs, hs, gates, shifts, scales, of_tokens, eps)
    everything = (*xs, *added, *gated, *shifts, *scales)
    _inference_only("gated_residual_norm", "adaln or gated_residual_adaln", *everything)
    # Where nobody looks on, a library op around the formulas would only cost time.
    plain = all(x.is_cpu for x in xs) and not _triton.ON_CPU and not _watched()
    run = _gated_residual_norm if plain else _gated_residual_norm_op
    totals, results = run(xs, list(hs or ()), list(gates or ()), shifts, scales, of_tokens, eps)
    return totals or xs, results


def pool(xs: Sequence[Tensor]) -> Tensor:
    """Return the means over the tokens of every stream, side by side.

    A sum of linear layers of these means is one layer of the result, with the weights side by side.

    Args:
        xs: `(B, N_i, D_i)` each, N_i at least 1, of one dtype.

    Returns:
        `(B, 1, sum of D_i)`.

    Raises:
        ValueError: The shapes or dtypes do not fit.
    """
    fits = len(xs) > 0 and all(
        x.ndim == 3 and x.shape[1] > 0 and x.shape[0] == xs[0].shape[0] and x.is_floating_point()
        for x in xs
    )
    fits = fits and all(x.dtype == xs[0].dtype for x in xs)
    _op.check(fits, "streams.pool", "streams (B, N, D), N > 0, of one dtype", **_named(x=xs))
    means = [x.mean(1, keepdim=True, dtype=_op.work_dtype(x)).to(x.dtype) for x in xs]
    return torch.cat(means, dim=-1)


def silu_conditions(
    shared: Tensor, frames: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the conditions that modulate: silu(shared) and silu(shared + frames).

    Args:
        shared: `(B, 1, D)`, what all tokens of a sample share.
        frames: `(B or 1, S, D)`, of the same dtype.
        rows: `(N,)` int64 or int32, rows of `frames` to pick; None for all.

    Returns:
        `(B, 1, D)` and `(B, N, D)`, N = S without `rows`.

    Raises:
        ValueError: The shapes or dtypes do not fit.
    """
    fits = shared.ndim == frames.ndim == 3 and shared.shape[1] == 1
    fits = fits and frames.shape[0] in (1, shared.shape[0]) and shared.shape[2] == frames.shape[2]
    fits = fits and shared.dtype == frames.dtype and shared.is_floating_point()
    fits = fits and (rows is None or (rows.ndim == 1 and rows.dtype in (torch.int32, torch.int64)))
    needs = "shared (B, 1, D), frames (B or 1, S, D) of its dtype and rows (N,) of integers or None"
    given = {"shared": shared, "frames": frames, "rows": rows}
    _op.check(fits, "streams.silu_conditions", needs, **given)
    acc = shared.to(_op.work_dtype(shared))
    sums = acc + (frames if rows is None else frames.index_select(1, rows))
    return F.silu(acc).to(shared.dtype), F.silu(sums).to(shared.dtype)


def guide(
    z: Tensor,
    u: Tensor,
    w: float | Tensor = 1.0,
    mode: str = "cfg_scaled",
    step: float = 1.0,
    std: Tensor | None = None,
    mean: Tensor | None = None,
) -> Tensor:
    """Return the end of a step: (z - step guided u) std + mean.

    Args:
        z: `(B, N, C)`, noise.
        u: `(2 B, N, C)`, the conditional velocities and then the unconditional ones; for mode
            "none" `(B, N, C)`. Its dtype may differ.
        w: Guidance scale, a number, or a tensor of one element or `(B,)` on the device of z.
        mode: "cfg_scaled", "cfg" or "none": see `mfmjt.meanflow.guide`.
        step: The part of the interval that is gone, t - r.
        std: Factor of every channel, C elements, or None.
        mean: What is added to every channel, C elements, or None.

    Returns:
        `(B, N, C)` in the dtype of z; computed in float32 or wider.

    Raises:
        ValueError: The shapes do not fit, or there is no such mode.
    """
    scale = w.reshape(-1) if isinstance(w, Tensor) else None
    fits = mode in GUIDANCE and z.ndim == 3 and z.is_floating_point() and u.is_floating_point()
    fits = fits and u.shape == ((1 if mode == "none" else 2) * z.shape[0], *z.shape[1:])
    fits = fits and (scale is None or scale.shape[0] in (1, z.shape[0]))
    fits = fits and all(t is None or t.device == z.device for t in (u, scale, std, mean))
    fits = fits and all(t is None or t.numel() == z.shape[2] for t in (std, mean))
    needs = (
        f"a mode of {', '.join(GUIDANCE)} (got {mode!r}), z (B, N, C), u (2 B, N, C), or "
        "(B, N, C) for mode 'none', w one or (B,), std and mean of C elements, on one device"
    )
    _op.check(fits, "streams.guide", needs, z=z, u=u, w=scale, std=std, mean=mean)
    acc = _op.work_dtype(z)
    u = u.to(acc)
    if mode != "none":
        conditional, null = u.chunk(2)
        if mode == "cfg_scaled":
            dot = (conditional * null).sum((1, 2), keepdim=True)
            null = null * (dot / (null.square().sum((1, 2), keepdim=True) + _GUIDANCE_EPS))
        w = w.to(acc).reshape(-1, 1, 1) if isinstance(w, Tensor) else w
        u = w * conditional + (1 - w) * null
    x = z.to(acc) - step * u
    x = x if std is None else x * std.to(acc).flatten()
    return (x if mean is None else x + mean.to(acc).flatten()).to(z.dtype)
