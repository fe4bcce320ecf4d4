"""What is judged: conditions for a network, and what is known to be true of them.

Clips of the procedural set have a known class and known event times. Of a feature store, which
`mfmjt extract` makes from files of your own, the sound is known, and class and events where the
store holds them. A metric judges what it has a truth for.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfmjt.data import foley
from mfmjt.encoders.base import Encoders, FrameSpec
from mfmjt.errors import InputError
from mfmjt.families import Bundle
from mfmjt.features.store import FeatureStore
from mfmjt.progress import Progress

__all__ = ["Examples", "Known", "procedural", "silent", "stored", "timed"]


def silent(stage: str, done: float) -> None:
    """Report no progress."""


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of the block to `seconds[stage]`."""
    began = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - began


class Known:
    """What is known to be true of clips, whoever makes sound for them.

    Attributes:
        captions: One sentence each; "" where there is none.
        labels: Index of each class in `foley.CLASSES`, (n,) int64; None where unknown.
        events: Times of each clip's onsets in seconds, empty for continuous classes; None where
            unknown.
    """

    captions: list[str]
    labels: Tensor | None
    events: list[np.ndarray] | None

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def classes(self) -> list[str]:
        """Name of each clip's class; empty where classes are unknown."""
        return [] if self.labels is None else [foley.CLASSES[label] for label in self.labels]

    @property
    def impact(self) -> np.ndarray:
        """Which clips have events, by their class, (m,) int64."""
        return np.flatnonzero([name in foley.IMPACT_CLASSES for name in self.classes])


@dataclass
class Examples(Known):
    """Conditions as the network gets them, and the truth.

    Attributes:
        indices: Number of each example within the split, (n); with `seed` it decides the noise.
        split: Name of the split.
        seed: Chose the examples.
        captions: One sentence each; "" where there is none.
        features: `video`, `sync` and `text` (n, tokens, dim) on the CPU, as far as they are there;
            `video_mask` and `text_mask` (n,) bool where some examples lack them.
        audio: Real sound (n, S) float32.
        sample_rate: Of the real sound, in Hz.
        labels: Index of each class in `foley.CLASSES`, (n,) int64; None where unknown.
        events: Times of each example's onsets in seconds, empty for continuous classes; None where
            unknown.
        procedural: The examples are clips of the procedural set, so there are others of each class,
            and `audio` has not been through a codec.
        seconds: What rendering and encoding took, by stage.
    """

    indices: list[int]
    split: str
    seed: int
    captions: list[str]
    features: dict[str, Tensor]
    audio: Tensor
    sample_rate: int
    labels: Tensor | None = None
    events: list[np.ndarray] | None = None
    procedural: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def duration(self) -> float:
        """Length of each example in seconds."""
        return self.audio.shape[1] / self.sample_rate

    def first(self, count: int) -> Examples:
        """Return the first `count` examples, or all if there are fewer."""
        cut: dict[str, Any] = {
            name: None if (rows := getattr(self, name)) is None else rows[:count]
            for name in ("indices", "captions", "audio", "labels", "events")
        }
        cut["features"] = {name: rows[:count] for name, rows in self.features.items()}
        return dataclasses.replace(self, **cut)

    def others(self) -> Tensor | None:
        """Other real sounds (n, S) of the same classes; None where there are none."""
        if not self.procedural:
            return None
        # Clips of one number have one class in every split.
        split = "validation" if self.split != "validation" else "train"
        clips = (foley.clip(i, split, duration=self.duration, render=False) for i in self.indices)
        return torch.stack([torch.from_numpy(clip.audio) for clip in clips])


def _numbers(clips: int, seed: int) -> list[int]:
    """Numbers of the clips that a seed chooses: no two seeds share one."""
    if clips < 2 or seed < 0:
        raise InputError(
            f"{clips} clips with seed {seed} cannot be evaluated: at least 2 clips and a seed of "
            "at least 0 are needed."
        )
    return list(range(seed * clips, (seed + 1) * clips))


