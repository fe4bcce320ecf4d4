"""Inference over several streams at once: one launch where a network would need one per stream.

    project              y = act(x W^T + b), or silu(x W1^T) (x W3^T); W of a layer or a convolution
    project_qkv          q, k, v of a projection; q and k RMS-normalised per head and rotated
    gated_residual_norm  x' = x + gate h,  y = LN(x') (1 + scale) + shift
    project_norm         the same of h = project(...), whose sums may be left to the norm

and, once a step: pool, silu_conditions, guide.

The streams of a joint block (latent, video, text) have weights and lengths of their own, and at
batch 1 their sub-layers are so short that launching them takes longer than running them. A
convolution is a product too: the K tokens around a token, K C numbers, times a weight that is
packed as (O, K C). On a CPU the windows are copied out and multiplied by oneDNN. Projections keep
nothing for a gradient and propagate no tangent: what asks for either is refused; what is done once
a step then is PyTorch's own operations. Stored in the
dtype of x, summed in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _backends, _dual, _eager, _op
from mfmjt.kernels.adaln import adaln
from mfmjt.kernels.conv1d import conv1d_ref
from mfmjt.kernels.cpu import product as _cpu
from mfmjt.kernels.gated_residual_adaln import gated_residual_adaln
from mfmjt.kernels.qk_norm_rope import qk_norm_rope
from mfmjt.kernels.swiglu import swiglu

__all__ = [
    "ACTIVATIONS",
    "Packed",
    "gated_residual_norm",
    "guide",
    "pack",
    "pool",
    "project",
    "project_norm",
    "project_qkv",
    "silu_conditions",
]

ACTIVATIONS = ("none", "silu", "selu")
"""What `project` may apply."""
GUIDANCE = ("none", "cfg", "cfg_scaled")
_GUIDANCE_EPS = 1e-8  # as mfmjt.meanflow.guide


class Packed(NamedTuple):
    """A weight as `project` reads it.

    Attributes:
        data: (O, K, C), or (2 O, K, C) for a gated unit, first those that go through silu.
        glu: Whether it is a gated unit.
        blocked: The same once more as this CPU multiplies it fastest, opaque; None elsewhere.
    """

    data: Tensor
    glu: bool = False
    blocked: Tensor | None = None

    @property
    def out(self) -> int:
        """Return the channels of the result."""
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
    return Packed(data, bool(more), None if _is_intercepted() else _cpu.blocked(data))


def _is_intercepted() -> bool:
    """Return True if a compiler or a mode must see our library ops."""
    return torch.compiler.is_compiling() or _eager.is_intercepted()


def _product(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    data, blocked = (weight, None) if isinstance(weight, Tensor) else (weight.data, weight.blocked)
    if not _op.use_reference():
        return _cpu.product(x, data, blocked, bias)
    y = x.new_empty(x.shape[0], 0, data.shape[0])
    if x.shape[1]:  # PyTorch convolves no sequence without tokens
        y = conv1d_ref(x, data.transpose(1, 2))
    return y if bias is None else y + bias.to(y.dtype)


def _project(
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    acts: list[int],
    glu: bool,
) -> list[Tensor]:
    ys = list(map(_product, xs, weights, biases))
    if glu:
        return [swiglu(*y.chunk(2, dim=-1)) for y in ys]
    functions: Any = (None, F.silu, F.selu)
    return [functions[act](y, inplace=True) if act else y for y, act in zip(ys, acts, strict=True)]


def _project_norm(
    ins: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    *others: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    xs, gates, shifts, scales, rows, eps = others
    hs = _project(ins, weights, biases, [0] * len(ins), False)
    lists = (xs, hs, gates, shifts, scales)
    x, h, gate, shift, scale = (tuple(tensors) for tensors in lists)
    totals, ys = gated_residual_adaln(x, h, gate, shift, scale, eps, rows)
    return list(totals), list(ys)


def _alike(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _project_qkv(
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    q_norms: list[Tensor],
    k_norms: list[Tensor],
    ropes: list[Tensor | None],
    num_heads: int,
    eps: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    qkv = [y.unflatten(-1, (3, num_heads, -1)) for y in map(_product, xs, weights, biases)]
    results = zip(*map(qk_norm_rope, qkv, q_norms, k_norms, ropes, [eps] * len(qkv)), strict=True)
    qs, ks, vs = map(list, results)
    return qs, ks, vs


def _pool(xs: list[Tensor]) -> Tensor:
    means = [x.mean(1, keepdim=True, dtype=_op.work_dtype(x)).to(x.dtype) for x in xs]
    return torch.cat(means, dim=-1)


def _silu_conditions(shared: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    acc = shared.to(_op.work_dtype(shared))
    return F.silu(acc).to(shared.dtype), F.silu(acc + frames).to(shared.dtype)


def _guide(
    z: Tensor, u: Tensor, w: float, ws: Tensor | None, mode: str, step: float, eps: float
) -> Tensor:
    acc = _op.work_dtype(z)
    u = u.to(acc)
    if mode != "none":
        conditional, null = u.chunk(2)
        if mode == "cfg_scaled":
            dot = (conditional * null).sum((1, 2), keepdim=True)
            null = null * (dot / (null.square().sum((1, 2), keepdim=True) + eps))
        scale: Any = w if ws is None else ws.to(acc).reshape(-1, 1, 1)
        u = scale * conditional + (1 - scale) * null
    return (z.to(acc) - step * u).to(z.dtype)


def _library_op(schema: str, formula: Any, module: str = "product", fake: Any = None) -> Any:
    triton = _op.backend("triton", module, formula.__name__[1:], formula)
    return _op.register(schema, formula, fake, triton if _backends.ON_CPU else None, triton)


_project_op = _library_op(
    "streams_project(Tensor[] xs, Tensor[] weights, Tensor?[] biases, int[] acts, bool glu) "
    "-> Tensor[]",
    _project,
)
_project_norm_op = _library_op(
    "streams_project_norm(Tensor[] ins, Tensor[] weights, Tensor?[] biases, Tensor[] xs, "
    "Tensor[] gates, Tensor[] shifts, Tensor[] scales, Tensor?[] rows, float eps) "
    "-> (Tensor[], Tensor[])",
    _project_norm,
    fake=lambda ins, weights, biases, xs, *_: tuple([list(map(_alike, xs)) for _ in range(2)]),
)
_project_qkv_op = _library_op(
    "streams_project_qkv(Tensor[] xs, Tensor[] weights, Tensor?[] biases, Tensor[] q_norms, "
    "Tensor[] k_norms, Tensor?[] ropes, SymInt num_heads, float eps) "
    "-> (Tensor[], Tensor[], Tensor[])",
    _project_qkv,
)
_pool_op = _library_op("streams_pool(Tensor[] xs) -> Tensor", _pool, "step")
_silu_conditions_op = _library_op(
    "streams_silu_conditions(Tensor shared, Tensor frames) -> (Tensor, Tensor)",
    _silu_conditions,
    "step",
)
_guide_op = _library_op(
    "streams_guide(Tensor z, Tensor u, float w, Tensor? ws, str mode, float step, float eps) "
    "-> Tensor",
    _guide,
    "step",
)


def _once(op: Any, formula: Any, *args: Any) -> Any:
    """Call a library op; or its formula where that is asked for, or derivatives are wanted."""
    tensors = [x for arg in args for x in (arg if isinstance(arg, list) else [arg])]
    tensors = [x for x in tensors if isinstance(x, Tensor)]
    if _op.use_reference() or _dual.wants_derivatives(tensors):
        return formula(*args)
    return op(*args)


def _run(op: Any, formula: Any, instead: str, weights: list[Packed], *args: Any) -> Any:
    """Call a library op of streams, weights and more; or its formula where that is the same.

    Raises:
        NotImplementedError: A gradient or a tangent is wanted; names the ops to use instead.
    """
    xs, *others = args
    if _op.use_reference():
        return formula(xs, weights, *others)
    packed = [weight.data for weight in weights]
    tensors = [t for arg in (packed, *args) if isinstance(arg, list) for t in arg]
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    _dual.refuse_derivatives(
        f"streams.{formula.__name__[1:]}", f"{instead} for each stream", tensors
    )
    if any(weight.blocked is not None for weight in weights) and not _is_intercepted():
        return formula(xs, weights, *others)
    return op(xs, packed, *others)


def _named(**groups: Any) -> dict[str, Tensor | None]:
    """Return tensors of lists by their places, for messages."""
    return {f"{name}[{i}]": t for name, group in groups.items() for i, t in enumerate(group or ())}


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
    """Apply a linear layer, convolution of same padding or gated unit to every stream.

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
    bias = [None] * count if biases is None else list(biases)
    acts, glu = [act] * count if isinstance(act, str) else list(act), any(w.glu for w in weights)
    fits = count == len(weights) == len(bias) == len(acts) and count > 0
    fits = fits and all(map(_fits_product, xs, weights, bias))
    fits = fits and all(w.glu == glu for w in weights) and len({x.dtype for x in xs}) == 1
    if not (fits and all(a in ACTIVATIONS[: 1 if glu else None] for a in acts)):
        needs = (
            "for each stream x (B, N, C), a packed weight (O, K, C) of its dtype, a bias (O,) or "
            f"(N, O) or None, and an activation of {', '.join(ACTIVATIONS)}; gated units have "
            f"neither bias nor activation and come alone (got {', '.join(acts)}, "
            f"glu {', '.join(str(weight.glu) for weight in weights)})"
        )
        named = _named(x=xs, weight=[weight.data for weight in weights], bias=bias)
        _op.check(False, "streams.project", needs, **named)
    numbers = [ACTIVATIONS.index(a) for a in acts]
    ys: list[Tensor] = _run(
        _project_op, _project, "linear or conv1d", weights, xs, bias, numbers, glu
    )
    return ys


