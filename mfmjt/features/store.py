"""Features on disk as batches: mapped, of any size, from one store or several, in random order.

The three streams have different rates: 250 latents, 64 video frames and 200 sync frames in 8 s.
A window begins where a latent, a sync frame and one of the sync encoder's segments of 8 frames
begin together, every 10 latents (0.32 s); its video frames are the nearest.

Of several stores, such as one of videos and one of sounds with captions, each row of a batch comes
from one, chosen by weight. What a clip lacks is zero, and its mask tells the network to take its
null tokens there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfmjt.errors import InputError, RunError, reason, some
from mfmjt.features.format import INDEX, Part, will_need
from mfmjt.model.config import SYNC_SEGMENT
from mfmjt.progress import ProgressBar

__all__ = ["FeatureStore", "verify"]

_STREAMS = ("mean", "logvar", "video", "sync")
_Request = tuple[tuple[int, ...], tuple[int, ...] | None, int | None]
"""Clips, starts and window of rows."""


class FeatureStore:
    """One split of one feature store, or of several.

    Args:
        folder: Folder of the store, as the stage `features` or `mfmjt extract` made it; or several,
            each with its weight: the share of a batch's rows that come from it is its weight over
            the sum of all.
        split: Name of the split.
        device: Device of the batches.
        clips: Batches are drawn of the first so many clips of each store; 0 for all.

    Attributes:
        folder: Folder of the split; of several stores, the first one's.
        captions: Caption of each clip, in order; empty where a clip has none.
        labels, events: What else is known of clips of the procedural set.
        latent_mean, latent_std: Statistics (C,) of this split's sampled latents, fp32; of several
            stores, the first one's. Training normalizes every split by those of `train`: set
            `latent_mean` and `latent_std`.
        latent_length: Number of latents of a whole clip.
        has_text: Whether there are text features: in the store, or after `encode_text`.
        null_text: Features (L, D) of the empty text where the store has them, else None.

    Raises:
        InputError: A folder holds no finished store, or the stores do not fit together.
    """

    def __init__(
        self,
        folder: str | Path | Sequence[tuple[str | Path, float]],
        split: str = "train",
        device: torch.device | str = "cpu",
        clips: int = 0,
    ) -> None:
        given = [(folder, 1.0)] if isinstance(folder, str | Path) else list(folder)
        self.folder = Path(given[0][0]) / split
        self.device = torch.device(device)
        splits = [_Split(Path(path) / split) for path, _ in given]
        self.captions = [caption for s in splits for caption in s.captions]
        self.labels = [label for s in splits for label in s.labels]
        self.events = [events for s in splits for events in s.events]
        statistics = torch.tensor(splits[0].statistics, device=self.device)
        self.latent_mean, self.latent_std = statistics
        sizes = [len(s.captions) for s in splits]
        if clips > min(sizes):
            raise InputError(f"clips={clips}: {self.folder} holds {min(sizes)}. Give fewer, or 0.")
        self._sizes = [clips or size for size in sizes]
        self._streams = {key: _Stream([s.tensors[key] for s in splits]) for key in _STREAMS}
        self._text: _Stream | None = None
        self._text_row: NDArray[np.int64] = np.empty(0, np.int64)
        self.null_text: Tensor | None = None
        if all(s.texts for s in splits):
            self._text = _Stream([[part.tensors["text"] for part in s.texts] for s in splits])
            starts = np.cumsum([0] + [sum(len(t) for t in texts) for texts in self._text.splits])
            self._text_row = np.concatenate(
                [start + s.text_row for start, s in zip(starts[:-1], splits, strict=True)]
            )
            self.null_text = splits[0].texts[0].tensors["text"][0].float()
        elif any(s.texts for s in splits):
            raise InputError(
                f"Of the stores {some(s.folder for s in splits)} some have features of "
                "text and others have not. Extract all of them with the same encoders."
            )
        has_caption = np.array([bool(caption) for caption in self.captions])
        videos = [part for s in splits for part in s.tensors["video"]]
        has_video = np.repeat([not part.is_meta for part in videos], [len(p) for p in videos])
        self._masks = {"video_mask": has_video, "text_mask": has_caption}
        self.latent_length = self._streams["mean"].shape[0]
        self.grid = self._grid()
        weights = np.array([weight for _, weight in given], np.float64)
        if not (weights > 0).all() or not np.isfinite(weights).all():
            raise InputError(f"Stores with weights {weights.tolist()}: give positive numbers.")
        self._upto = torch.tensor(np.cumsum(weights / weights.sum())[:-1])
        self._first = torch.tensor(np.cumsum([0, *sizes])[:-1])
        self._count = torch.tensor(self._sizes)
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: dict[_Request, Future[dict[str, Tensor]]] = {}

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def has_text(self) -> bool:
        """Return whether rows come with `text`."""
        return self._text is not None

    def _grid(self) -> int | None:
        """Latents from one place where a window may begin to the next; None where none may."""
        sync = self._streams["sync"].shape[0]
        if not self._masks["video_mask"].any():
            return 1
        grid, rest = divmod(SYNC_SEGMENT * self.latent_length, sync)
        return None if rest else grid

    @torch.no_grad()
    def encode_text(self, encoders: Any, batch: int = 256) -> None:
        """Encode every caption once with `encoders.encode_text`; equal captions share a row."""
        unique = list(dict.fromkeys(self.captions))
        row = {caption: i for i, caption in enumerate(unique)}
        parts = [
            encoders.encode_text(unique[i : i + batch]).half() for i in range(0, len(unique), batch)
        ]
        self._text = _Stream([[torch.cat(parts).cpu()]])
        self._text_row = np.array([row[caption] for caption in self.captions])

    def choose(
        self, batch: int, window: int | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Draw `batch` random clips, whole or a random window of each, for the host to read.

        Args:
            batch: Number of rows; clips are drawn with replacement.
            window: Length in latents, a multiple of the grid; None for whole clips.
            generator: Of the CPU; decides everything, so that equal states give equal batches.

        Returns:
            Clips (B,), and first latents (B,) or None; on the CPU.

        Raises:
            InputError: These features can only be taken whole.
        """
        if len(self._sizes) == 1:
            clips = torch.randint(self._sizes[0], (batch,), generator=generator)
        else:
            where, which = torch.rand(2, batch, generator=generator, dtype=torch.float64)
            source = torch.bucketize(where, self._upto, right=True)
            size = self._count[source]
            clips = self._first[source] + (which * size).long().clamp_(max=size - 1)
        if window is None or window >= self.latent_length:
            return clips, None
        if self.grid is None:
            raise InputError(
                f"window={window}: these features overlap, and clips can only be taken whole. "
                f"Give a window of {self.latent_length} or more."
            )
        places = (self.latent_length - window) // self.grid + 1
        starts = torch.randint(places, (batch,), generator=generator)
        return clips, self.grid * starts

    def draw(
        self,
        batch: int,
        window: int | None,
        generator: torch.Generator,
        chooser: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Draw clips, windows and noise, to be given to `rows`; see `choose`.

        Args:
            batch: As for `choose`.
            window: As for `choose`.
            generator: Decides the noise, on the device; and the rest where there is no `chooser`.
            chooser: Decides clips and windows; of the CPU.

        Returns:
            Clips (B,), first latents (B,) or None, and the latents' noise (B, N, C).
        """
        clips, starts = self.choose(batch, window, chooser or generator)
        length = self.latent_length if starts is None or window is None else window
        channels = self._streams["mean"].shape[1]
        noise = torch.randn(batch, length, channels, generator=generator, device=self.device)
        return clips, starts, noise

    def prefetch(self, clips: Tensor, starts: Tensor | None, window: int | None) -> None:
        """Read in a thread what a later call of `rows` takes: the same clips, starts and window.

        Rows that were not prefetched are read when they are taken.
        """
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, "mfmjt-store")
        request = _request(clips, starts, window)
        self._ahead[request] = self._reader.submit(self._read, *request)

    def settle(self) -> None:
        """Wait until what is prefetched is read, so that the thread is idle."""
        wait(self._ahead.values())

    def rows(
        self,
        clips: Tensor,
        starts: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the features of chosen clips, or of windows of them.

        Args:
            clips: Which clips, (B,) int64.
            starts: First latent of each window, (B,) int64, multiples of the grid; None for whole
                clips.
            noise: Of the latents (B, N, C), N the length of the windows; None takes their means.

        Returns:
            fp32 `latent` (B, N, C), normalized, `video` (B, V, Dv) and `sync` (B, S, Ds) unless no
            store has them, `text` (B, L, Dt) where `has_text`; and where some clips lack video or
            text, `video_mask` or `text_mask` (B,) bool, False for those.
        """
        request = _request(clips, starts, None if noise is None else noise.shape[1])
        prefetched = self._ahead.pop(request, None)
        if prefetched is None:
            self._ahead.clear()  # prefetched but not used
        read = self._read(*request) if prefetched is None else prefetched.result()
        features = {key: self._moved(value) for key, value in read.items()}
        mean, logvar = features.pop("mean"), features.pop("logvar")
        if noise is not None:
            mean = torch.addcmul(mean, logvar.mul_(0.5).exp_(), noise)
        return {"latent": mean.sub_(self.latent_mean).div_(self.latent_std), **features}

    def _moved(self, value: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return value
        # In the stored precision through the bus, in float32 behind it.
        moved = value.to(self.device, non_blocking=True)
        return moved.float() if moved.is_floating_point() else moved

    def _read(
        self, clips: tuple[int, ...], starts: tuple[int, ...] | None, window: int | None
    ) -> dict[str, Tensor]:
        """Return rows of all streams, on the CPU."""
        rows = np.array(clips, np.int64)
        pieces: dict[str, list[Tensor]] = {}
        for key, stream in self._streams.items():
            if stream.known:
                pieces[key] = stream.find(rows, *self._cut(stream.shape[0], starts, window))
        if self._text is not None:
            pieces["text"] = self._text.find(self._text_row[rows], None, None)
        will_need(*(p for found in pieces.values() for p in found if not p.is_meta))
        features = {key: self._copied(found) for key, found in pieces.items()}
        for key, mask in self._masks.items():
            if not mask.all():
                features[key] = torch.from_numpy(mask[rows])
        return features

    def _copied(self, pieces: list[Tensor]) -> Tensor:
        gpu = self.device.type == "cuda"
        dtype = pieces[0].dtype if gpu else torch.float32
        batch = torch.empty(len(pieces), *pieces[0].shape, dtype=dtype, pin_memory=gpu)
        for row, piece in zip(batch.unbind(0), pieces, strict=True):
            if piece.is_meta:
                row.zero_()
            else:
                row.copy_(piece)
        return batch

    def _cut(
        self, length: int, starts: tuple[int, ...] | None, window: int | None
    ) -> tuple[NDArray[np.int64] | None, int | None]:
        """Return the first places of windows in a stream of `length`, and their number of places.

        They lie between the same times as `window` latents from `starts` on.
        """
        if starts is None or window is None:
            return None, None
        rate = length / self.latent_length
        count = round(window * rate)
        first = np.rint(np.array(starts) * rate).astype(np.int64)
        return np.minimum(first, length - count), count


def verify(store: str | Path) -> int:
    """Compare every part of a store with its checksum.

    Returns:
        How many files were read.

    Raises:
        InputError: There is no finished store.
        RunError: Files are missing or damaged; the message names them.
    """
    indices = sorted(Path(store).glob(f"*/{INDEX}"))
    if not indices:
        raise InputError(f"{store} holds no finished store. Run mfmjt extract first.")
    wrong: list[str] = []
    paths: list[Path] = []
    for path in indices:
        try:
            index = json.loads(path.read_text())
            names = [*index["shards"], *index.get("text_shards", [])]
        except (OSError, ValueError, KeyError) as error:
            wrong.append(f"{path} cannot be read ({reason(error)}).")
            continue
        paths += [path.parent / name for name in names]
    with ProgressBar("verify", len(paths), 0, "files") as progress:
        for done, path in enumerate(paths, start=1):
            try:
                Part(path).check()
            except InputError as error:
                wrong.append(str(error))
            progress.update(done)
    if wrong:
        raise RunError(some(wrong, " ", 2, each=250))
    return len(paths)


class _Stream:
    """One kind of feature over all parts of all splits; meta tensors stand for what is absent."""

    def __init__(self, splits: list[list[Tensor]]) -> None:
        self.splits = splits
        self._parts = [part for split in splits for part in split if len(part)]
        present = [part for part in self._parts if not part.is_meta]
        self.known = bool(present)
        kinds = {(tuple(part.shape[1:]), part.dtype) for part in present}
        if len(kinds) > 1:
            raise InputError(
                f"Stores or parts hold features of different kinds: {sorted(map(str, kinds))}. "
                "Extract all with the same encoders, dtype and duration."
            )
        self.shape, dtype = next(iter(kinds), ((1, 1), torch.float32))
        self._absent = torch.empty(self.shape, dtype=dtype, device="meta")
        self._ends = np.cumsum([len(part) for part in self._parts])

    def find(
        self, rows: NDArray[np.int64], first: NDArray[np.int64] | None, count: int | None
    ) -> list[Tensor]:
        """Return each row as a view of its part, or `count` places of it from `first` on."""
        parts = np.searchsorted(self._ends, rows, side="right")
        begins = np.concatenate(([0], self._ends))[parts]
        found = []
        for i, (part, row) in enumerate(zip(parts, (rows - begins).tolist(), strict=True)):
            piece = self._parts[part]
            piece = self._absent if piece.is_meta else piece[row]
            if first is not None and count is not None:
                piece = piece[first[i] : first[i] + count]
            found.append(piece)
        return found


class _Split:
    """One split of one store, as its index describes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            index = json.loads((folder / INDEX).read_text())
            self.captions: list[str] = index["captions"]
            self.labels: list[int] = index.get("labels", [])
            self.events: list[list[float]] = index.get("events", [])
            self.statistics = (index["latent_mean"], index["latent_std"])
            parts = [Part(folder / name) for name in index["shards"]]
            self.texts = [Part(folder / name) for name in index.get("text_shards", [])]
            row = {text: i for i, text in enumerate(index.get("texts", []))}
            self.text_row = np.array([row[caption] for caption in self.captions if self.texts])
            self.tensors = {key: [_stream(part, key) for part in parts] for key in _STREAMS}
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"Cannot read features from {folder}: {reason(error)}. Make them with the stage "
                "`features` or with mfmjt extract, or give another store=."
            ) from error
        if not self.captions or sum(map(len, self.tensors["mean"])) != len(self.captions):
            raise InputError(
                f"Cannot read features from {folder}: the index names {len(self.captions)} clips "
                f"and the parts hold {sum(map(len, self.tensors['mean']))}. Make the store again."
            )


def _stream(part: Part, key: str) -> Tensor:
    """Return one feature of a part's clips; sounds without frames have no `video` and `sync`."""
    if key in part.tensors:
        return part.tensors[key]
    if key in ("mean", "logvar"):
        raise KeyError(f"{key} in {part.path.name}")
    return torch.empty(len(part.tensors["mean"]), 1, 1, device="meta")


def _request(clips: Tensor, starts: Tensor | None, window: int | None) -> _Request:
    if starts is None:
        return tuple(clips.tolist()), None, None
    return tuple(clips.tolist()), tuple(starts.tolist()), window
