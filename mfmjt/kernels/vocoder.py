"""Inference of a vocoder's stages: all their parallel residual blocks in one launch, channels last.

    activate    y_j = snake(x_j)
    convolve    y_j = x_j * W_j + b_j + r_j,   or the mean of that over the blocks
    upsample    a transposed convolution that raises the rate

x_j (B, N, C). The blocks of a stage have kernels of different lengths, and none of their launches
fills a GPU alone. A transposed convolution of stride s and kernel 2 s is two convolutions of two
taps, whose s/2 C outputs a token are the samples that lie before it and behind it. All are products
over windows (`mfmjt.kernels.triton.vocoder`). Nothing is kept for a gradient and no tangent is
propagated: `suits` says where a vocoder may use them. Stored in the dtype of x, summed in float32
(float64 for float64).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _backends, _dual, _op
from mfmjt.kernels._eager import flatten
from mfmjt.kernels.conv1d import conv1d_ref
from mfmjt.kernels.snake import snake

__all__ = ["activate", "arrange", "convolve", "suits", "upsample"]


def suits(x: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Return True if there are kernels for x, and neither gradients nor tangents are wanted.

    Left to PyTorch: float64, for which a GPU has no matrix units, autocasts, and nothing at all.
    """
    if _op.use_reference() or not (_backends.ON_CPU or (_backends.AVAILABLE and x.is_cuda)):
        return False
    if x.numel() == 0 or (x.dtype == torch.float64 and not _backends.INTERPRETED):
        return False
    given = (x, *parameters)
    if torch.is_autocast_enabled(x.device.type):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return False
    return all(_dual.split(t)[1] is None for t in given)


def arrange(weight: Tensor, *order: int) -> None:
    """Rearrange a weight's memory so that its axes in this order are dense; it stays what it is.

    Done once: kernels then read it without a copy. Compilers, which watch, take the copy, and so
    do weights that were made in inference mode.
    """
    packed = weight.detach().permute(order)
    if packed.is_contiguous() or weight.is_inference() or torch.compiler.is_compiling():
        return
    with torch.inference_mode(False), torch.no_grad():
        back = sorted(range(len(order)), key=order.__getitem__)
        weight.data = packed.contiguous().permute(back)


def _activate(xs: list[Tensor], alphas: list[Tensor], betas: list[Tensor]) -> list[Tensor]:
    given = zip(xs, alphas, betas, strict=True)
    return [snake(x.transpose(1, 2), a, b).transpose(1, 2).contiguous() for x, a, b in given]


def _convolve(
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    dilation: int,
    residuals: list[Tensor],
    mean: bool,
) -> list[Tensor]:
    given = zip(xs, weights, list(biases) or [None] * len(xs), strict=True)  # type: ignore[list-item]
    ys = [conv1d_ref(x, weight, bias, dilation) for x, weight, bias in given]
    if residuals:
        ys = [y + r for y, r in zip(ys, residuals, strict=True)]
    if mean:
        ys = [torch.stack(ys).mean(0)]
    return [y.contiguous() for y in ys]


