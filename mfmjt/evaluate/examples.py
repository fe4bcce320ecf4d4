"""What is judged: conditions for a network, and what is known to be true of them.

Clips of the procedural set and of the open set have a known class and known event times. Of a
feature store, which `mfmjt extract` makes from files of your own, the sound is known, and class and
events where the store holds them. A metric judges what it has a truth for.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfmjt.data import foley
from mfmjt.data.open_set import open_set
from mfmjt.data.wordings import wordings
from mfmjt.encoders.base import Encoders, FrameSpec
from mfmjt.errors import InputError
from mfmjt.families import Bundle
from mfmjt.features.store import FeatureStore
from mfmjt.progress import Progress

__all__ = ["Examples", "Known", "opened", "procedural", "silent", "stored", "timed"]

LARGEST = 30
"""Classes of clips with text alone, those of most training recordings."""


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
        class_list: Names of the classes that there are; those that the judge knows come first.
        labels: Index of each class in `class_list`, (n,) int64; None where unknown.
        events: Times of each clip's onsets in seconds, empty for continuous classes; None where
            unknown.
    """

    captions: list[str]
    class_list: tuple[str, ...] = foley.CLASSES
    labels: Tensor | None
    events: list[np.ndarray] | None

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def classes(self) -> list[str]:
        """Name of each clip's class; empty where classes are unknown."""
        return [] if self.labels is None else [self.class_list[label] for label in self.labels]

    @property
    def impact(self) -> np.ndarray:
        """Return which clips have events, (m,) int64."""
        return np.flatnonzero([len(times) > 0 for times in self.events or []])


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
        labels: As for `Known`.
        events: As for `Known`.
        class_list: As for `Known`.
        like: Makes another real sound (S,) of the same class as example number i; None where there
            are none. Where there are, `audio` has not been through a codec.
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
    class_list: tuple[str, ...] = foley.CLASSES
    like: Callable[[int], np.ndarray] | None = None
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
        if self.like is None:
            return None
        return torch.stack([torch.from_numpy(self.like(row)) for row in range(len(self))])


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
    # Clips of one number have one class in every split.
    other = "validation" if split != "validation" else "train"
    indices = _numbers(clips, seed)
    made = functools.partial(foley.clip, duration=duration)
    found = _encoded(lambda i, size: made(i, split, size=size), indices, encoders, batch, progress)
    return _examples(
        found,
        (indices, split, seed),
        foley.CLASSES,
        lambda row: made(indices[row], other, render=False).audio,
    )


@torch.inference_mode()
def opened(
    recordings: Path,
    encoders: Encoders,
    known: Sequence[str],
    clips: int = 200,
    seed: int = 0,
    split: str = "test",
    *,
    text_alone: bool = False,
    unseen: bool = False,
    duration: float = foley.DURATION,
    batch: int = 20,
    progress: Progress = silent,
) -> Examples:
    """Make clips of the open set and encode their frames and captions.

    Args:
        recordings: Folder that `mfmjt data real` wrote.
        encoders: As for `procedural`.
        known: Classes that the judge knows.
        clips: As for `procedural`.
        seed: As for `procedural`.
        split: Split of the recordings and of their wordings.
        text_alone: Clips of one recording each, without a picture, whose classes are the `LARGEST`
            in turn; otherwise scenes.
        unseen: Describe these by words that no caption in training has.
        duration: Length of a clip in seconds.
        batch: As for `procedural`.
        progress: As for `procedural`.

    Raises:
        InputError: What `procedural` raises; no recordings, or none whose class the judge knows.
    """
    made = open_set(recordings)
    indices = _numbers(clips, seed)
    phrases = {name: wordings()[name].unseen for name in made.classes if name in wordings()}
    classes = [name for name in made.classes if name in known and name in made.labels(split)]
    largest = [name for name in classes[:LARGEST] if phrases.get(name) or not unseen]
    if not largest:
        raise InputError(
            f"The judge knows no class of the recordings in {recordings}. Give another --judge."
        )
    kind = "single" if text_alone else "scene"

    def clip(i: int, size: int) -> foley.Clip:
        name = largest[i % len(largest)] if text_alone else None
        row = made.clip(i, split, duration=duration, size=size, kind=kind, class_name=name)
        if unseen and name is not None:
            row = dataclasses.replace(row, caption=phrases[name][i % len(phrases[name])])
        return row

    found = _encoded(clip, indices, encoders, batch, progress)

    def like(row: int) -> np.ndarray:
        name = found[0][row].class_name
        # A sound of that class without a picture, where no other recording fits one.
        other = kind if name in made.in_scenes("train") else "single"
        options: dict[str, Any] = {"kind": other, "class_name": name, "render": False}
        return made.clip(indices[row], "train", 1, duration=duration, **options).audio

    others = (name for name in made.classes if name not in known)
    return _examples(found, (indices, split, seed), (*known, *others), like)


_Encoded = tuple[list[foley.Clip], dict[str, Tensor], dict[str, float]]


def _encoded(
    make: Callable[[int, int], foley.Clip],
    indices: list[int],
    encoders: Encoders,
    batch: int,
    progress: Progress,
) -> _Encoded:
    """Make clips from number and size; return them without frames, their features, and the time."""
    seconds: dict[str, float] = {}
    device = next(encoders.parameters()).device
    made: list[foley.Clip] = []
    features: dict[str, list[Tensor]] = {"text": []}
    seen, heard = encoders.frame_specs
    size = max(seen.size, heard.size)
    batch = max(1, batch * foley.FRAME_SIZE**2 // size**2)
    for start in range(0, len(indices), batch):
        with timed(seconds, "render"):
            rows = [make(i, size) for i in indices[start : start + batch]]
        made += [dataclasses.replace(row, frames=None) for row in rows]
        with timed(seconds, "encode"):
            if rows[0].frames is not None:
                frames = torch.stack([torch.from_numpy(row.frames) for row in rows]).to(device)
                for name, encode, spec in (
                    ("video", encoders.encode_frames, seen),
                    ("sync", encoders.encode_sync, heard),
                ):
                    features.setdefault(name, []).append(encode(_picked(frames, spec)).cpu())
            features["text"].append(encoders.encode_text([row.caption for row in rows]).cpu())
        progress("render", len(made) / len(indices))
    return made, {name: torch.cat(parts) for name, parts in features.items()}, seconds


def _examples(
    found: _Encoded,
    chosen: tuple[list[int], str, int],
    class_list: tuple[str, ...],
    like: Callable[[int], np.ndarray],
) -> Examples:
    made, features, seconds = found
    indices, split, seed = chosen
    return Examples(
        indices,
        split,
        seed,
        [clip.caption for clip in made],
        features,
        torch.stack([torch.from_numpy(clip.audio) for clip in made]),
        foley.SAMPLE_RATE,
        torch.tensor([class_list.index(clip.class_name) for clip in made]),
        [np.asarray(clip.events, dtype=np.float64) for clip in made],
        class_list,
        like,
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
