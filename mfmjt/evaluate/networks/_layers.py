"""Layers with the parameter names of several published networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MLP", "Attention", "BatchNorm", "attend"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Mix tokens by multi-head attention.

    Args:
        q: Queries `(B, N, D)`.
        k: Keys `(B, M, D)`.
        v: Values `(B, M, D)`.
        heads: Number of heads, into which D is divided.
        bias: Added to the scores, broadcast to `(B, heads, N, M)`.

    Returns:
        `(B, N, D)`.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return y.transpose(1, 2).flatten(2)


class BatchNorm(nn.Module):
    """The running statistics of a batch norm and what is done with them."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    @property
    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, each `(width,)`, by which it is `x * scale + shift`."""
        mean, variance = self.running_mean, self.running_var
        scale = self.weight.double() * (variance.double() + 1e-5).rsqrt()
        return scale.float(), (self.bias - mean * scale).float()


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` -> `(..., D)`."""
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Self-attention with one matrix for queries, keys and values, in this order."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor | None = None, first: int | None = None) -> Tensor:
        """Mix tokens.

        Args:
            x: `(B, N, D)`.
            bias: As for `attend`.
            first: Return only so many tokens, all of which see all others.

        Returns:
            `(B, first or N, D)`.
        """
        if first is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            dim = x.shape[-1]
            weight, offset = self.qkv.weight, self.qkv.bias
            q = F.linear(x[:, :first], weight[:dim], offset[:dim])
            k, v = F.linear(x, weight[dim:], offset[dim:]).chunk(2, dim=-1)
        return self.proj(attend(q, k, v, self.heads, bias))