@torch.inference_mode()
def procedural(
    encoders: Encoders,
    clips: int = 200,
    seed: int = 0,
    split: str = "test",
    *,
    duration: float = foley.DURATION,
    batch: int = 20,
    progress: Progress = silent,
) -> Examples:
    """Render clips of the procedural set and encode their frames and captions.

    Args:
        encoders: Frame and text encoders; the frames are drawn as large as they take them.
        clips: Number of clips.
        seed: Which clips: numbers seed * clips to (seed + 1) * clips - 1 of the split.
        split: Split of the procedural set.
        duration: Length of a clip in seconds.
        batch: Clips encoded at once; their frames are not kept.
        progress: Called as (stage, fraction done) after every batch.

    Raises:
        InputError: Fewer than two clips, a negative seed, or an unknown split.
    """
    seconds: dict[str, float] = {}
    device = next(encoders.parameters()).device
    indices = _numbers(clips, seed)
    made: list[foley.Clip] = []
    features: dict[str, list[Tensor]] = {"video": [], "sync": [], "text": []}
    seen, heard = encoders.frame_specs
    size = max(seen.size, heard.size)
    batch = max(1, batch * foley.FRAME_SIZE**2 // size**2)
    for start in range(0, clips, batch):
        with timed(seconds, "render"):
            rows = [
                foley.clip(i, split, duration=duration, size=size)
                for i in indices[start : start + batch]
            ]
            frames = torch.stack([torch.from_numpy(row.frames) for row in rows]).to(device)
        made += [dataclasses.replace(row, frames=None) for row in rows]
        with timed(seconds, "encode"):
            features["video"].append(encoders.encode_frames(_picked(frames, seen)).cpu())
            features["sync"].append(encoders.encode_sync(_picked(frames, heard)).cpu())
            features["text"].append(encoders.encode_text([row.caption for row in rows]).cpu())
        progress("render", len(made) / clips)
    return Examples(
        indices,
        split,
        seed,
        [clip.caption for clip in made],
        {name: torch.cat(parts) for name, parts in features.items()},
        torch.stack([torch.from_numpy(clip.audio) for clip in made]),
        foley.SAMPLE_RATE,
        torch.tensor([clip.label for clip in made]),
        [np.asarray(clip.events, dtype=np.float64) for clip in made],
        procedural=True,
        seconds=seconds,
    )


def _picked(frames: Tensor, spec: FrameSpec) -> Tensor:
    """Of clips' frames (B, T, H, H, 3), those that an encoder takes, in its size."""
    picked = frames[:, foley.frames_shown(frames.shape[1], spec.fps)]
    return spec.fitted(picked.flatten(0, 1)).unflatten(0, picked.shape[:2])


@torch.inference_mode()
def stored(
    store: FeatureStore,
    bundle: Bundle,
    clips: int = 200,
    seed: int = 0,
    split: str = "test",
    *,
    batch: int = 20,
    progress: Progress = silent,
) -> Examples:
    """Read clips of a feature store; their real sound is what the codec makes of their latents.

    Args:
        store: One split of a store.
        bundle: Codec and text encoder that the store was made with.
        clips: Number of clips, or all if there are fewer.
        seed: Which clips: numbers seed * clips to (seed + 1) * clips - 1 of the split.
        split: What to call the split.
        batch: Clips decoded at once.
        progress: Called as (stage, fraction done) after every batch.

    Raises:
        InputError: Fewer than two such clips, or a negative seed.
    """
    seconds: dict[str, float] = {}
    indices = [i for i in _numbers(clips, seed) if i < len(store)]
    if len(indices) < 2:
        raise InputError(
            f"The store {store.folder} holds {len(store)} clips: with {clips} clips and seed "
            f"{seed}, fewer than 2 are left. Give fewer clips, or a smaller seed."
        )
    captions = [store.captions[i] for i in indices]
    features = store.rows(torch.tensor(indices))
    latents = features.pop("latent") * store.latent_std + store.latent_mean
    with timed(seconds, "encode"):
        if not store.has_text and any(captions):
            parts = [
                bundle.encoders.text_features(captions[i : i + batch])
                for i in range(0, len(captions), batch)
            ]
            features |= {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    waves: list[Tensor] = []
    for rows in latents.split(batch):
        with timed(seconds, "read"):
            waves.append(bundle.decode(rows.to(bundle.device)))
        progress("read", sum(map(len, waves)) / len(indices))
    known = len(store.labels) == len(store) == len(store.events)
    return Examples(
        indices,
        split,
        seed,
        captions,
        {name: rows.cpu() for name, rows in features.items()},
        torch.cat(waves),
        bundle.codec.sample_rate,
        torch.tensor([store.labels[i] for i in indices]) if known else None,
        [np.asarray(store.events[i], dtype=np.float64) for i in indices] if known else None,
        seconds=seconds,
    )