def _upsample(x: Tensor, weight: Tensor, bias: Tensor, rate: int) -> Tensor:
    y = F.conv_transpose1d(x.transpose(1, 2), weight, bias, rate, padding=rate // 2)
    return y.transpose(1, 2).contiguous()


def _library_op(schema: str, formula: Callable[..., Any], module: str) -> Any:
    triton = _op.backend("triton", module, formula.__name__[1:], formula)
    return _op.register(schema, formula, None, triton if _backends.ON_CPU else None, triton)


_activate_op = _library_op(
    "vocoder_activate(Tensor[] xs, Tensor[] alphas, Tensor[] betas) -> Tensor[]",
    _activate,
    "snake",
)
_convolve_op = _library_op(
    "vocoder_convolve(Tensor[] xs, Tensor[] weights, Tensor[] biases, SymInt dilation, "
    "Tensor[] residuals, bool mean) -> Tensor[]",
    _convolve,
    "vocoder",
)
_upsample_op = _library_op(
    "vocoder_upsample(Tensor x, Tensor weight, Tensor bias, SymInt rate) -> Tensor",
    _upsample,
    "vocoder",
)


def _run(op: Any, formula: Callable[..., Any], *args: Any) -> Any:
    tensors = [t for t in flatten(args)[0] if isinstance(t, Tensor)]
    name = f"vocoder.{formula.__name__[1:]}"
    _dual.refuse_derivatives(name, "snake and conv1d", tensors)
    return formula(*args) if _op.use_reference() else op(*args)


def _alike(name: str, needs: str, *lists: Sequence[Tensor]) -> None:
    """Raise unless there is one tensor of every list for each block, all of one dtype."""
    tensors = [t for given in lists for t in given]
    counts = {len(given) for given in lists if given}
    fits = len(counts) == 1 and bool(lists[0]) and all(x.ndim == 3 for x in lists[0])
    fits = fits and len({x.shape for x in lists[0]}) == len({t.dtype for t in tensors}) == 1
    fits = fits and lists[0][0].is_floating_point() and lists[0][0].numel() > 0
    _op.check(fits, f"vocoder.{name}", needs, **{str(i): t for i, t in enumerate(tensors)})


def activate(
    xs: Sequence[Tensor], alphas: Sequence[Tensor], betas: Sequence[Tensor]
) -> list[Tensor]:
    """Apply `snake` to every block.

    Args:
        xs: `(B, N, C)` each, of one shape and not empty.
        alphas: `(C,)` each.
        betas: `(C,)` each.

    Returns:
        `(B, N, C)` each.

    Raises:
        ValueError: The shapes or dtypes do not fit.
        NotImplementedError: A gradient or a tangent is wanted.
    """
    needs = "x (B, N, C), alpha and beta (C,) of each block"
    _alike("activate", needs, xs, alphas, betas)
    rows = [*alphas, *betas]
    fits = len(rows) == 2 * len(xs) and all(t.shape == xs[0].shape[2:] for t in rows)
    _op.check(fits, "vocoder.activate", needs, x=xs[0], **{str(i): t for i, t in enumerate(rows)})
    ys: list[Tensor] = _run(_activate_op, _activate, list(xs), list(alphas), list(betas))
    return ys


def convolve(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    dilation: int = 1,
    residuals: Sequence[Tensor] = (),
    mean: bool = False,
) -> list[Tensor]:
    """Convolve every block with same padding, and add its residual.

    Args:
        xs: `(B, N, C)` each, of one shape and not empty.
        weights: `(O, C, K)` each, K odd and of its own; read in place where (K, O, C) is dense.
        biases: `(O,)` each, or none.
        dilation: Tokens between two taps, of all.
        residuals: `(B, N, O)` each, or none.
        mean: Return the mean over the blocks alone.

    Returns:
        `(B, N, O)` each, or one.

    Raises:
        ValueError: The shapes or dtypes do not fit.
        NotImplementedError: A gradient or a tangent is wanted.
    """
    needs = "x (B, N, C), weight (O, C, K) with K odd, bias (O,), residual (B, N, O) of each block"
    _alike("convolve", needs, xs, weights, biases, residuals)
    (batch, length, channels), outs = xs[0].shape, weights[0].shape[0]
    fits = all(w.shape[:2] == (outs, channels) and w.shape[2] % 2 == 1 for w in weights)
    fits = fits and all(b.shape == (outs,) for b in biases) and dilation >= 1
    fits = fits and all(r.shape == (batch, length, outs) for r in residuals)
    _op.check(fits, "vocoder.convolve", needs, x=xs[0], weight=weights[0])
    args = list(xs), list(weights), list(biases), dilation, list(residuals), mean
    ys: list[Tensor] = _run(_convolve_op, _convolve, *args)
    return ys


def upsample(x: Tensor, weight: Tensor, bias: Tensor, rate: int) -> Tensor:
    """Raise the rate by a transposed convolution.

    Args:
        x: `(B, N, C)`, not empty.
        weight: `(C, O, 2 rate)`; read in place where (2 rate, O, C) is dense.
        bias: `(O,)`.
        rate: Samples for each token, even.

    Returns:
        `(B, N rate, O)`.

    Raises:
        ValueError: The shapes or dtypes do not fit.
        NotImplementedError: A gradient or a tangent is wanted.
    """
    needs = "x (B, N, C), weight (C, O, 2 rate) with an even rate, bias (O,)"
    _alike("upsample", needs, [x], [weight], [bias])
    fits = rate % 2 == 0 and weight.shape == (x.shape[2], bias.shape[0], 2 * rate)
    _op.check(fits, "vocoder.upsample", needs, x=x, weight=weight, bias=bias)
    y: Tensor = _run(_upsample_op, _upsample, x, weight, bias, rate)
    return y
