"""From a video to the features of each window, read ahead and kept for the next time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfmjt.encoders.base import FRAMES_AT_ONCE, stream_options
from mfmjt.errors import InputError
from mfmjt.families import Bundle
from mfmjt.media import Pictures, Video, VideoStream
from mfmjt.pipeline.ahead import ahead
from mfmjt.pipeline.cache import Entry
from mfmjt.pipeline.windows import OVERLAP, Window, plan

__all__ = ["VideoFeatures"]

Stage = Callable[[str], AbstractContextManager[None]]
"""Times a stage of the pipeline by its name."""

_BLOCKS_AHEAD = 8  # seconds of pictures that wait: about one window's work


class VideoFeatures:
    """The windows of a video and their features.

    Args:
        source: The video, a result of `as_source`, or its pictures as they were read before.
        duration: Seconds of it from the start; None for all.
        limit: Refuse a video longer than so many seconds when `duration` is None.
        bundle: Whose encoders are used, on their device, for its network.
        cached: Where the features may be, and are put if they are not.

    Attributes:
        declared: Seconds that the sound will last, as far as the file states it.
        notes: What was odd about the file; complete after the last window.
    """

    def __init__(
        self,
        source: Path | Pictures | Video,
        duration: float | None,
        limit: float,
        bundle: Bundle,
        cached: Entry | None = None,
    ) -> None:
        self.declared = duration
        self.notes: tuple[str, ...] = ()
        self._bundle, self._cached = bundle, cached
        self._frames = _Frames(source, duration, limit, bundle)

    def windows(self, stage: Stage) -> Iterator[tuple[Window, dict[str, Tensor]]]:
        """Each window with its features `(1, tokens, dim)`, on the device.

        Raises:
            InputError: The video cannot be used.
            RunError: Features cannot be written.
        """
        if self._cached is not None:
            with stage("read"):
                found = self._cached.windows()
            self.notes = self._cached.notes
            if found is not None:
                self.declared = found[-1].end
                for number, window in enumerate(found):
                    with stage("read"):
                        features = self._cached.load(number, self._bundle.device)
                    yield window, features
                return
        with self._frames as frames:
            for number, window in enumerate(
                plan(self._bundle.window, lambda s: frames.total(s, stage))
            ):
                if self.declared is None:
                    self.declared = frames.declared
                _, *counts = self._bundle.lengths(window.duration)
                features = frames.features(window.start, counts, stage)
                if window.last:
                    self.declared = window.end
                    self.notes += frames.notes
                if self._cached is not None:
                    self._cached.save(number, window, features, frames.notes)
                yield window, features


class _Frames:
    """Pictures of a video, read ahead as far as they are asked for and forgotten behind.

    Frames that are independent, as for CLIP, are encoded as they come, while a thread decodes the
    next ones, and once where windows overlap. Others are encoded window by window.
    """

    def __init__(
        self,
        source: Path | Pictures | Video,
        duration: float | None,
        limit: float,
        bundle: Bundle,
    ) -> None:
        encoders, device = bundle.encoders, bundle.device
        self.rates = encoders.video_fps, encoders.sync_fps
        self._stream: VideoStream | _Held
        if isinstance(source, Video):
            self._stream = _Held(source, duration, self.rates)
        else:
            wanted = stream_options(encoders.frame_specs, device)
            self._stream = VideoStream(source, duration=duration, limit=limit, **wanted)
        self._bundle, self._encoders = bundle, encoders
        self._singly = encoders.frames_are_independent
        self._waiting: list[Tensor] = []  # pictures that will be encoded singly
        self._kept: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._begin = [0, 0]
        self._end = [0, 0]
        self._ended = False

    def __enter__(self) -> _Frames:
        self._blocks = ahead(self._stream, _BLOCKS_AHEAD)
        return self

    def __exit__(self, *_: object) -> None:
        self._blocks.close()

    @property
    def declared(self) -> float | None:
        return self._stream.declared

    @property
    def notes(self) -> tuple[str, ...]:
        return self._stream.notes

    def total(self, seconds: float, stage: Stage) -> float | None:
        """Return the video's duration if it is at most so many seconds, else None."""
        while not self._ended and any(
            end <= seconds * rate for end, rate in zip(self._end, self.rates, strict=True)
        ):
            self._read(stage)
        ends = self._ended and self._stream.duration <= seconds
        return self._stream.duration if ends else None

    def features(self, start: int, counts: list[int], stage: Stage) -> dict[str, Tensor]:
        """Features of so many pictures of both rates, the last one held if the video ends.

        What lies before one overlap after `start` is forgotten.
        """
        with stage("encode"):
            self._bundle.need("encoders")
            self._encode()
            seen, synced = (self._take(i, start, count) for i, count in enumerate(counts))
            return {
                "video": seen if self._singly else self._encoders.encode_frames(seen),
                "sync": self._encoders.encode_sync(synced),
            }

    def _take(self, i: int, start: int, count: int) -> Tensor:
        rate = self.rates[i]
        held = torch.cat(self._kept[i])
        skipped = start * rate - self._begin[i]
        rows = skipped + torch.arange(count, device=held.device)
        taken = held[rows.clamp(max=len(held) - 1)][None].to(self._bundle.device)
        behind = skipped + OVERLAP * rate
        self._kept[i][:] = [held[behind:].clone()]  # the rest is freed
        self._begin[i] += behind
        return taken

    def _read(self, stage: Stage) -> None:
        with stage("read"):
            block = next(self._blocks, None)
        if block is None:
            self._ended = True
            return
        for i, pieces in enumerate(block):
            new = [torch.as_tensor(piece) for piece in pieces]
            self._end[i] += sum(len(piece) for piece in new)
            (self._waiting if self._singly and i == 0 else self._kept[i]).extend(new)
        if sum(map(len, self._waiting)) >= FRAMES_AT_ONCE:
            with stage("encode"):
                self._encode()

    def _encode(self) -> None:
        """Features of the pictures that wait for it."""
        if self._waiting:
            self._bundle.need("encoders")
            pictures, self._waiting = torch.cat(self._waiting), []
            self._kept[0].append(self._encoders.encode_frames(pictures[None])[0])


class _Held:
    """Pictures that were read before, as a stream of one block."""

    def __init__(self, video: Video, duration: float | None, rates: tuple[int, int]) -> None:
        end = video.duration if duration is None else duration
        counts = [max(1, round(Fraction(end) * rate)) for rate in rates]
        found = [len(frames) for frames in video.frames]
        if len(found) != len(rates) or any(n > m for n, m in zip(counts, found, strict=True)):
            raise InputError(
                f"The video was read as {found} pictures: {end:g} s at the rates of the encoders, "
                f"{rates}, are {counts}. Read it at these rates, or ask for less of it."
            )
        self._pieces = tuple(
            [frames[:count]] for frames, count in zip(video.frames, counts, strict=True)
        )
        self.declared = self.duration = end
        self.notes = video.notes

    def __iter__(self) -> Iterator[tuple[list[Any], ...]]:
        yield self._pieces
