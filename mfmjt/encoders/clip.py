"""CLIP's two towers as MMAudio uses them: ViT-H/14 for frames, the text tower for words.

Radford et al., "CLIP", 2021, arXiv:2103.00020, with quick-GELU, in open_clip's parameter names.
Frames give the pooled and projected embedding; text gives the last layer's states of all 77
tokens, neither pooled nor projected. Both are scaled to unit length.
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

__all__ = ["CLIP", "CLIPConfig"]


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a `CLIP`; the defaults are those of ViT-H-14-378-quickgelu.

    Attributes:
        embed_dim: Width of the joint space.
        image_size: Side of the frames that the position embedding was made for, in pixels.
        patch: Side of a patch in pixels.
        image_dim: Width of the vision tower.
        image_depth: Its blocks.
        image_heads: Its attention heads.
        text_dim: Width of the text tower.
        text_depth: Its blocks.
        text_heads: Its attention heads.
        context: Tokens of a text.
        vocabulary: Number of different tokens; the last one ends a text.
    """

    embed_dim: int = 1024
    image_size: int = 378
    patch: int = 14
    image_dim: int = 1280
    image_depth: int = 32
    image_heads: int = 16
    text_dim: int = 1024
    text_depth: int = 24
    text_heads: int = 16
    context: int = 77
    vocabulary: int = 49408

    @property
    def grid(self) -> int:
        """Patches along a side of a frame."""
        return self.image_size // self.patch


class _MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.c_proj = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = _MLP(dim)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class _Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(dim, heads) for _ in range(depth))

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        for block in self.resblocks:
            x = block(x, causal)
        return x


class _Vision(nn.Module):
    def __init__(self, c: CLIPConfig) -> None:
        super().__init__()
        self.grid = c.grid
        scale = c.image_dim**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(c.image_dim))
        self.positional_embedding = nn.Parameter(scale * torch.randn(c.grid**2 + 1, c.image_dim))
        self.proj = nn.Parameter(scale * torch.randn(c.image_dim, c.embed_dim))
        self.conv1 = nn.Conv2d(3, c.image_dim, c.patch, stride=c.patch, bias=False)
        self.ln_pre = nn.LayerNorm(c.image_dim)
        self.transformer = _Transformer(c.image_dim, c.image_depth, c.image_heads)
        self.ln_post = nn.LayerNorm(c.image_dim)

    def forward(self, frames: Tensor) -> Tensor:
        x = self.conv1(frames).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    """CLIP's vision and text towers.

    Args:
        config: Sizes; the default is ViT-H-14-378-quickgelu.

    Attributes:
        config: Sizes.
        notes: One line each on what was odd about the file that it was read from.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, config: CLIPConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or CLIPConfig()
        self.visual = _Vision(c)
        self.token_embedding = nn.Embedding(c.vocabulary, c.text_dim)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(c.context, c.text_dim))
        self.transformer = _Transformer(c.text_dim, c.text_depth, c.text_heads)
        self.ln_final = nn.LayerNorm(c.text_dim)

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Tensor], config: CLIPConfig | None = None
    ) -> CLIP:
        """Return the towers of an open_clip state dict, in float32.

        Left aside are `text_projection`, `logit_scale` and `logit_bias`, which serve to compare
        images with texts, and `attn_mask`, which is computed.

        Args:
            state_dict: Names and shapes as in open_clip's `CLIP`, such as in
                `open_clip_pytorch_model.bin` of apple/DFN5B-CLIP-ViT-H-14-384, or a checkpoint
                with these inside.
            config: Sizes; the default is that of this file.

        Raises:
            InputError: Entries are missing, unexpected or of another shape; the first are named.
        """
        what = "open_clip's CLIP ViT-H/14" if config is None else "open_clip's CLIP of these sizes"
        state, notes = weights_in(state_dict, "visual.conv1.weight", what)
        with torch.device("meta"):
            clip = cls(config)
        aside = {"text_projection", "logit_scale", "logit_bias", "attn_mask"}
        load_published(clip, state, what, aside.__contains__)
        clip.notes = notes
        return clip.eval()

    def encode_image(self, frames: Tensor) -> Tensor:
        """Embeddings of frames.

        Args:
            frames: `(B, 3, H, W)`, normalized; only as many whole patches as `image_size` has are
                seen, so that 384 x 384 works where 378 is stated.

        Returns:
            `(B, embed_dim)` float32 of unit length.

        Raises:
            InputError: Another shape.
        """
        c = self.config
        if (
            frames.ndim != 4
            or frames.shape[1] != 3
            or any(side // c.patch != c.grid for side in frames.shape[2:])
        ):
            raise InputError(
                f"Frames of shape {tuple(frames.shape)} cannot be used: (batch, 3, height, width) "
                f"with {c.grid * c.patch} to {(c.grid + 1) * c.patch - 1} pixels a side is needed."
            )
        embedding = self.visual(frames.to(self.visual.proj.dtype))
        return F.normalize(embedding.float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """States of all tokens after the last norm, padding included.

        Args:
            tokens: `(B, context)` integers, as `Tokenizer` gives them.

        Returns:
            `(B, context, text_dim)` float32, each token of unit length.

        Raises:
            InputError: Another shape.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.config.context:
            raise InputError(
                f"Tokens of shape {tuple(tokens.shape)} cannot be used: (batch, "
                f"{self.config.context}) is needed."
            )
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x, causal=True))
        return F.normalize(x.float(), dim=-1)
