"""Layers of the transformer: channels-last, on the kernels' public functions.

A sub-layer's output is not added to the residual where it is made: it travels as a `Pending` sum to
the next normalization, so that gate, add, norm and modulation are one pass at every boundary, those
between blocks included.

Streams that attend to one another go through each sub-layer together, in one launch if they can:
latent, video and text in a joint block, or latent and text where there is no video; the latent
alone in a later one. `Blocks` is either.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfmjt.kernels import (
    adaln,
    conv1d,
    gated_residual_adaln,
    joint_attention,
    linear,
    qk_norm_rope,
    swiglu,
    swiglu_product,
)
from mfmjt.model.config import VideoMode
from mfmjt.model.recompute import recomputable

__all__ = [
    "Block",
    "Blocks",
    "Conv1d",
    "FinalLayer",
    "FrameCondition",
    "JointBlock",
    "Linear",
    "Pending",
    "SwiGLU",
    "normalize",
    "run",
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


def layer(modules: Sequence[nn.Module], xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Apply a layer to each stream, all convolutions at once and all linear layers at once."""
    ys: dict[int, Tensor] = {}
    for kind, op in ((Conv1d, conv1d), (Linear, linear)):
        alike = {i: m for i, m in enumerate(modules) if type(m) is kind and _is_plain(m)}
        if alike:
            weights = tuple([m.weight for m in alike.values()])
            biases = tuple([m.bias for m in alike.values()])
            given = tuple([xs[i] for i in alike])
            ys |= zip(alike, op(given, weights, biases), strict=True)
    return tuple(ys[i] if i in ys else m(xs[i]) for i, m in enumerate(modules))


def _is_plain(module: nn.Module) -> bool:
    """Return False for a layer with an adapter or with someone's hooks: it is called as it is."""
    forward = module._forward_hooks or module._forward_pre_hooks
    hooked = forward or module._backward_hooks or module._backward_pre_hooks
    return type(module) in (Conv1d, Linear) and not hooked


