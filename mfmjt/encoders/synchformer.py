"""Synchformer's visual encoder: when things happen in a video, 8 features per 16 frames.

Iashin et al., "Synchformer", 2024, arXiv:2401.16423. A vision transformer with divided attention
over time and space (Bertasius et al., 2021, arXiv:2102.05095) reads tubes of 2 frames x 16 x 16
pixels; one more transformer layer with a class token sums up each time step's 196 positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.checkpoints import load_published, weights_in
from mfmjt.encoders.base import SelfAttention
from mfmjt.errors import InputError

__all__ = ["Summary", "Synchformer", "SynchformerConfig"]

_TUBE = 2
_EPS = 1e-6


@dataclass(frozen=True)
class SynchformerConfig:
    """Sizes of a `Synchformer`; the defaults are those of the published one.

    Attributes:
        dim: Width.
        depth: Blocks.
        heads: Attention heads.
        frames: Frames of a segment, even.
        size: Side of the frames in pixels.
        patch: Side of a patch in pixels.
    """

    dim: int = 768
    depth: int = 12
    heads: int = 12
    frames: int = 16
    size: int = 224
    patch: int = 16

    @property
    def steps(self) -> int:
        """Time steps of a segment."""
        return self.frames // _TUBE

    @property
    def positions(self) -> int:
        """Patches of a frame."""
        return (self.size // self.patch) ** 2


class _Tubes(nn.Module):
    """Linear embedding of tubes of 2 frames x patch x patch, which do not overlap."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        tube = (_TUBE, patch, patch)
        self.proj = nn.Conv3d(3, dim, tube, stride=tube)

    def forward(self, frames: Tensor) -> Tensor:
        """`(B, T, 3, H, W)` -> `(B, T / 2, positions, D)`."""
        # As a matrix product: many devices have no fast three-dimensional convolution.
        patch = self.proj.kernel_size[-1]
        x = frames.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).unflatten(1, (-1, _TUBE))
        x = x.permute(0, 1, 4, 6, 3, 2, 5, 7)  # (B, t, rows, columns, 3, 2, patch, patch)
        x = x.flatten(4).flatten(2, 3)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class _DividedAttention(nn.Module):
    """Tokens attend within their own position (over time) or time step (over space).

    The class token is seen by all and sees all.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, steps: int, over_time: bool) -> Tensor:
        """`x` `(B, 1 + steps * positions, D)`, class token first, then time by time."""
        batch = x.shape[0]
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (B, heads, tokens, D / heads)
        first = F.scaled_dot_product_attention(q[:, :, :1], k, v)

        def grouped(tokens: Tensor) -> Tensor:
            tokens = tokens.unflatten(2, (steps, -1))  # (B, heads, steps, positions, d)
            order = (0, 3, 1, 2, 4) if over_time else (0, 2, 1, 3, 4)
            return tokens.permute(order).flatten(0, 1)  # (B * groups, heads, members, d)

        groups = (x.shape[1] - 1) // steps if over_time else steps
        # Every group sees the class token beside its own members.
        k, v = (
            torch.cat([t[:, :, :1].repeat_interleave(groups, dim=0), grouped(t[:, :, 1:])], dim=2)
            for t in (k, v)
        )
        rest = F.scaled_dot_product_attention(grouped(q[:, :, 1:]), k, v)
        rest = rest.unflatten(0, (batch, groups))  # (B, groups, heads, members, d)
        order = (0, 2, 3, 1, 4) if over_time else (0, 2, 1, 3, 4)
        rest = rest.permute(order).flatten(2, 3)
        y = torch.cat([first, rest], dim=2).transpose(1, 2).flatten(2)
        return self.proj(y)


class _MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    """Attention over time, attention over space, MLP; each on a norm, added to its input."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, _EPS)
        self.norm2 = nn.LayerNorm(dim, _EPS)
        self.norm3 = nn.LayerNorm(dim, _EPS)
        self.attn = _DividedAttention(dim, heads)
        self.timeattn = _DividedAttention(dim, heads)
        self.mlp = _MLP(dim)

    def forward(self, x: Tensor, steps: int) -> Tensor:
        x = x + self.timeattn(self.norm3(x), steps, over_time=True)
        x = x + self.attn(self.norm1(x), steps, over_time=False)
        return x + self.mlp(self.norm2(x))


class Summary(nn.Module):
    """One pre-norm transformer layer over (class token, tokens); gives the class token."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.self_attn = SelfAttention(dim, heads)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)
        self.norm1 = nn.LayerNorm(dim, _EPS)
        self.norm2 = nn.LayerNorm(dim, _EPS)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, D)` -> `(B, D)`."""
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = (x + self.self_attn(self.norm1(x)))[:, 0]
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


class Synchformer(nn.Module):
    """The visual half of Synchformer, up to the features that MMAudio uses.

    Args:
        config: Sizes; the default is the published network.

    Attributes:
        config: Sizes.
        notes: One line each on what was odd about the file that it was read from.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, config: SynchformerConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or SynchformerConfig()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + c.positions, c.dim))
        self.temp_embed = nn.Parameter(torch.zeros(1, c.steps, c.dim))
        self.patch_embed_3d = _Tubes(c.dim, c.patch)
        self.blocks = nn.ModuleList(_Block(c.dim, c.heads) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim, _EPS)
        self.spatial_attn_agg = Summary(c.dim, c.heads)

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Tensor], config: SynchformerConfig | None = None
    ) -> Synchformer:
        """Return the encoder of a published state dict (`synchformer_state_dict.pth`), in float32.

        Entries of Synchformer's other parts are left aside, and so is `patch_embed`, the embedding
        of single frames, which the published encoder holds and does not use.

        Args:
            state_dict: Names and shapes as published, where the encoder's begin with
                `vfeat_extractor.`, or a checkpoint with these inside.
            config: Sizes; the default is the published network.

        Raises:
            InputError: Entries of the encoder are missing, unexpected or of another shape; the
                first are named.
        """
        what = "Synchformer's visual encoder"
        state, notes = weights_in(state_dict, "patch_embed_3d.proj.weight", what)
        with torch.device("meta"):
            encoder = cls(config)
        load_published(encoder, state, what, lambda name: name.startswith("patch_embed."))
        encoder.notes = notes
        return encoder.eval()

    def forward(self, frames: Tensor) -> Tensor:
        """Features of segments of 16 frames at 25 frames per second.

        Args:
            frames: `(B, S, 16, 3, 224, 224)` in [-1, 1].

        Returns:
            `(B, S, 8, 768)` float32, one feature for each two frames.

        Raises:
            InputError: Another shape.
        """
        c = self.config
        shape = (c.frames, 3, c.size, c.size)
        if frames.ndim != 6 or tuple(frames.shape[2:]) != shape or frames.numel() == 0:
            raise InputError(
                f"Frames of shape {tuple(frames.shape)} cannot be used: (batch, segments, "
                f"{', '.join(map(str, shape))}) is needed."
            )
        x = self.patch_embed_3d(frames.flatten(0, 1).to(self.cls_token.dtype))
        x = x + self.pos_embed[:, None, 1:] + self.temp_embed[:, :, None]
        first = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([first, x.flatten(1, 2)], dim=1)
        for block in self.blocks:
            x = block(x, c.steps)
        x = self.norm(x)[:, 1:].unflatten(1, (c.steps, -1)).flatten(0, 1)
        summary = self.spatial_attn_agg(x).float()
        return summary.unflatten(0, (*frames.shape[:2], c.steps))