def project_norm(
    ins: Sequence[Tensor],
    weights: Sequence[Packed],
    biases: Sequence[Tensor | None] | None,
    xs: Sequence[Tensor],
    gates: Sequence[Tensor],
    shifts: Sequence[Tensor],
    scales: Sequence[Tensor],
    rows: Sequence[Tensor | None] | None,
    eps: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what `gated_residual_norm` does of h = `project(ins, weights, biases)`.

    Where h has too few elements to keep a GPU busy, its sums are made in parts side by side, which
    the norm adds up: h then is rounded with x + gate h, and not before.

    Args:
        ins: `(B, N_i, C_i)` each.
        weights: What `pack` made for each stream, not gated units.
        biases: As for `project`.
        xs: `(B, N_i, D_i)` each.
        gates: As for `gated_residual_norm`, like the next four.
        shifts: Likewise.
        scales: Likewise.
        rows: Likewise.
        eps: Added to the variance.

    Returns:
        The new residual streams and their modulated norms.

    Raises:
        ValueError: The shapes or dtypes do not fit.
        NotImplementedError: A gradient or a tangent is wanted.
    """
    count = len(xs)
    bias = [None] * count if biases is None else list(biases)
    picks = [None] * count if rows is None else list(rows)
    lists = (ins, weights, bias, gates, shifts, scales, picks)
    fits = count > 0 and all(len(given) == count for given in lists)
    fits = fits and all(map(_fits_product, ins, weights, bias))
    pairs = list(zip(ins, weights, xs, strict=True)) if fits else []
    fits = fits and all((*i.shape[:2], w.out) == x.shape and not w.glu for i, w, x in pairs)
    fits = fits and all(i.dtype == x.dtype == xs[0].dtype for i, _, x in pairs)
    needs = "for each stream what `project` takes, not gated, and x (B, N, D) of its results' shape"
    named = _named(input=ins, weight=[w.data for w in weights], bias=bias, x=xs)
    _op.check(fits, "streams.project_norm", needs, **named)
    modulations = [_spread(ms, xs) for ms in (gates, shifts, scales)]
    others = (bias, list(xs), *modulations, picks, eps)
    instead = "linear or conv1d, and gated_residual_adaln,"
    results: tuple[list[Tensor], list[Tensor]] = _run(
        _project_norm_op, _project_norm, instead, list(weights), list(ins), *others
    )
    return results


def _spread(modulations: Sequence[Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
    """Return modulations of every sample."""
    pairs = zip(modulations, xs, strict=True)
    return [m if m.shape[0] == x.shape[0] else m.expand(len(x), -1, -1) for m, x in pairs]


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
    """Return queries, keys and values of every stream: `linear`, then `qk_norm_rope`.

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
    bias, rope = ([None] * count if given is None else list(given) for given in (biases, ropes))
    lists = (weights, bias, list(q_norms), list(k_norms), rope)
    fits = count > 0 and all(len(given) == count for given in lists)
    for x, weight, b, q_norm, k_norm, angles in zip(xs, *lists, strict=True) if fits else ():
        width, rest = divmod(weight.data.shape[0], 3 * num_heads)
        fits = fits and _fits_product(x, weight, b) and rest == 0 and not weight.glu
        fits = fits and q_norm.shape == k_norm.shape == (width,) and x.dtype == xs[0].dtype
        fits = fits and width == weights[0].data.shape[0] // (3 * num_heads)
        if angles is not None:
            fits = fits and width % 2 == 0 and angles.shape == (x.shape[1], width // 2, 2)
    if not fits:
        needs = (
            f"for each stream x (B, N, C), a packed weight (3 H D, K, C) of its dtype with H = "
            f"{num_heads}, a bias or None, norms (D,) and rope (N, D/2, 2) or None"
        )
        named = _named(x=xs, weight=[weight.data for weight in weights], bias=bias)
        named |= _named(q_norm=q_norms, k_norm=k_norms, rope=rope)
        _op.check(False, "streams.project_qkv", needs, **named)
    others = (bias, list(q_norms), list(k_norms), rope, num_heads, eps)
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = _run(
        _project_qkv_op, _project_qkv, "linear and qk_norm_rope", weights, xs, *others
    )
    return parts


def gated_residual_norm(
    xs: Sequence[Tensor],
    hs: Sequence[Tensor] | None,
    gates: Sequence[Tensor] | None,
    shifts: Sequence[Tensor],
    scales: Sequence[Tensor],
    rows: Sequence[Tensor | None] | None,
    eps: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Add gated residuals and normalize the sums: `gated_residual_adaln`, or `adaln`, of streams.

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
    """
    fits = (hs is None) == (gates is None) and len(xs) > 0
    if rows is not None:
        pairs = zip(xs, rows, strict=False)
        fits = fits and len(rows) == len(xs)
        fits = fits and all(row is None or row.shape == x.shape[1:2] for x, row in pairs)
    if not fits:
        needs = "for each stream rows (N,) of integers or None; h and gate, or neither"
        _op.check(False, "streams.gated_residual_norm", needs, **_named(x=xs, h=hs, rows=rows))

    shift, scale = tuple(_spread(shifts, xs)), tuple(_spread(scales, xs))
    if hs is None or gates is None:
        return list(xs), list(adaln(tuple(xs), shift, scale, eps, rows))
    gate = tuple(_spread(gates, xs))
    totals, ys = gated_residual_adaln(tuple(xs), tuple(hs), gate, shift, scale, eps, rows)
    return list(totals), list(ys)


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
    pooled: Tensor = _once(_pool_op, _pool, list(xs))
    return pooled


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
    frames = frames if rows is None else frames.index_select(1, rows)
    found: tuple[Tensor, Tensor] = _once(_silu_conditions_op, _silu_conditions, shared, frames)
    return found


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
    number = 1.0 if isinstance(w, Tensor) else float(w)
    args = (u, number, scale, mode, step, _GUIDANCE_EPS)
    if std is None and mean is None:
        x: Tensor = _once(_guide_op, _guide, z, *args)
        return x
    x = _guide(z.to(_op.work_dtype(z)), *args)
    x = x if std is None else x * std.to(x.dtype).flatten()
    return (x if mean is None else x + mean.to(x.dtype).flatten()).to(z.dtype)
