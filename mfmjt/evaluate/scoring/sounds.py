"""Sounds in files, with what the networks made of them: read from the store when a metric asks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfmjt.data import foley
from mfmjt.evaluate.examples import Known
from mfmjt.evaluate.listening import Networks, Unheard
from mfmjt.evaluate.scoring.benchmark import cache_files, cached_features
from mfmjt.evaluate.scoring.work import Done, Job, Store, one_thread
from mfmjt.evaluate.sounds import Sounds

__all__ = ["Files", "Given", "Side"]


@dataclass
class Given(Known):
    """What a user says of the clips.

    Attributes:
        captions: As for `Known`.
        names: Name of each clip's class; empty where classes are not given.
        events: As for `Known`; clips of which nothing is said have none.
        timed: Which clips have events that are said, (m,) int64.
    """

    captions: list[str]
    names: list[str]
    events: list[np.ndarray] | None
    timed: np.ndarray

    @classmethod
    def of(cls, clips: list[Mapping[str, Any]]) -> Given:
        """Gather what is said of each clip."""
        names = [str(clip.get("class", "")) for clip in clips]
        events = [np.array(clip.get("events", []), dtype=np.float64) for clip in clips]
        timed = np.flatnonzero([len(times) > 0 for times in events])
        captions = [str(clip.get("caption", "")) for clip in clips]
        return cls(captions, names if any(names) else [], events if len(timed) > 1 else None, timed)

    @property
    def classes(self) -> list[str]:
        """Name of each clip's class; empty where classes are not given."""
        return self.names

    @property
    def labels(self) -> Tensor | None:  # type: ignore[override]
        """Index of each class in `foley.CLASSES`; None where some are none of these."""
        if not self.names or not set(self.names) <= set(foley.CLASSES):
            return None
        return torch.tensor([foley.CLASSES.index(name) for name in self.names])

    @property
    def impact(self) -> np.ndarray:
        """Which clips have events, (m,) int64."""
        return self.timed


class Side:
    """The files of one side, and where their features are.

    Args:
        name: `generated` or `reference`.
        files: File of each id; None for one whose features are in a cache of av-benchmark.
        source: Folder in which such a cache may be; None for no such cache.

    Attributes:
        done: What became of each file.
    """

    def __init__(self, name: str, files: dict[str, Path | None], source: Path | None) -> None:
        self.name, self.files, self.source = name, files, source
        self.done: dict[str, Done] = {}
        self._store: Store | None = None

    def open(self, job: Job) -> None:
        """Read features from the store that a job filled."""
        self._store = Store(job)

    def has_cache(self, network: str, output: str = "") -> bool:
        """Return whether a network's features are in a cache of av-benchmark: of sounds, or one."""
        if self.source is None:
            return False
        if output:
            return self._cached(network, output) is not None
        return bool(cache_files(self.source, network))

    def cached_ids(self, network: str, output: str) -> set[str]:
        """Return the names that a cache of av-benchmark holds; none without one."""
        return set(self._cached(network, output) or ())

    def notes(self) -> list[str]:
        """Return which features are from such a cache, in a line."""
        if self.source is None or not (found := cache_files(self.source)):
            return []
        told = ", ".join(path.name for path in found)
        return [
            f"Features of the {self.name} sounds are from {found[0].parent} ({told}); of which "
            "weights and files they are, these do not say."
        ]

    @functools.lru_cache(maxsize=2)  # noqa: B019 - as long-lived as the scoring
    def _cached(self, network: str, output: str) -> dict[str, np.ndarray] | None:
        return None if self.source is None else cached_features(self.source, network, output)

    def hears(self, name: str, network: str) -> bool:
        """Return whether a clip is long enough for a network."""
        return name not in self.done or network not in self.done[name].unheard

    def read(self, network: str, output: str, name: str) -> np.ndarray:
        """Return what a network made of a clip.

        Raises:
            Unheard: There are none: a cache of av-benchmark does not hold the clip.
        """
        if (cached := self._cached(network, output)) is not None:
            if name not in cached:
                raise Unheard(f"The cache in {self.source} holds no {network} of {name}.")
            return cached[name]
        if self._store is None or name not in self.done:
            raise Unheard(f"There are no features of {name} ({self.name}) by {network}.")
        return self._store.read(network, self.done[name].digest)[output]


class Files(Sounds):
    """Sounds in files, whose features are read when a metric asks for them.

    Args:
        side: The files.
        ids: Takes a network and a metric's purpose, and gives the clips that enter it.
        networks: Read captions, and compare sounds with videos.
        videos: The videos, of the ids that `watched` gives.
        watched: Takes a network and a purpose, and gives the videos that enter it.
    """

    def __init__(
        self,
        side: Side,
        ids: Callable[[str, str], list[str]],
        networks: Networks,
        videos: Side,
        watched: Callable[[str, str], list[str]],
    ) -> None:
        self.side, self.networks, self.videos = side, networks, videos
        self.rng = np.random.default_rng(0)
        self._ids, self._watched = ids, watched

    def heard(self, network: str, output: str, purpose: str = "") -> list[np.ndarray]:
        """Return what a network makes of each clip, as `Sounds.heard` does."""
        ids = self._ids(network, purpose)
        if not ids:
            raise Unheard(f"No clip enters the {purpose} of {network}. Check the files' names.")
        return [self.side.read(network, output, name) for name in ids]

    def told(self, network: str, captions: list[str]) -> list[np.ndarray]:
        """Return a network's embedding of each caption, of a cache or computed."""
        ids = self._watched(network, "clap")
        if self.videos.has_cache(network, "text"):
            return [self.videos.read(network, "text", name) for name in ids]
        return self.networks.read(network, [caption for caption in captions if caption])

    def seen(self, network: str) -> list[np.ndarray] | None:
        """Return a network's features of each clip's video; None where there are no videos."""
        ids = self._watched(network, "video")
        return [self.videos.read(network, "video", name) for name in ids] or None

    def offsets(self) -> np.ndarray | None:
        """Return seconds between sound and video at the beginning and the end of each, (n, 2).

        Clip by clip and by one thread, as the features: no bit depends on the other clips.
        """
        videos = self.seen("synchformer")
        if videos is None:
            return None
        network, found = self.networks.load("synchformer"), []
        device = self.networks.device
        with one_thread(str(device)), torch.inference_mode():
            for sound, video in zip(
                self.heard("synchformer", "audio", "video"), videos, strict=True
            ):
                pair = (torch.from_numpy(rows)[None].to(device) for rows in (video, sound))
                found.append(network.offsets(network(*pair))[0].cpu().numpy())
        return np.stack(found)

    @functools.cached_property
    def onsets(self) -> list[np.ndarray]:
        """Times at which each sound has detected onsets, in seconds."""
        return self.heard("onsets", "times")

    @functools.cached_property
    def _judged(self) -> tuple[Tensor, Tensor]:
        classes = np.concatenate(self.heard("classifier", "class"))
        embedding = np.stack(self.heard("classifier", "embedding"))
        return torch.from_numpy(classes), torch.from_numpy(embedding)
