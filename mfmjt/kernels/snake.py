"""Anti-aliased SnakeBeta of BigVGAN: up to twice the rate, a periodic activation, back down.

    value      z = U x,  a = e^alpha,  c = 1 / (e^beta + 1e-9),  y = D (z + c sin^2(a z))
    tangent    y_dot = D (s (U x_dot)),  s = 1 + a c sin(2 a z)
    cotangent  g = D^T y_bar,  x_bar = U^T (s g),  alpha_bar = sum(g a c z sin(2 a z)),
               beta_bar = -sum(g sin^2(a z)) c^2 e^beta

x (B, C, N) as vocoders have it, alpha and beta (C) on a log scale. U and D are the 12-tap
Kaiser-sinc filters of Alias-Free GAN with edges repeated; the taps are symmetric, so without its
edges U^T is 2 D. Stored in the dtype of x, computed in float32 (float64 for float64). Kept for
backward: x, alpha, beta.

The fused kernels move 2 B C N elements. In the formulas the filters are matmuls of blocks of the
signal with small banded matrices, about half the time of grouped convolutions (LOG.md).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _native
from mfmjt.kernels._filter import FILTER, taps
from mfmjt.kernels._op import Op, check, check_tensors, work_dtype

__all__ = ["snake", "snake_ref"]

_BLOCK = 16  # samples of y in a row of the banded matmul; 8 and 32 are slower
_CHUNK = 2**18  # elements of z computed at a time, so that they stay in a core's cache


def snake_ref(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Compute `snake` in plain PyTorch; the definition of correct."""
    channels = x.shape[1]
    filters = taps(x).expand(channels, 1, -1)
    up = F.conv_transpose1d(
        F.pad(x, (5, 5), mode="replicate"), 2 * filters, stride=2, groups=channels
    )[..., 15:-15]
    frequency, height = alpha.exp()[:, None], 1 / (beta.exp()[:, None] + 1e-9)
    up = (up + height * torch.sin(up * frequency).square()).to(x.dtype)
    return F.conv1d(F.pad(up, (5, 6), mode="replicate"), filters, stride=2, groups=channels)


