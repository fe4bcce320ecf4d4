"""Sound longer than the network makes in one go: windows that overlap, and their seams.

Windows begin on whole seconds, where frames of both rates begin too. Where two overlap they start
from the same noise, so that their latents nearly agree there, and are cross-faded. The codec works
in chunks with more context on both sides than its convolutions see. Nothing grows with the length
but the waveform.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["OVERLAP", "Joiner", "Noise", "Window", "expected", "plan"]

OVERLAP = 1
"""Seconds that a window shares with the one before it, and over which the two are faded."""
STRETCH = 1.25
"""The last window may be so much longer than the others, and what is no longer is made in one go:
networks have no absolute positions, and one trained on 8 s is tested on 10 (arXiv 2509.06389)."""
CHUNK = 509
"""Latents from one chunk of the codec to the next: its noise repeats after as many frames, so that
every chunk continues it."""
CONTEXT = 40
"""Latents on each side of a chunk that are decoded and dropped: the codecs' convolutions see 34."""
FADE = 16
"""Latents over which the waveforms of two chunks are faded: attention sees beyond any context."""

_NOISE_ROWS = 256
_ROUNDING = 1e-6  # of durations in seconds, which are quotients


@dataclass(frozen=True)
class Window:
    """What the network makes in one go.

    Attributes:
        start: Its begin in seconds.
        duration: Its length in seconds.
        last: Whether the sound ends with it.
    """

    start: int
    duration: float
    last: bool

    @property
    def end(self) -> float:
        """Its end in seconds."""
        return self.start + self.duration


def plan(length: int, total: Callable[[float], float | None]) -> Iterator[Window]:
    """Return the windows of a sound whose duration may be known only as it goes on.

    Args:
        length: Seconds of a window, 2 or more.
        total: Asked with some seconds, tells the sound's whole duration if it is no more than
            that, else None.
    """
    start = 0
    while (end := total(start + STRETCH * length)) is None:
        yield Window(start, length, last=False)
        start += length - OVERLAP
    # A short rest becomes a whole window that overlaps more.
    start = max(0, min(start, math.ceil(end - length - _ROUNDING)))
    yield Window(start, end - start, last=True)


def expected(length: int, duration: float) -> int:
    """Return how many windows `plan` gives for a duration in seconds."""
    beyond = duration - STRETCH * length
    return 1 + max(0, math.ceil(beyond / (length - OVERLAP)))


class Noise:
    """Standard normal noise of each position; a seed means the same on any device, in any batch.

    The first window's is drawn at once from the seed. What follows comes in rows of a fixed number,
    each from a seed of its own that (seed, number of the row) determines.

    Args:
        seed: Of the first sound; sound i has seed + i.
        count: Number of sounds.
        channels: Latent channels.
    """

    def __init__(self, seed: int, count: int, channels: int) -> None:
        self._seeds = [seed + i for i in range(count)]
        self._channels = channels
        self._begin = self._rows = 0
        self._held = torch.empty(count, 0, channels)

    def __call__(self, start: int, length: int) -> Tensor:
        """Noise `(count, length, C)` of the positions from `start`, which never goes back."""
        if self._rows == 0:
            self._held = self._draw(length)
        while self._begin + self._held.shape[1] < start + length:
            self._held = torch.cat((self._held, self._draw(_NOISE_ROWS)), dim=1)
        self._held = self._held[:, start - self._begin :]
        self._begin = start
        return self._held[:, :length]

    def _draw(self, length: int) -> Tensor:
        row, self._rows = self._rows, self._rows + 1
        drawn = []
        for seed in self._seeds:
            if row:
                seed = int(np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0])
            generator = torch.Generator().manual_seed(seed)
            drawn.append(torch.randn(length, self._channels, generator=generator))
        return torch.stack(drawn)


class Joiner:
    """Makes one waveform of the windows of a sound, in parts, as soon as nothing can change them.

    Latents are faded in the middle of each overlap. What fits into one chunk is decoded as it is.

    Args:
        decode: Latents `(B, n, C)` to samples `(B, n * hop)`.
        hop: Samples of a latent.
        fade: Latents over which two windows are faded.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], hop: int, fade: int = 0) -> None:
        self._decode, self._hop, self._fade = decode, hop, fade
        self._window: Tensor | None = None  # latents that the next window may change
        self._begin = 0  # position of the first of them
        self._latents: Tensor | None = None  # that wait for a chunk
        self._tail: Tensor | None = None  # end of the last chunk, for the next one's fade
        self._waveform: list[Tensor] = []

    def add(self, start: int, latents: Tensor) -> None:
        """Add a window's latents `(B, n, C)`, from position `start` on.

        Each begins after the one before it began, and before that one ends.
        """
        if self._window is None:
            self._window, self._begin = latents, start
            return
        overlap = self._begin + self._window.shape[1] - start
        width = min(self._fade, overlap)
        skipped = (overlap - width) // 2
        first = start - self._begin + skipped
        self._push(self._window[:, :first])
        mixed = _faded(
            self._window[:, first : first + width], latents[:, skipped : skipped + width]
        )
        self._window = torch.cat((mixed, latents[:, skipped + width :]), dim=1)
        self._begin += first

    def finish(self) -> Tensor:
        """Give the whole waveform `(B, samples)`."""
        assert self._window is not None, "add a window first"
        self._push(self._window)
        assert self._latents is not None
        self._waveform.append(self._continued(self._latents))
        return torch.cat(self._waveform, dim=1)

    def _push(self, latents: Tensor) -> None:
        """Take latents that nothing changes any more, and decode them where they fill a chunk."""
        held = latents if self._latents is None else torch.cat((self._latents, latents), dim=1)
        overlap = 2 * CONTEXT + FADE
        while held.shape[1] > CHUNK + overlap:
            wave = self._continued(held[:, : CHUNK + overlap])
            self._waveform.append(wave[:, : -overlap * self._hop])
            self._tail = wave[:, -overlap * self._hop :]
            held = held[:, CHUNK:]
        self._latents = held

    def _continued(self, latents: Tensor) -> Tensor:
        """Decode a chunk, its begin faded in from the end of the one before."""
        tail, wave, margin = self._tail, self._decode(latents), CONTEXT * self._hop
        if tail is None:
            return wave
        end = tail.shape[1] - margin
        mixed = _faded(tail[:, margin:end], wave[:, margin:end])
        return torch.cat((tail[:, :margin], mixed, wave[:, end:]), dim=1)


def _faded(old: Tensor, new: Tensor) -> Tensor:
    """From `old` to `new` along the second axis, by half a cosine."""
    width = old.shape[1]
    steps = (torch.arange(width, device=old.device, dtype=old.dtype) + 0.5) / width
    ramp = 0.5 - 0.5 * torch.cos(math.pi * steps)
    return torch.lerp(old, new, ramp.view(-1, *(1 for _ in old.shape[2:])))
