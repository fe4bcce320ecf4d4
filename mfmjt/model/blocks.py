"""Layers of the transformer: channels-last, on the kernels' public functions.

A sub-layer's output is not added to the residual where it is made: it travels as a `Pending` sum to
the next normalization, so that gate, add, norm and modulation are one pass at every boundary, those
between blocks included.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from mfmjt.kernels import (
    adaln,
    conv1d,
    gated_residual_adaln,
    joint_attention,
    linear,
    qk_norm_rope,
    swiglu,
)
from mfmjt.model.recompute import recomputable

__all__ = [
    "Block",
    "Conv1d",
    "FinalLayer",
    "FrameCondition",
    "JointBlock",
    "Linear",
    "Pending",
    "SwiGLU",
]

NORM_EPS = 1e-5
"""Epsilon of the layer norms, as published (the kernels' own default is another)."""


class Linear(nn.Linear):
    """`nn.Linear` on our kernel: xavier-uniform weight, zero bias."""

    def reset_parameters(self) -> None:
        """Initialize as published."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return linear(x, self.weight, self.bias)


class Conv1d(nn.Conv1d):
    """`nn.Conv1d` with an odd kernel and same padding, over channels-last sequences."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, bias: bool = True) -> None:
        super().__init__(in_dim, out_dim, kernel_size, padding=kernel_size // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in) to (B, N, out)."""
        return conv1d(x, self.weight, self.bias)


def _projection(in_dim: int, out_dim: int, kernel_size: int, bias: bool) -> nn.Module:
    # Kernel size 1 is a Linear, also in the shape of its published weight.
    if kernel_size == 1:
        return Linear(in_dim, out_dim, bias=bias)
    return Conv1d(in_dim, out_dim, kernel_size, bias=bias)


def _modulation(dim: int, parts: int) -> nn.Sequential:
    """Linear layer from a condition to `parts` of D channels, such as a gate; zero at first.

    The caller applies the activation, once for all blocks; it is here for the published names.
    """
    layer = Linear(dim, parts * dim)
    nn.init.zeros_(layer.weight)
    return nn.Sequential(nn.SiLU(), layer)


class SwiGLU(nn.Module):
    """w2(silu(w1 x)·(w3 x)); a convolution of `kernel_size` for each, or a Linear for 1."""

    def __init__(self, dim: int, hidden: int, kernel_size: int) -> None:
        super().__init__()
        self.w1 = _projection(dim, hidden, kernel_size, bias=False)
        self.w2 = _projection(hidden, dim, kernel_size, bias=False)
        self.w3 = _projection(dim, hidden, kernel_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class Pending(NamedTuple):
    """The residual x + gate·h, not yet added up; x alone while h is None."""

    x: Tensor
    h: Tensor | None = None
    gate: Tensor | None = None

    def norm(self, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Add up, normalize and modulate: (residual, modulated)."""
        if self.h is None or self.gate is None:
            return self.x, adaln(self.x, shift, scale, eps=NORM_EPS)
        return gated_residual_adaln(self.x, self.h, self.gate, shift, scale, eps=NORM_EPS)


class FrameCondition(NamedTuple):
    """silu(c) of a stream; each of its rows serves the tokens that `row_of` names.

    Attributes:
        rows: (B, S, D), or (B, 1, D) for one condition of all tokens.
        row_of: (N,) row of every token, or None if rows and tokens correspond.
    """

    rows: Tensor
    row_of: Tensor | None = None


class Attention(nn.Module):
    """Projection to q, k and v, with RMS-normalized and rotated q and k.

    The rows of `qkv` are planar, (3, heads, head_dim); published checkpoints interleave them and
    `load_mmaudio` permutes.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = nn.RMSNorm(dim // num_heads)
        self.k_norm = nn.RMSNorm(dim // num_heads)

    def forward(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) to q, k, v, each (B, N, heads, head_dim)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return qk_norm_rope(qkv, self.q_norm.weight, self.k_norm.weight, rope)


class Block(nn.Module):
    """One stream's attention and feed-forward, each modulated and gated.

    A `pre_only` block offers keys and values to the other streams and ends there.

    Attributes:
        recompute: Keep only the inputs for the backward pass; see `mfmjt.model.recompute`.
    """

    recompute = False

    def __init__(
        self, dim: int, num_heads: int, hidden: int, kernel_size: int, pre_only: bool = False
    ) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads)
        self.parts = 2 if pre_only else 6
        self.adaLN_modulation = _modulation(dim, self.parts)
        if pre_only:
            # Its queries are not used; a parameter that never gets a gradient breaks DDP.
            self.attn.q_norm.requires_grad_(False)
        else:
            self.linear1 = _projection(dim, dim, kernel_size, bias=True)
            self.ffn = SwiGLU(dim, hidden, kernel_size)

    def modulation(self, condition: FrameCondition) -> tuple[Tensor, ...]:
        """Shift, scale[, gate, shift, scale, gate], each (B, N or 1, D).

        Computed on the condition's own rows, which are fewer than the tokens: picking rows commutes
        with a linear map.
        """
        parts = self.adaLN_modulation[1](condition.rows)
        if condition.row_of is not None:
            parts = parts.index_select(1, condition.row_of)
        return parts.chunk(self.parts, dim=-1)

    def after_attention(
        self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]
    ) -> Pending:
        """Compute the rest of the block once attention, (B, N, heads, head_dim), is known."""
        gate_attn, shift, scale, gate_ffn = modulation[2:]
        x, y = Pending(x, self.linear1(attended.flatten(2)), gate_attn).norm(shift, scale)
        return Pending(x, self.ffn(y), gate_ffn)

    @recomputable
    def forward(self, stream: Pending, condition: FrameCondition, rope: Tensor | None) -> Pending:
        """Self-attention over one stream."""
        modulation = self.modulation(condition)
        x, y = stream.norm(*modulation[:2])
        q, k, v = self.attn(y, rope)
        return self.after_attention(x, joint_attention(q, k, v), modulation)


class JointBlock(nn.Module):
    """Latent, video and text attend to all three; in the last one only the latent goes on.

    Attributes:
        recompute: Keep only the inputs for the backward pass; see `mfmjt.model.recompute`.
    """

    recompute = False

    def __init__(self, dim: int, num_heads: int, hidden: int, last: bool) -> None:
        super().__init__()
        self.last = last
        self.latent_block = Block(dim, num_heads, hidden, kernel_size=3)
        self.clip_block = Block(dim, num_heads, hidden, kernel_size=3, pre_only=last)
        self.text_block = Block(dim, num_heads, hidden, kernel_size=1, pre_only=last)

    @recomputable
    def forward(
        self,
        streams: tuple[Pending, Pending, Pending],
        conditions: tuple[FrameCondition, FrameCondition, FrameCondition],
        ropes: tuple[Tensor | None, Tensor | None, Tensor | None],
    ) -> tuple[Pending, Pending, Pending]:
        """Every tuple is (latent, video, text); the last block returns the others unchanged."""
        blocks = (self.latent_block, self.clip_block, self.text_block)
        modulations = [b.modulation(c) for b, c in zip(blocks, conditions, strict=True)]
        normed = [s.norm(*m[:2]) for s, m in zip(streams, modulations, strict=True)]
        qkv = [b.attn(y, rope) for b, (_, y), rope in zip(blocks, normed, ropes, strict=True)]
        q, k, v = zip(*qkv, strict=True)
        residuals = [x for x, _ in normed]
        if self.last:
            latent = joint_attention(q[0], k, v)
            out = self.latent_block.after_attention(residuals[0], latent, modulations[0])
            return out, streams[1], streams[2]
        latent, video, text = (
            block.after_attention(x, attended, modulation)
            for block, x, attended, modulation in zip(
                blocks, residuals, joint_attention(q, k, v), modulations, strict=True
            )
        )
        return latent, video, text


class FinalLayer(nn.Module):
    """Last norm, modulated by the global condition (as published), and the output convolution.

    It starts at zero, so a fresh network gives exactly zero.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.adaLN_modulation = _modulation(dim, 2)
        self.conv = Conv1d(dim, out_dim, kernel_size=7)
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)

    def forward(self, stream: Pending, condition: FrameCondition) -> Tensor:
        """(B, N, D) to (B, N, C)."""
        shift, scale = self.adaLN_modulation[1](condition.rows).chunk(2, dim=-1)
        return self.conv(stream.norm(shift, scale)[1])