@functools.lru_cache
def _bands(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return U for one block, (_BLOCK + 6, 2 _BLOCK), and D, (2 _BLOCK + 10, _BLOCK)."""
    up, down = torch.zeros(_BLOCK + 6, 2 * _BLOCK), torch.zeros(2 * _BLOCK + 10, _BLOCK)
    up, down = up.double(), down.double()
    for n in range(_BLOCK):
        for k in range(len(FILTER)):
            down[2 * n + k, n] = FILTER[k]
            # Sample m of z takes tap k from sample (m + 5 - k) / 2 of x.
            m = 2 * n + (k + 1) % 2
            up[(m + 5 - k) // 2 + 3, m] = 2 * FILTER[k]
    return up.to(device, dtype), down.to(device, dtype)


def _blocks(x: Tensor, count: int, step: int, width: int) -> Tensor:
    """Return overlapping windows of each row as rows of one matrix, zeros beyond the ends of x."""
    x = F.pad(x, (0, (count - 1) * step + width - x.shape[1]))
    return x.unfold(1, width, step).reshape(-1, width)


def _up(x: Tensor) -> Tensor:
    """Filter rows of 3 + n + 3 samples to rows of 2 n."""
    n = x.shape[1] - 6
    count = -(-n // _BLOCK)
    band = _bands(x.dtype, x.device)[0]
    z = _blocks(x, count, _BLOCK, _BLOCK + 6) @ band
    return z.view(x.shape[0], 2 * _BLOCK * count)[:, : 2 * n]


def _down(z: Tensor) -> Tensor:
    """Filter rows of 5 + 2 n + 5 samples to rows of n."""
    n = (z.shape[1] - 10) // 2
    count = -(-n // _BLOCK)
    band = _bands(z.dtype, z.device)[1]
    y = _blocks(z, count, 2 * _BLOCK, 2 * _BLOCK + 10) @ band
    return y.view(z.shape[0], _BLOCK * count)[:, :n]


def _repeat_edges(x: Tensor, width: int) -> Tensor:
    return F.pad(x[None], (width, width), mode="replicate")[0]


def _fold_edges(x: Tensor, width: int) -> Tensor:
    """Apply the adjoint of `_repeat_edges`, in place."""
    inner = x[:, width:-width]
    inner[:, 0] += x[:, :width].sum(1)
    inner[:, -1] += x[:, -width:].sum(1)
    return inner


def _rows(
    x: Tensor, alpha: Tensor, beta: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], list[slice]]:
    """Return x as rows, the frequency, height and e^beta of each, and the chunks to work in."""
    work = work_dtype(x)
    frequency, grown = alpha.to(work).exp(), beta.to(work).exp()
    height = 1 / (grown + 1e-9)
    batch, _, n = x.shape

    def column(t: Tensor) -> Tensor:
        return t.repeat(batch)[:, None]

    step = max(1, _CHUNK // (2 * n))
    rows = x.to(work).reshape(-1, n)
    chunks = [slice(a, a + step) for a in range(0, rows.shape[0], step)]
    return rows, (column(frequency), column(height), column(grown)), chunks


def _activate(z: Tensor, frequency: Tensor, height: Tensor) -> Tensor:
    return torch.mul(z, frequency).sin_().square_().mul_(height).add_(z)


def _fwd(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    out = y.view(-1, x.shape[2])
    rows, (frequency, height, _), chunks = _rows(x, alpha, beta)
    for c in chunks:
        z = _up(_repeat_edges(rows[c], 3))
        out[c] = _down(_repeat_edges(_activate(z, frequency[c], height[c]), 5))
    return y


def _jvp(x: Tensor, x_dot: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    y, y_dot = x.new_empty(x.shape), x.new_empty(x.shape)
    out, out_dot = y.view(-1, x.shape[2]), y_dot.view(-1, x.shape[2])
    rows, (frequency, height, _), chunks = _rows(x, alpha, beta)
    rows_dot = x_dot.to(rows.dtype).reshape(rows.shape)
    for c in chunks:
        z = _up(_repeat_edges(rows[c], 3))
        out[c] = _down(_repeat_edges(_activate(z, frequency[c], height[c]), 5))
        slope = (z * (2 * frequency[c])).sin_().mul_(frequency[c] * height[c]).add_(1)
        slope.mul_(_up(_repeat_edges(rows_dot[c], 3)))
        out_dot[c] = _down(_repeat_edges(slope, 5))
    return y, y_dot


def _bwd(y_bar: Tensor, x: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x_bar = x.new_empty(x.shape)
    out = x_bar.view(-1, x.shape[2])
    rows, (frequency, height, grown), chunks = _rows(x, alpha, beta)
    rows_bar = y_bar.to(rows.dtype).reshape(rows.shape)
    alpha_bar, beta_bar = torch.empty_like(frequency), torch.empty_like(frequency)
    for c in chunks:
        z = _up(_repeat_edges(rows[c], 3))
        # D^T is U / 2 without its edges; the first sample of what comes out belongs to none.
        g = _up(F.pad(rows_bar[c], (6, 6))).mul_(0.5)[:, 1:-1]
        g = _fold_edges(g, 5)
        wave = (z * (2 * frequency[c])).sin_().mul_(frequency[c] * height[c])
        alpha_bar[c] = (wave * g).mul_(z).sum(1, keepdim=True)
        beta_bar[c] = (z * frequency[c]).sin_().square_().mul_(g).sum(1, keepdim=True)
        g = wave.add_(1).mul_(g)
        out[c] = _fold_edges(_down(F.pad(g, (11, 11))).mul_(2), 3)
    beta_bar.mul_(-height.square() * grown)
    channels = x.shape[1]
    return (
        x_bar,
        alpha_bar.view(-1, channels).sum(0).to(alpha.dtype),
        beta_bar.view(-1, channels).sum(0).to(beta.dtype),
    )


def _check(x: Tensor, alpha: Tensor, beta: Tensor) -> None:
    check_tensors("snake", x=x, alpha=alpha, beta=beta)
    fits = x.ndim == 3 and x.shape[2] > 0 and alpha.shape == beta.shape == x.shape[1:2]
    if not (fits and x.is_floating_point()):
        needs = "x (B, C, N) with N > 0, alpha and beta (C,)"
        check(False, "snake", needs, x=x, alpha=alpha, beta=beta)


_op = Op(
    "snake",
    _fwd,
    _jvp,
    _bwd,
    check=_check,
    reference=snake_ref,
    takes=_native.floats,
    fake=lambda x, *_: x.new_empty(x.shape),
)


def snake(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Apply BigVGAN's anti-aliased SnakeBeta activation; differentiable in both modes.

    Args:
        x: `(B, C, N)`, any floating dtype, N at least 1.
        alpha: `(C,)`, log of the frequency; must not carry a tangent.
        beta: `(C,)`, log of the inverse height; must not carry a tangent.

    Returns:
        `(B, C, N)` in the dtype of x.

    Raises:
        ValueError: The shapes do not fit.
        NotImplementedError: alpha or beta carries a tangent.
    """
    return _op(x, alpha, beta)