class SwiGLU(nn.Module):
    """w2(silu(w1 x)·(w3 x)); a convolution of `kernel_size` for each, or a Linear for 1."""

    def __init__(self, dim: int, hidden: int, kernel_size: int) -> None:
        super().__init__()
        self.w1 = _projection(dim, hidden, kernel_size, bias=False)
        self.w2 = _projection(hidden, dim, kernel_size, bias=False)
        self.w3 = _projection(dim, hidden, kernel_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return feed_forward((self,), (x,))[0]


def feed_forward(modules: Sequence[SwiGLU], xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Apply a SwiGLU to each stream."""
    gates, ups = [m.w1 for m in modules], [m.w3 for m in modules]
    if all(map(_is_plain, (*gates, *ups))):
        weights: Any = [tuple([m.weight for m in layers]) for layers in (gates, ups)]
        ys = swiglu_product(tuple(xs), *weights)
    else:
        ys = swiglu(layer(gates, xs), layer(ups, xs))
    return layer([m.w2 for m in modules], ys)


class Pending(NamedTuple):
    """The residual x + gate·h, not yet added up; x alone while h is None."""

    x: Tensor
    h: Tensor | None = None
    gate: Tensor | None = None


def normalize(
    streams: Sequence[Pending],
    modulations: Iterable[Sequence[Tensor]],
    conditions: Iterable[FrameCondition],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Add up, normalize and modulate every stream.

    Args:
        streams: All with something to add, or none of them.
        modulations: For each stream shift and scale, (B, S or 1, D), and perhaps more.
        conditions: What they were computed of, as gates were, or where those have a row for all
            tokens.

    Returns:
        Residuals, and the same normalized and modulated; (B, N, D) each.
    """
    xs, hs, gates = zip(*streams, strict=True)
    shifts, scales = zip(*(parts[:2] for parts in modulations), strict=True)
    rows = tuple([condition.row_of for condition in conditions])
    picks = None if all(row is None for row in rows) else rows
    if hs[0] is None:
        return xs, adaln(xs, shifts, scales, eps=NORM_EPS, rows=picks)
    return gated_residual_adaln(xs, hs, gates, shifts, scales, eps=NORM_EPS, rows=picks)


class FrameCondition(NamedTuple):
    """silu(c) of a stream; `row_of` names the row that modulates each token.

    Picking rows commutes with a linear map, and there are fewer rows than tokens: modulations are
    computed of rows, and norms pick them.

    Attributes:
        rows: (B, S, D), or (B, 1, D) for one condition of all tokens.
        row_of: (N,) row of every token, or None if rows and tokens correspond.
    """

    rows: Tensor
    row_of: Tensor | None = None


class Attention(nn.Module):
    """Weights of the projection to q, k and v, and of the RMS norms of q and k.

    The rows of `qkv` are planar, (3, heads, head_dim); published checkpoints interleave them and
    `load_mmaudio` permutes.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = nn.RMSNorm(dim // num_heads)
        self.k_norm = nn.RMSNorm(dim // num_heads)


class Block(nn.Module):
    """One stream's attention and feed-forward, each modulated and gated.

    A `pre_only` block offers keys and values to the other streams and ends there.

    Attributes:
        parts: Parts of the modulation: shift, scale[, gate, shift, scale, gate].
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

    def together(self) -> Blocks:
        """Return this block as what runs it."""
        return Blocks(self)

    @recomputable
    def forward(self, *args: Any) -> tuple[Pending, ...]:
        """Run self-attention over one stream; arguments and results are those of `Blocks`."""
        return self.together()(*args)


class JointBlock(nn.Module):
    """Latent, video and text attend to all of them; in the last one only the latent goes on.

    With `video="gated"` all attend to latent and text as if there were no video, and add what they
    find among the video tokens alone, by a gate g for each head, zero at first:

        o = softmax(q [k_latent, k_text]ᵀ) [v_latent, v_text] + g·softmax(q k_videoᵀ) v_video

    (arXiv 2308.06721, gated as in 2204.14198). So a network of text alone that is given video goes
    on as the function it was, and g, whose gradient is not zero, lets the video in. One softmax
    over all tokens cannot start so: a token has its share whatever its value, and a bias that
    made the share vanish would make its gradient vanish, too.

    Attributes:
        recompute: Keep only the inputs for the backward pass; see `mfmjt.model.recompute`.
    """

    recompute = False

    def __init__(
        self, dim: int, num_heads: int, hidden: int, last: bool, video: VideoMode = "joint"
    ) -> None:
        super().__init__()
        self.latent_block = Block(dim, num_heads, hidden, kernel_size=3)
        self.clip_block = (
            None if video == "none" else Block(dim, num_heads, hidden, kernel_size=3, pre_only=last)
        )
        self.text_block = Block(dim, num_heads, hidden, kernel_size=1, pre_only=last)
        self.video_gate = nn.Parameter(torch.zeros(num_heads)) if video == "gated" else None

    def together(self) -> Blocks:
        """Return the blocks of all streams as what runs them."""
        streams = (self.latent_block, self.clip_block, self.text_block)
        return Blocks(*(block for block in streams if block is not None), gate=self.video_gate)

    @recomputable
    def forward(self, *args: Any) -> tuple[Pending, ...]:
        """Run attention over all streams; arguments and results are those of `Blocks`."""
        return self.together()(*args)


class Blocks:
    """The blocks of streams that attend to one another, one block for each stream.

    The methods `modulate`, `project`, `out` and `feed_forward` apply the weights, and `normalize`
    takes what the last two return; a subclass that holds weights in another form replaces them.

    Args:
        blocks: Those whose streams go on first, then `pre_only` ones.
        gate: (heads,), what weighs attention to the second stream alone, see `JointBlock`; None
            where it is among the others.
    """

    def __init__(self, *blocks: Block, gate: Tensor | None = None) -> None:
        self.blocks, self.gate = blocks, gate
        self.ongoing = [block for block in blocks if block.parts == 6]

    def __call__(
        self,
        streams: Sequence[Pending],
        conditions: Sequence[FrameCondition],
        ropes: Sequence[Tensor | None],
    ) -> tuple[Pending, ...]:
        """Run the blocks.

        Args:
            streams: For each block its stream.
            conditions: What modulates each stream.
            ropes: Rotary table of each stream, (N, D/2, 2), or None.

        Returns:
            The streams that go on, the first ones: not those of `pre_only` blocks.
        """
        modulations = self.modulations(conditions)
        xs, ys = self.normalize(streams, modulations, conditions)
        q, k, v = self.project(ys, ropes)
        count = len(self.ongoing)
        attended = self.attend(tuple(q[:count]), tuple(k), tuple(v))
        hs = self.out([heads.flatten(2) for heads in attended])
        gates = [parts[2] for parts in modulations[:count]]
        streams = [Pending(*stream) for stream in zip(xs[:count], hs, gates, strict=True)]
        second = [parts[3:] for parts in modulations[:count]]
        xs, ys = self.normalize(streams, second, conditions[:count])
        gates = [parts[5] for parts in modulations[:count]]
        hs = self.feed_forward(ys)
        return tuple(Pending(*stream) for stream in zip(xs, hs, gates, strict=True))

    def modulations(self, conditions: Sequence[FrameCondition]) -> list[tuple[Tensor, ...]]:
        """Return for each stream `Block.parts` parts, (B, S, D) each, of its condition's rows."""
        rows = self.modulate([condition.rows for condition in conditions])
        return [
            parts.chunk(block.parts, dim=-1) for block, parts in zip(self.blocks, rows, strict=True)
        ]

    def modulate(self, rows: Sequence[Tensor]) -> Sequence[Tensor]:
        """Map conditions (B, S, D) to all parts of the modulations, (B, S, parts·D)."""
        return layer([block.adaLN_modulation[1] for block in self.blocks], rows)

    def normalize(self, *args: Any) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Add up, normalize and modulate, as the function of that name."""
        return normalize(*args)

    def project(
        self, ys: Sequence[Tensor], ropes: Sequence[Tensor | None]
    ) -> Sequence[Sequence[Tensor]]:
        """Return q, k and v of all streams (B, N, heads, head_dim); q and k normed and rotated."""
        attns = [block.attn for block in self.blocks]
        qkvs = layer([attn.qkv for attn in attns], ys)
        return qk_norm_rope(
            tuple([qkv.unflatten(-1, (3, attns[0].num_heads, -1)) for qkv in qkvs]),
            tuple([attn.q_norm.weight for attn in attns]),
            tuple([attn.k_norm.weight for attn in attns]),
            tuple(ropes),
        )

    def attend(
        self, q: tuple[Tensor, ...], k: tuple[Tensor, ...], v: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Return what the queries of the streams that go on find; (B, N, heads, head_dim) each."""
        if self.gate is None:
            return joint_attention(q, k, v)
        found = joint_attention(q, (k[0], *k[2:]), (v[0], *v[2:]))
        of_video = joint_attention(q, k[1:2], v[1:2])
        gate = self.gate.to(of_video[0].dtype)[:, None]
        return tuple(x + gate * y for x, y in zip(found, of_video, strict=True))

    def out(self, xs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Apply the output layers of attention, (B, N, D) to (B, N, D)."""
        return layer([block.linear1 for block in self.ongoing], xs)

    def feed_forward(self, xs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Apply the SwiGLUs, (B, N, D) to (B, N, D)."""
        return feed_forward([block.ffn for block in self.ongoing], xs)


def run(
    blocks: Iterable[Any],
    streams: Sequence[Pending],
    conditions: Sequence[FrameCondition],
    ropes: Sequence[Tensor | None],
) -> Pending:
    """Run blocks one after the other, each on the streams that are left; return the first stream.

    A block is a module or `Blocks`, whose arguments the others are.
    """
    for block in blocks:
        count = len(streams)
        streams = block(streams, conditions[:count], ropes[:count])
    return streams[0]


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
        """(B, N, D) to (B, N, C); the condition's `row_of` is for the gate of the last block."""
        modulation = self.adaLN_modulation[1](condition.rows).chunk(2, dim=-1)
        _, (y,) = normalize((stream,), (modulation,), (condition,))
        return self.conv(y)
