"""The sizes of the published networks and of the small one that ships."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from mfmjt.errors import InputError, some

__all__ = [
    "CONFIGS",
    "MAX_TOKENS",
    "SYNC_RATE",
    "SYNC_SEGMENT",
    "VIDEO_RATE",
    "ModelConfig",
    "Positions",
    "SecondTime",
    "VideoMode",
    "config_for",
]

VideoMode = Literal["joint", "gated", "none"]
SecondTime = Literal["t - r", "r"]
Positions = Literal["rotary", "none", "sinusoidal", "learned"]

VIDEO_RATE = 8.0
"""Video tokens per second."""
SYNC_RATE = 25.0
"""Frames per second that synchronization features are made of."""
SYNC_SEGMENT = 8
"""Synchronization features in a segment; all segments share a learned position table."""
MAX_TOKENS = 20_000
"""Longest sequence accepted; a longer one is a mistake, such as samples given for tokens."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the network's parameters and its default lengths.

    Attributes:
        name: Name of the configuration.
        latent_dim: Channels C of the audio latent.
        hidden_dim: Width D of the token streams.
        num_heads: Attention heads; D / heads channels each.
        depth: All blocks, joint and audio-only.
        fused_depth: Audio-only blocks; the joint ones come first.
        latent_length: Latent tokens of the reference duration (8 s).
        video_length: Video tokens of the reference duration.
        sync_length: Synchronization features of the reference duration, a multiple of 8.
        text_length: Text tokens.
        video_dim: Width of the video features.
        sync_dim: Width of the synchronization features.
        text_dim: Width of the text features.
        mlp_ratio: Feed-forward width over D, before the 2/3 of a gated unit and rounding.
        v2: The second MMAudio layout: SiLU in the input projections, other time frequencies.
        video: What video is to the network, and with it synchronization: "joint" tokens that all
            attend to, as in MMAudio; "gated", attended to apart from the others, see
            `mfmjt.model.blocks.JointBlock`; or "none", as in MeanAudio, which reads text alone.
        positions: How latent and video tokens know their time: "rotary" as in the published
            networks; "none"; or a table added to them, of sinusoids or of "learned" rows, one for
            each latent of the reference duration, the last for all that is later. A network with a
            table cannot be prepared for one step.
        text_rope: Text tokens have positions, 0, 1, ..., as MeanAudio's.
        pooled_dim: Width of the vector of a whole text that is given beside its tokens, as
            MeanAudio's of CLAP; None pools the projected tokens, as MMAudio does.
        time_scale: Factor on times where they are embedded: 1 here and in MMAudio; with 1000, as in
            many diffusion networks, a tangent along time is dominated by the fastest sinusoids.
        second_time: What the second embedding is of: "t - r", or "r" as in MeanAudio.
        towards_data: The weights count time from noise to data and predict the velocity in that
            direction, as MMAudio's; the network turns both around. MeanAudio's are as they are.
        latent_rate: Latent tokens per second, Hz.
        sample_rate: Audio samples per second, Hz.
    """

    name: str
    latent_dim: int
    hidden_dim: int
    num_heads: int
    depth: int
    fused_depth: int
    latent_length: int
    video_length: int
    sync_length: int
    text_length: int
    video_dim: int = 1024
    sync_dim: int = 768
    text_dim: int = 1024
    mlp_ratio: float = 4.0
    v2: bool = False
    video: VideoMode = "joint"
    positions: Positions = "rotary"
    text_rope: bool = False
    pooled_dim: int | None = None
    time_scale: float = 1.0
    second_time: SecondTime = "t - r"
    towards_data: bool = True
    latent_rate: float = 31.25
    sample_rate: int = 16_000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and not 0 < value < math.inf:
                raise InputError(f"{field.name} is {value}: it must be positive. Give another.")
        modes = {"video": VideoMode, "second_time": SecondTime, "positions": Positions}
        for name, known in modes.items():
            if getattr(self, name) not in get_args(known):
                choices = ", ".join(map(repr, get_args(known)))
                raise InputError(f"{name} is {getattr(self, name)!r}. Give one of {choices}.")
        if self.hidden_dim % (2 * self.num_heads):
            raise InputError(
                f"hidden_dim {self.hidden_dim} with num_heads {self.num_heads}: heads must divide "
                "it into even widths. Choose num_heads = hidden_dim / 64."
            )
        if self.fused_depth >= self.depth:
            raise InputError(
                f"fused_depth {self.fused_depth} of depth {self.depth}: at least one block must "
                "be joint. Lower fused_depth."
            )
        if self.sync_length % SYNC_SEGMENT:
            raise InputError(
                f"sync_length is {self.sync_length}: it must be a multiple of {SYNC_SEGMENT}. "
                "Give the number of segments times 8."
            )

    @property
    def takes_video(self) -> bool:
        """Whether video and synchronization are among the conditions."""
        return self.video != "none"

    @property
    def joint_depth(self) -> int:
        """Number of blocks in which the latent and the conditions attend to each other."""
        return self.depth - self.fused_depth

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.hidden_dim // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """Width of the gated feed-forward: 2/3 of mlp_ratio·D, rounded up to 256."""
        return 256 * math.ceil(int(2 * int(self.hidden_dim * self.mlp_ratio) / 3) / 256)

    def lengths(self, latent_length: int) -> tuple[int, int]:
        """Return the video and synchronization lengths for `latent_length` latent tokens.

        The reference duration gives the reference lengths exactly; others follow the frame rates.

        Returns:
            (video tokens, synchronization features), both at least one token or segment.
        """

        def video(n: int) -> int:
            return int(VIDEO_RATE * n / self.latent_rate)

        def segments(n: int) -> int:
            return int(SYNC_RATE * n / self.latent_rate) // SYNC_SEGMENT

        extra_video = self.video_length - video(self.latent_length)
        extra_segments = self.sync_length // SYNC_SEGMENT - segments(self.latent_length)
        return (
            max(1, video(latent_length) + extra_video),
            SYNC_SEGMENT * max(1, segments(latent_length) + extra_segments),
        )


_OWN: dict[str, Any] = {
    "latent_length": 250,
    "video_length": 64,
    "sync_length": 200,
    "text_length": 32,
    "video_dim": 128,
    "sync_dim": 128,
    "text_dim": 128,
    "mlp_ratio": 2.0,
}
_RATE_44K = 44_100 / 1024
_REFERENCE_16K: dict[str, Any] = {
    "latent_length": 250,
    "video_length": 64,
    "sync_length": 192,
    "text_length": 77,
}
_REFERENCE_44K = {
    **_REFERENCE_16K,
    "latent_length": 345,
    "latent_rate": _RATE_44K,
    "sample_rate": 44_100,
}
_MEANAUDIO: dict[str, Any] = {
    "latent_length": 312,
    "video_length": 79,
    "sync_length": 248,
    "text_length": 77,
    "video": "none",
    "text_rope": True,
    "pooled_dim": 512,
    "towards_data": False,
}
_RESONATE = {
    **_MEANAUDIO,
    "latent_length": 430,
    "pooled_dim": 1024,
    "latent_rate": _RATE_44K,
    "sample_rate": 44_100,
}

CONFIGS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        ModelConfig("nano", 20, 128, 2, 6, 4, **_OWN),
        ModelConfig("foley", 32, 192, 3, 6, 4, **_OWN),
        ModelConfig("small_16k", 20, 448, 7, 12, 8, **_REFERENCE_16K),
        ModelConfig("small_44k", 40, 448, 7, 12, 8, **_REFERENCE_44K),
        ModelConfig("medium_44k", 40, 896, 14, 12, 8, **_REFERENCE_44K),
        ModelConfig("large_44k", 40, 896, 14, 21, 14, **_REFERENCE_44K),
        ModelConfig("large_44k_v2", 40, 896, 14, 21, 14, v2=True, **_REFERENCE_44K),
        ModelConfig("meanaudio_s", 20, 448, 7, 12, 8, second_time="r", **_MEANAUDIO),
        ModelConfig("meanaudio_l", 20, 896, 14, 12, 8, second_time="r", **_MEANAUDIO),
        ModelConfig("fluxaudio_s", 20, 448, 7, 12, 8, **_MEANAUDIO),
        ModelConfig("resonate", 40, 448, 7, 52, 36, **_RESONATE),
    )
}


def config_for(name: str, **overrides: Any) -> ModelConfig:
    """Return the configuration `name` with some fields replaced.

    Raises:
        InputError: No such configuration or field.
    """
    if name not in CONFIGS:
        raise InputError(
            f"No configuration {name!r}: the known ones are {', '.join(CONFIGS)}. Choose one."
        )
    unknown = set(overrides) - {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown:
        raise InputError(
            f"No configuration field {some(sorted(unknown))}: see mfmjt.model.ModelConfig. "
            "Correct the name."
        )
    return dataclasses.replace(CONFIGS[name], **overrides)
