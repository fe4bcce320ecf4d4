"""The network: average velocity of an audio latent, given video, synchronization and text.

Layout and parameter names follow MMAudio (arXiv 2412.15322); the second time input, t − r, makes it
a MeanFlow network (arXiv 2505.13447, 2509.06389). Time runs from data (t = 0) to noise (t = 1).
Without video, with positions of text and a vector of the whole text it is MeanAudio (arXiv
2508.06098); `ModelConfig` has the differences.

Shapes:
    B: samples. A condition that is null for all of them may have 1 in its place.
    N: latent tokens, C channels each (`latent_dim`), at `latent_rate` tokens a second.
    N_video, N_sync, N_text: tokens of the conditions; N_sync is a multiple of `SYNC_SEGMENT`.
    video_dim, sync_dim, text_dim, pooled_dim: channels of the features that the encoders give.
    D: channels of all tokens inside the network (`hidden_dim`).
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor, nn

from mfmjt.errors import InputError
from mfmjt.kernels import jvp_rows
from mfmjt.model.blocks import (
    Block,
    Conv1d,
    FinalLayer,
    FrameCondition,
    JointBlock,
    Linear,
    Pending,
    SwiGLU,
    run,
)
from mfmjt.model.conditioning import (
    Conditions,
    Features,
    TimeEmbedding,
    check_batch,
    check_features,
    check_latent,
    fill_nulls,
    frame_condition,
    r_embedding,
    sinusoids,
    stream_ropes,
    times,
)
from mfmjt.model.config import SYNC_SEGMENT, ModelConfig, config_for
from mfmjt.model.prepared import PreparedStep

__all__ = ["MFMJT"]


class MFMJT(nn.Module):
    """Average velocity u(z, r, t) of MeanFlow, with multimodal conditions.

    A fresh network gives exactly zero, and a network converted from flow matching gives the
    instantaneous velocity for every r, until the second embedding is trained.

    Args:
        config: Sizes; see `MFMJT.from_config` for the named ones.

    Attributes:
        notes: What was unusual about the file that it was read from, one line each.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim, hidden, heads = config.hidden_dim, config.mlp_hidden, config.num_heads
        activation = nn.SiLU if config.v2 else nn.SELU
        between = [nn.SiLU()] if config.v2 else []
        self.audio_input_proj = nn.Sequential(
            Conv1d(config.latent_dim, dim, 7), activation(), SwiGLU(dim, hidden, 7)
        )
        if config.takes_video:
            self.clip_input_proj = nn.Sequential(
                Linear(config.video_dim, dim), *between, SwiGLU(dim, hidden, 3)
            )
            self.sync_input_proj = nn.Sequential(
                Conv1d(config.sync_dim, dim, 7), activation(), SwiGLU(dim, hidden, 3)
            )
        self.text_input_proj = nn.Sequential(
            Linear(config.text_dim, dim), *between, SwiGLU(dim, hidden, 1)
        )
        if config.takes_video:
            self.clip_cond_proj = Linear(dim, dim)
        if config.pooled_dim is None:
            self.text_cond_proj: nn.Module = Linear(dim, dim)
            self.global_cond_mlp = SwiGLU(dim, hidden, 1)
        else:
            self.text_cond_proj = nn.Sequential(
                Linear(config.pooled_dim, dim), SwiGLU(dim, hidden, 1)
            )

        frequencies, period = (dim, 1.0) if config.v2 else (256, 10_000.0)
        self.t_embed = TimeEmbedding(dim, frequencies, max_period=period / config.time_scale)
        self.r_embed = r_embedding(dim, config.time_scale)

        self.joint_blocks = nn.ModuleList(
            JointBlock(dim, heads, hidden, i == config.joint_depth - 1, config.video)
            for i in range(config.joint_depth)
        )
        self.fused_blocks = nn.ModuleList(
            Block(dim, heads, hidden, kernel_size=3) for _ in range(config.fused_depth)
        )
        self.final_layer = FinalLayer(dim, config.latent_dim)

        def constant(*shape: int, fill: float = 0.0, trained: bool = False) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, fill), requires_grad=trained)

        if config.positions == "learned":
            self.pos_emb = nn.Parameter(0.02 * torch.randn(config.latent_length, dim))
        if config.takes_video:
            self.sync_pos_emb = constant(1, 1, SYNC_SEGMENT, config.sync_dim, trained=True)
        self.latent_mean = constant(1, 1, config.latent_dim)
        self.latent_std = constant(1, 1, config.latent_dim, fill=1.0)
        self.empty_string_feat = constant(config.text_length, config.text_dim)
        if config.pooled_dim is not None:
            self.empty_string_feat_c = constant(config.pooled_dim)
        if config.takes_video:
            self.empty_clip_feat = constant(1, config.video_dim, trained=True)
            self.empty_sync_feat = constant(1, config.sync_dim, trained=True)
        if config.video == "gated":
            self._shut()

    def _shut(self) -> None:
        """Set to zero what lets video and synchronization in, beside the gates of attention."""
        of_sync = self.sync_input_proj[-1].get_parameter("w2.weight")
        for parameter in (*self.clip_cond_proj.parameters(), of_sync):
            nn.init.zeros_(parameter)

    @classmethod
    def from_config(cls, name: str, **overrides: Any) -> MFMJT:
        """Make a fresh network of a named configuration, some of its fields replaced.

        Raises:
            InputError: Unknown name or field.
        """
        return cls(config_for(name, **overrides))

    @staticmethod
    def load(path: str | os.PathLike[str], as_stored: bool = False) -> MFMJT:
        """Read a network written by `save`; see `mfmjt.model.load`."""
        from mfmjt.model.checkpoint import load

        return load(path, as_stored)

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write parameters and configuration to one safetensors file; see `mfmjt.model.save`."""
        from mfmjt.model.checkpoint import save

        save(self, path, dtype)

    def with_video(self, **overrides: Any) -> MFMJT:
        """Return this network of text with video and synchronization beside it, gated.

        What is new is fresh, and zero where it meets what was there, so that u is the same for any
        video until it is trained; see `mfmjt.model.blocks.JointBlock`. All weights are copies.

        Args:
            **overrides: Fields of `ModelConfig`, such as `video_dim`.

        Raises:
            InputError: It has video.
        """
        if self.config.takes_video:
            raise InputError(f"This {self.config.name} has video. Train it as it is.")
        net = MFMJT(dataclasses.replace(self.config, video="gated", **overrides))
        net.load_state_dict(self.state_dict(), strict=False)
        net.notes = self.notes
        return net

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters, in which the network computes."""
        return self.final_layer.conv.weight.dtype

    def recompute_blocks(self, on: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass, and compute their inside again."""
        for block in (*self.joint_blocks, *self.fused_blocks):
            block.recompute = on

    def normalize(self, latent: Tensor) -> Tensor:
        """Map the codec's latents (B, N, C) to the network's: (latent − mean) / std."""
        return (latent - self.latent_mean) / self.latent_std

    def unnormalize(self, latent: Tensor) -> Tensor:
        """Map the network's latents (B, N, C) to the codec's: the inverse of `normalize`."""
        return latent * self.latent_std + self.latent_mean

    def conditions(
        self,
        video: Tensor | None = None,
        sync: Tensor | None = None,
        text: Tensor | None = None,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        latent_length: int | None = None,
        pooled: Tensor | None = None,
    ) -> Conditions:
        """Encode the conditions once, for any number of calls with `cond=`.

        Args:
            video: Video features (B, N_video, video_dim), or None for the null tokens.
            sync: Synchronization features (B, N_sync, sync_dim), N_sync a multiple of 8, or None.
            text: Text features (B, N_text, text_dim), or None.
            video_mask: (B,) bool; samples that are False get null video and synchronization.
            text_mask: (B,) bool; samples that are False get null text, and null features of it.
            latent_length: Latent tokens to come, which sets the lengths of null video and
                synchronization; the configuration's by default.
            pooled: Features of the whole text (B, pooled_dim), or None for null ones; for networks
                that do not pool the text themselves.

        Raises:
            InputError: A feature has the wrong shape, or the network takes no such feature.
        """
        given = self.features(video, sync, text, video_mask, text_mask, latent_length, pooled)
        tokens = self.text_input_proj(given.text)
        if given.video is None or given.sync is None:
            return Conditions(None, None, tokens, self._pool(None, tokens, given.pooled))
        segments = given.sync.unflatten(1, (-1, SYNC_SEGMENT)) + self.sync_pos_emb
        frames = self.clip_input_proj(given.video)
        return Conditions(
            frames,
            self.sync_input_proj(segments.flatten(1, 2)),
            tokens,
            self._pool(frames, tokens, given.pooled),
        )

    def _pool(self, video: Tensor | None, text: Tensor, pooled: Tensor | None) -> Tensor:
        """Return the global condition (B, D) of projected tokens and of the whole text."""
        of_text = self.text_cond_proj(text.mean(1) if pooled is None else pooled[:, 0])
        if video is not None:
            of_text = self.clip_cond_proj(video.mean(1)) + of_text
        return self.global_cond_mlp(of_text) if pooled is None else of_text

    def features(
        self,
        video: Tensor | None = None,
        sync: Tensor | None = None,
        text: Tensor | None = None,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        latent_length: int | None = None,
        pooled: Tensor | None = None,
    ) -> Features:
        """Return the features, null where missing or masked.

        Arguments and errors are those of `conditions`.
        """
        config, dtype = self.config, self.dtype
        check_features(config, video, sync, text, pooled, video_mask, text_mask)
        tokens = fill_nulls(text, text_mask, self.empty_string_feat, config.text_length, dtype)
        whole = None
        if config.pooled_dim is not None:
            pooled = None if pooled is None else pooled[:, None]
            whole = fill_nulls(pooled, text_mask, self.empty_string_feat_c[None], 1, dtype)
        if not config.takes_video:
            return Features(None, None, tokens, whole)
        video_length, sync_length = config.lengths(latent_length or config.latent_length)
        return Features(
            fill_nulls(video, video_mask, self.empty_clip_feat, video_length, dtype),
            fill_nulls(sync, video_mask, self.empty_sync_feat, sync_length, dtype),
            tokens,
            whole,
        )

    def frozen(self, r: float = 0.0, t: float = 1.0) -> PreparedStep:
        """Prepare the network for one (r, t), as generation in one step does.

        Raises:
            InputError: It adds a table of positions to its tokens.
        """
        if self.config.positions in ("sinusoidal", "learned"):
            raise InputError(
                f"A network with {self.config.positions} positions cannot be prepared for one "
                "step. Call it as it is, or train one with rotary positions."
            )
        return PreparedStep(self, r, t)

    def forward(
        self,
        z: Tensor,
        r: Tensor | float,
        t: Tensor | float,
        video: Tensor | None = None,
        sync: Tensor | None = None,
        text: Tensor | None = None,
        pooled: Tensor | None = None,
        *,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        cond: Conditions | None = None,
    ) -> Tensor:
        """Predict the average velocity u from t back to r: z_r = z_t − (t − r)·u.

        Args:
            z: Noisy latent (B, N, C), any N.
            r: End of the interval, (B,) or one number, 0 ≤ r ≤ t.
            t: Begin of the interval, (B,) or one number; 0 is data, 1 noise. At r = t, u is the
                velocity e − x.
            video: See `conditions`.
            sync: See `conditions`.
            text: See `conditions`.
            pooled: See `conditions`.
            video_mask: See `conditions`.
            text_mask: See `conditions`.
            cond: Result of `conditions`, instead of the six arguments before.

        Returns:
            (B, N, C), in the dtype of z.

        Raises:
            InputError: A shape does not fit.
        """
        check_latent(z, self.config)
        batch, length = z.shape[:2]
        r, t = times("r", r, z), times("t", t, z)
        if cond is None:
            cond = self.conditions(video, sync, text, video_mask, text_mask, length, pooled)
        elif any(x is not None for x in (video, sync, text, pooled, video_mask, text_mask)):
            raise InputError("cond comes with features or masks: it holds them already. Give one.")
        check_batch(cond, batch)

        shared = (self.embed(r, t) + cond.pooled)[:, None].to(self.dtype)  # (B, 1, D)
        whole = FrameCondition(nn.functional.silu(shared))
        frames = whole if cond.sync is None else frame_condition(shared, cond.sync, length)

        tokens = [x.expand(batch, -1, -1) for x in (cond.video, cond.text) if x is not None]
        streams = (self.audio_input_proj(z.to(self.dtype)), *tokens)
        if self.config.positions in ("sinusoidal", "learned"):
            timed = 1 if cond.video is None else 2  # text has no time
            positions = (self.positions(x.shape[1], length / x.shape[1]) for x in streams[:timed])
            placed = (x + at for x, at in zip(streams, positions, strict=False))
            streams = (*placed, *streams[timed:])
        latent = run(
            (*self.joint_blocks, *self.fused_blocks),
            [Pending(x) for x in streams],
            (frames, *[whole] * len(tokens)),
            stream_ropes(self.config, length, cond.video, cond.text),
        )
        u = self.final_layer(latent, whole._replace(row_of=frames.row_of)).to(z.dtype)
        return -u if self.config.towards_data else u

    def positions(self, tokens: int, scaling: float) -> Tensor:
        """Return what is added to tokens (N, D) that are `scaling` latents apart."""
        if self.config.positions == "sinusoidal":
            table = sinusoids(tokens, self.config.hidden_dim, scaling, self.latent_mean.device)
            return table.to(self.dtype)
        at = (torch.arange(tokens, device=self.pos_emb.device) * scaling).long()
        return self.pos_emb[at.clamp(max=len(self.pos_emb) - 1)]

    def embed(self, r: Tensor, t: Tensor) -> Tensor:
        """Return the embedding (B, D) of intervals from t back to r, (B,) each."""
        # A copy, as of t itself torch.compile takes no view in forward mode.
        begin = 1 - t if self.config.towards_data else t.clone()
        return self.t_embed(begin) + self.r_embed(r if self.config.second_time == "r" else t - r)

    def jvp_rows(
        self, z: Tensor, r: Tensor, t: Tensor, z_dot: Tensor, **conditions: Any
    ) -> tuple[Tensor, Tensor]:
        """Evaluate u of all samples, and du/dt of the first along (z_dot, 0, 1) without a graph.

        One evaluation and a tangent, instead of two evaluations; see `mfmjt.kernels.jvp_rows`.

        Args:
            z: Noisy latents (B, N, C).
            r: Ends of the intervals (B,).
            t: Begins of the intervals (B,).
            z_dot: dz/dt of the first M samples (M, N, C), 0 < M < B.
            conditions: As for `forward`, all with B samples or one.

        Returns:
            u (B, N, C) and du/dt (M, N, C).
        """
        return jvp_rows(
            lambda z, t, r, conditions: self(z, r, t, **conditions),
            (z, t, r, conditions),
            (z_dot, torch.ones_like(t[: z_dot.shape[0]]), None, None),
        )

    def extra_repr(self) -> str:
        """Return the configuration in one line."""
        fields = dataclasses.asdict(self.config)
        return ", ".join(f"{name}={value!r}" for name, value in fields.items())
