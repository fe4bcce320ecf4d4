"""The network: average velocity of an audio latent, given video, synchronisation and text.

Layout and parameter names follow MMAudio (arXiv 2412.15322); the second time input, t − r, makes it
a MeanFlow network (arXiv 2505.13447, 2509.06389). Time runs from data (t = 0) to noise (t = 1).
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

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
)
from mfmjt.model.conditioning import (
    Conditions,
    TimeEmbedding,
    nearest_rows,
    r_embedding,
    rope_table,
)
from mfmjt.model.config import MAX_TOKENS, SYNC_SEGMENT, ModelConfig, config_for

if TYPE_CHECKING:
    from mfmjt.model.prepared import Frozen

__all__ = ["MFMJT"]


class MFMJT(nn.Module):
    """Average velocity u(z, r, t) of MeanFlow, with multimodal conditions.

    A fresh network gives exactly zero, and a network converted from flow matching gives the
    instantaneous velocity for every r, until the embedding of t − r is trained.

    Args:
        config: Sizes; see `MFMJT.from_config` for the named ones.

    Attributes:
        notes: One line each on what was odd about the file that it was read from.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim, hidden = config.hidden_dim, config.mlp_hidden

        self.audio_input_proj = nn.Sequential(
            Conv1d(config.latent_dim, dim, 7),
            nn.SiLU() if config.v2 else nn.SELU(),
            SwiGLU(dim, hidden, 7),
        )
        between = [nn.SiLU()] if config.v2 else []
        self.clip_input_proj = nn.Sequential(
            Linear(config.video_dim, dim), *between, SwiGLU(dim, hidden, 3)
        )
        self.sync_input_proj = nn.Sequential(
            Conv1d(config.sync_dim, dim, 7),
            nn.SiLU() if config.v2 else nn.SELU(),
            SwiGLU(dim, hidden, 3),
        )
        self.text_input_proj = nn.Sequential(
            Linear(config.text_dim, dim), *between, SwiGLU(dim, hidden, 1)
        )
        self.clip_cond_proj = Linear(dim, dim)
        self.text_cond_proj = Linear(dim, dim)
        self.global_cond_mlp = SwiGLU(dim, hidden, 1)

        self.t_embed = (
            TimeEmbedding(dim, dim, max_period=1.0)
            if config.v2
            else TimeEmbedding(dim, 256, max_period=10_000.0)
        )
        self.r_embed = r_embedding(dim)

        heads = config.num_heads
        self.joint_blocks = nn.ModuleList(
            JointBlock(dim, heads, hidden, last=i == config.joint_depth - 1)
            for i in range(config.joint_depth)
        )
        self.fused_blocks = nn.ModuleList(
            Block(dim, heads, hidden, kernel_size=3) for _ in range(config.fused_depth)
        )
        self.final_layer = FinalLayer(dim, config.latent_dim)

        def constant(*shape: int, fill: float = 0.0, trained: bool = False) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, fill), requires_grad=trained)

        self.sync_pos_emb = constant(1, 1, SYNC_SEGMENT, config.sync_dim, trained=True)
        self.latent_mean = constant(1, 1, config.latent_dim)
        self.latent_std = constant(1, 1, config.latent_dim, fill=1.0)
        self.empty_string_feat = constant(config.text_length, config.text_dim)
        self.empty_clip_feat = constant(1, config.video_dim, trained=True)
        self.empty_sync_feat = constant(1, config.sync_dim, trained=True)
        for block in self.modules():
            if isinstance(block, (Block, FinalLayer)):
                nn.init.zeros_(block.adaLN_modulation.get_parameter("1.weight"))
        for parameter in self.final_layer.conv.parameters():
            nn.init.zeros_(parameter)

    @classmethod
    def from_config(cls, name: str, **overrides: Any) -> MFMJT:
        """A fresh network of a named configuration, some of its fields replaced.

        Raises:
            InputError: Unknown name or field.
        """
        return cls(config_for(name, **overrides))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> MFMJT:
        """Read a network written by `save`; see `mfmjt.model.load`."""
        from mfmjt.model.checkpoint import load

        return load(path)

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write parameters and configuration to one safetensors file; see `mfmjt.model.save`."""
        from mfmjt.model.checkpoint import save

        save(self, path, dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters, in which the network computes."""
        return self.final_layer.conv.weight.dtype

    def recompute_blocks(self, on: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass, and compute their inside again."""
        for block in (*self.joint_blocks, *self.fused_blocks):
            block.recompute = on

    def normalize(self, latent: Tensor) -> Tensor:
        """Autoencoder latents (B, N, C) to the network's space: (latent − mean) / std."""
        return (latent - self.latent_mean) / self.latent_std

    def unnormalize(self, latent: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        return latent * self.latent_std + self.latent_mean

    def conditions(
        self,
        video: Tensor | None = None,
        sync: Tensor | None = None,
        text: Tensor | None = None,
        *,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        latent_length: int | None = None,
    ) -> Conditions:
        """Encode the conditions once, for any number of calls with `cond=`.

        Args:
            video: Video features (B, N_video, video_dim), or None for the null tokens.
            sync: Synchronisation features (B, N_sync, sync_dim), N_sync a multiple of 8, or None.
            text: Text features (B, N_text, text_dim), or None.
            video_mask: (B,) bool; samples that are False get null video and synchronisation.
            text_mask: (B,) bool; samples that are False get null text.
            latent_length: Latent tokens to come, which sets the lengths of null video and
                synchronisation; the configuration's by default.

        Raises:
            InputError: A feature has the wrong shape.
        """
        video, sync, text = self.features(
            video,
            sync,
            text,
            video_mask=video_mask,
            text_mask=text_mask,
            latent_length=latent_length,
        )
        sync = (sync.unflatten(1, (-1, SYNC_SEGMENT)) + self.sync_pos_emb).flatten(1, 2)
        video, sync, text = (
            self.clip_input_proj(video),
            self.sync_input_proj(sync),
            self.text_input_proj(text),
        )
        pooled = self.clip_cond_proj(video.mean(1)) + self.text_cond_proj(text.mean(1))
        return Conditions(video, sync, text, self.global_cond_mlp(pooled))

    def features(
        self,
        video: Tensor | None = None,
        sync: Tensor | None = None,
        text: Tensor | None = None,
        *,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        latent_length: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Video, synchronisation and text as the network reads them, null where missing or masked.

        Arguments and errors are those of `conditions`.
        """
        config = self.config
        video_length, sync_length = config.lengths(latent_length or config.latent_length)
        video = self._features(
            "video", video, self.empty_clip_feat, config.video_dim, video_length, video_mask
        )
        sync = self._features(
            "sync", sync, self.empty_sync_feat, config.sync_dim, sync_length, video_mask
        )
        text = self._features(
            "text", text, self.empty_string_feat, config.text_dim, config.text_length, text_mask
        )
        batches = {"video": video.shape[0], "sync": sync.shape[0], "text": text.shape[0]}
        if len(set(batches.values()) - {1}) > 1:
            had = ", ".join(f"{name} {count}" for name, count in batches.items())
            raise InputError(
                f"The conditions differ in samples: {had}. Give one of each for every sample."
            )
        if sync.shape[1] % SYNC_SEGMENT:
            raise InputError(
                f"sync has {sync.shape[1]} features: they come in segments of {SYNC_SEGMENT}. "
                "Cut or extend them to whole segments."
            )
        return video, sync, text

    def _features(
        self,
        name: str,
        given: Tensor | None,
        empty: Tensor,
        dim: int,
        length: int,
        mask: Tensor | None,
    ) -> Tensor:
        """The given features, with null ones where they are missing or masked out."""
        if given is not None:
            if given.ndim != 3 or given.shape[-1] != dim:
                raise InputError(
                    f"{name} has shape {tuple(given.shape)}: {self.config.name} takes (batch, "
                    f"tokens, {dim}). Extract the features with the encoders of this network."
                )
            _check_length(name, given.shape[1])
            if mask is None:
                return given.to(self.dtype)
            if mask.shape != given.shape[:1] or mask.dtype != torch.bool:
                raise InputError(
                    f"The mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}: it needs "
                    f"one boolean for each of {given.shape[0]} samples. Give torch.bool, (batch,)."
                )
            length = given.shape[1]
        # One row serves every token, or a table one row each, its last repeated beyond the end.
        if empty.shape[0] not in (1, length):
            rows = torch.arange(length, device=empty.device).clamp_(max=empty.shape[0] - 1)
            empty = empty[rows]
        empty = empty.expand(length, dim)[None]
        if given is None or mask is None:
            return empty
        return torch.where(mask[:, None, None], given.to(self.dtype), empty)

    def frozen(self, r: float = 0.0, t: float = 1.0) -> Frozen:
        """What generation in one step evaluates; see `mfmjt.model.prepared`."""
        from mfmjt.model.prepared import Frozen

        return Frozen(self, r, t)

    def forward(
        self,
        z: Tensor,
        r: Tensor | float,
        t: Tensor | float,
        video: Tensor | None = None,
        sync: Tensor | None = None,
        text: Tensor | None = None,
        *,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        cond: Conditions | None = None,
    ) -> Tensor:
        """Average velocity from t back to r: z_r = z_t − (t − r)·u.

        Args:
            z: Noisy latent (B, N, C), any N.
            r: End of the interval, (B,) or one number, 0 ≤ r ≤ t.
            t: Its begin, (B,) or one number; 0 is data, 1 noise. u at r = t is the velocity e − x.
            video: See `conditions`.
            sync: See `conditions`.
            text: See `conditions`.
            video_mask: See `conditions`.
            text_mask: See `conditions`.
            cond: Result of `conditions`, instead of the five arguments before.

        Returns:
            (B, N, C), in the dtype of z.

        Raises:
            InputError: A shape does not fit.
        """
        config = self.config
        if z.ndim != 3 or z.shape[-1] != config.latent_dim:
            raise InputError(
                f"z has shape {tuple(z.shape)}: {config.name} takes (batch, tokens, "
                f"{config.latent_dim}), channels last. Transpose it or choose another network."
            )
        batch, length = z.shape[0], z.shape[1]
        _check_length("z", length)
        r, t = _time("r", r, z), _time("t", t, z)
        if cond is None:
            cond = self.conditions(
                video,
                sync,
                text,
                video_mask=video_mask,
                text_mask=text_mask,
                latent_length=length,
            )
        elif any(given is not None for given in (video, sync, text, video_mask, text_mask)):
            raise InputError("cond comes with features or masks: it holds them already. Give one.")
        for name, part in zip(cond._fields, cond, strict=True):
            if part.shape[0] not in (1, batch):
                raise InputError(
                    f"{name} has {part.shape[0]} samples and z has {batch}: they must agree. "
                    "Give one condition for each sample."
                )

        # The published network counts time towards the data and predicts the opposite velocity.
        time = self.t_embed(1 - t) + self.r_embed(t - r)
        shared = (time + cond.pooled)[:, None].to(self.dtype)  # (B, 1, D)
        whole = FrameCondition(nn.functional.silu(shared))
        frames = self._frame_condition(shared, cond.sync, length)

        device = z.device
        video_length = cond.video.shape[1]
        latent_rope = rope_table(length, config.head_dim, 1.0, device)
        video_rope = rope_table(video_length, config.head_dim, length / video_length, device)

        latent = Pending(self.audio_input_proj(z.to(self.dtype)))
        streams = (
            latent,
            Pending(cond.video.expand(batch, -1, -1)),
            Pending(cond.text.expand(batch, -1, -1)),
        )
        for joint in self.joint_blocks:
            streams = joint(streams, (frames, whole, whole), (latent_rope, video_rope, None))
        latent = streams[0]
        for block in self.fused_blocks:
            latent = block(latent, frames, latent_rope)
        return -self.final_layer(latent, whole).to(z.dtype)

    def jvp_rows(
        self, z: Tensor, r: Tensor, t: Tensor, z_dot: Tensor, **conditions: Any
    ) -> tuple[Tensor, Tensor]:
        """Velocity u of all samples, and du/dt of the first along (z_dot, 0, 1) without a graph.

        One evaluation and a tangent, instead of two evaluations; see `mfmjt.kernels.jvp_rows`.

        Args:
            z: Noisy latents (B, N, C).
            r: Ends of the intervals (B,).
            t: Their begins (B,).
            z_dot: dz/dt of the first M samples (M, N, C), 0 < M < B.
            conditions: As for `forward`, all with B samples or one.

        Returns:
            u (B, N, C) and du/dt (M, N, C).
        """

        def u(z: Tensor, t: Tensor, r: Tensor, conditions: dict[str, Any]) -> Tensor:
            return self(z, r, t, **conditions)

        tangents = (z_dot, torch.ones_like(t[: z_dot.shape[0]]), None, None)
        return jvp_rows(u, (z, t, r, conditions), tangents)

    @staticmethod
    def _frame_condition(shared: Tensor, sync: Tensor, length: int) -> FrameCondition:
        """Silu of global plus synchronisation condition, resampled to the latent's frames."""
        index = nearest_rows(sync.shape[1], length, sync.device)
        if sync.shape[1] >= length:
            # No fewer rows than tokens: pick the rows first, and only the needed ones.
            sync, rows = sync.index_select(1, index), None
        else:
            rows = index
        return FrameCondition(nn.functional.silu(shared + sync), rows)

    def extra_repr(self) -> str:
        """The configuration, in one line."""
        fields = dataclasses.asdict(self.config)
        return ", ".join(f"{name}={value!r}" for name, value in fields.items())


def _check_length(name: str, length: int) -> None:
    if not 1 <= length <= MAX_TOKENS:
        raise InputError(
            f"{name} has {length} tokens: 1 to {MAX_TOKENS} are accepted. "
            "Cut longer inputs into windows."
        )


def _time(name: str, value: Tensor | float, z: Tensor) -> Tensor:
    """A time of every sample, (B,); never in less than float32."""
    if not isinstance(value, Tensor):
        value = torch.full((z.shape[0],), value, dtype=torch.float32, device=z.device)
    if value.ndim == 0:
        value = value.expand(z.shape[0])
    if value.shape != z.shape[:1]:
        raise InputError(
            f"{name} has shape {tuple(value.shape)}: z has {z.shape[0]} samples. "
            "Give one time for each sample, (batch,), or one number."
        )
    return value.to(torch.promote_types(value.dtype, torch.float32))
