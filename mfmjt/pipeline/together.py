"""The one way from requests to sounds: read, encode, generate in batches of one shape, decode.

A request that the network makes in one go waits for others of its shape. A longer one is made by
itself, window by window, while its video is read.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mfmjt.errors import MfmjtError
from mfmjt.families import Bundle
from mfmjt.families.bundle import NEGATIVE
from mfmjt.meanflow import Sampling
from mfmjt.media import Pictures, Video, as_source
from mfmjt.pipeline.audio import STAGES, Audio
from mfmjt.pipeline.cache import entry
from mfmjt.pipeline.request import MAX_DURATION, TEXT_DURATION, Request
from mfmjt.pipeline.stream import VideoFeatures
from mfmjt.pipeline.windows import OVERLAP, Joiner, Noise, Window, expected, plan
from mfmjt.progress import Progress

__all__ = ["generate"]

Windows = Iterator[tuple[Window, dict[str, Tensor]]]
"""Windows of one sound and their features, each `(1, tokens, dim)`."""


@dataclass
class _Unit:
    """The sounds of one request and mode that are made in one go.

    Attributes:
        owner: Number of the request.
        window: All of the sound.
        length: Latents.
        features: Of video and text, shared by the modes of a request.
        seconds: Wall time by stage.
        notes: On the video and the prompt.
        conditions: Of the network, one row for all sounds.
        made: The sounds.
    """

    owner: int
    request: Request
    sampling: Sampling
    window: Window
    length: int
    features: dict[str, Tensor]
    seconds: dict[str, float]
    notes: tuple[str, ...]
    conditions: Any = None
    made: list[Audio] = field(default_factory=list)

    @property
    def key(self) -> tuple[object, ...]:
        """Return what units of one batch have in common."""
        parts, layout = pytree.tree_flatten(self.conditions)
        return self.length, self.sampling, str(layout), tuple(part.shape for part in parts)


@torch.inference_mode()
def generate(
    bundle: Bundle,
    requests: Sequence[Request],
    progress: Progress | None = None,
    most: int = 16,
) -> list[list[Audio] | MfmjtError]:
    """Make sound for several requests; see `mfmjt.pipeline.generate_together`."""
    try:
        return _made(bundle, requests, progress or (lambda stage, fraction: None), most)
    finally:
        bundle.need(None)


def _made(
    bundle: Bundle, requests: Sequence[Request], report: Progress, most: int
) -> list[list[Audio] | MfmjtError]:
    reading = _Reading(report, len(requests))
    made: list[list[Audio] | MfmjtError] = [[] for _ in requests]
    begun: list[list[_Unit]] = []
    for owner, request in enumerate(requests):
        try:
            own, made[owner] = _begin(bundle, owner, request, partial(reading, owner))
            begun.append(own)
        except MfmjtError as error:
            made[owner] = error
    units: list[_Unit] = []
    for own in begun:  # after all of them were encoded: the encoders may have to go now
        try:
            _condition(bundle, own)
            units += own
        except MfmjtError as error:
            made[own[0].owner] = error
    groups: dict[tuple[object, ...], list[_Unit]] = {}
    for unit in units:
        groups.setdefault(unit.key, []).append(unit)
    batches = [batch for group in groups.values() for batch in _batches(group, most)]
    done, of = 0, sum(batch[0].sampling.steps for batch in batches)

    def stepped() -> None:
        nonlocal done
        done += 1
        report("generate", done / of)

    if batches:
        report("generate", 0.0)
    for batch in batches:
        try:
            _generate(bundle, batch, stepped, report)
        except MfmjtError as error:
            for unit in batch:
                made[unit.owner] = error
    for unit in units:
        sounds = made[unit.owner]
        if isinstance(sounds, list):
            sounds += unit.made
    return made


class _Clock:
    """Wall time of each stage, and what is reported of it."""

    def __init__(self, device: torch.device, report: Progress) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.report = report
        self._device = device

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[stage] += time.perf_counter() - begin

    @contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        self.report(stage, 0.0)
        with self.timed(stage):
            yield
        self.report(stage, 1.0)


class _Reading:
    """Reports reading and encoding, which take turns, as shares of all requests', only forward."""

    def __init__(self, report: Progress, of: int) -> None:
        self._report, self._of = report, of
        self._last = (-1, 0.0)

    def __call__(self, owner: int, stage: str, fraction: float) -> None:
        if stage in STAGES[:2]:
            fraction = (owner + fraction) / self._of
            at = STAGES.index(stage), fraction
            if at <= self._last:
                return
            self._last = at
        self._report(stage, fraction)


def _begin(
    bundle: Bundle, owner: int, request: Request, report: Progress
) -> tuple[list[_Unit], list[Audio]]:
    """Read and encode a request: its units, or the sounds of one too long to be made in one go."""
    samplings = request.samplings(bundle.sampling)
    clock = _Clock(bundle.device, report)
    source = None if request.video is None else _source(bundle, request)
    notes = bundle.encoders.prompt_notes(request.prompt)
    notes += bundle.encoders.prompt_notes(request.negative_prompt, "negative prompt")
    with closing(_windows(bundle, request, source, clock)) as windows:  # and the thread it reads in
        window, features = next(windows)
        if not window.last:
            rest = itertools.chain([(window, features)], windows)
            sounds = _long(bundle, request, samplings, source, rest, clock)
            return [], [s.noted(notes + (source.notes if source else ())) for s in sounds]
    length = _length(bundle, window)
    notes += source.notes if source else ()
    seconds = [clock.seconds, *({} for _ in samplings[1:])]  # what modes share is counted once
    return [
        _Unit(owner, request, sampling, window, length, features, own, notes)
        for sampling, own in zip(samplings, seconds, strict=True)
    ], []


def _source(bundle: Bundle, request: Request) -> VideoFeatures:
    """Return the features of a request's video, which will be read, or found in its cache."""
    source: Path | Pictures | Video = request.video
    if not isinstance(source, Video) or request.fps is not None:
        source = as_source(source, request.fps)
    cached = None
    if request.cache is not None and not isinstance(source, Video):
        asked = (request.duration, bundle.window, bundle.encoders.frame_size)
        cached = entry(request.cache, source, bundle.encoders_identity(), asked)
    return VideoFeatures(source, request.duration, MAX_DURATION, bundle, cached)


def _text(bundle: Bundle, prompt: str | None) -> dict[str, Tensor]:
    """Return features `(1, tokens, dim)` of the prompt, where there is one."""
    if not (prompt and prompt.strip()):
        return {}
    return {"text": bundle.encoders.encode_text([prompt])}


def _windows(
    bundle: Bundle, request: Request, source: VideoFeatures | None, clock: _Clock
) -> Generator[tuple[Window, dict[str, Tensor]], None, None]:
    """Give each window with the features of video and text."""
    given: Windows
    if source is None:
        whole = TEXT_DURATION if request.duration is None else request.duration
        given = ((w, {}) for w in plan(bundle.window, lambda s: whole if whole <= s else None))
    else:
        given = source.windows(clock.stage)
    text: dict[str, Tensor] | None = None
    for window, features in given:
        if text is None:
            with clock.stage("encode"):
                bundle.need("encoders")
                text = _text(bundle, request.prompt)
                negative = _text(bundle, request.negative_prompt)
                text |= {NEGATIVE + name: value for name, value in negative.items()}
        yield window, features | text


def _length(bundle: Bundle, window: Window) -> int:
    """Return the latents of a window, which begins at the nearest latent."""
    length = bundle.lengths(window.duration).latents
    rate = bundle.network.config.latent_rate
    if not window.last:
        return length
    # The last one reaches to the end.
    return max(length, math.ceil(window.end * rate - 1e-6) - round(window.start * rate))


def _long(
    bundle: Bundle,
    request: Request,
    samplings: Sequence[Sampling],
    source: VideoFeatures | None,
    windows: Windows,
    clock: _Clock,
) -> list[Audio]:
    """Make sounds of several windows, each for all modes before the next one is read."""
    config = bundle.network.config
    report, clock.report = clock.report, lambda stage, fraction: None
    noise = Noise(request.seed, request.count, config.latent_dim)

    def decode(latents: Tensor) -> Tensor:
        with clock.timed("decode"):
            return bundle.decode(latents)

    fade = round(OVERLAP * config.latent_rate)
    joiners = [Joiner(decode, bundle.codec.hop, fade) for _ in samplings]
    for number, (window, features) in enumerate(windows):
        known = source.declared if source else request.duration
        of = 0 if known is None else expected(bundle.window, known)
        of = number + 1 if window.last else max(of, number + 2)
        start, length = round(window.start * config.latent_rate), _length(bundle, window)
        drawn = noise(start, length).to(bundle.device)
        with clock.timed("generate"):
            conditions = bundle.conditions(features, length, samplings[0])
        done, steps = 0, samplings[0].steps * len(samplings)

        def stepped() -> None:
            nonlocal done
            done += 1
            report("generate", (number + done / steps) / of)  # noqa: B023  called in this turn

        report("generate", number / of)
        for joiner, sampling in zip(joiners, samplings, strict=True):
            with clock.timed("generate"):
                latents = bundle.latents(drawn, conditions, sampling, stepped)
            joiner.add(start, latents)
    rate, count = bundle.codec.sample_rate, request.count
    waveforms = [joiner.finish()[:, : max(1, round(window.end * rate))] for joiner in joiners]
    report("decode", 1.0)
    return [
        Audio(wave[None], rate, request.seed + i, clock.seconds, count * len(samplings))
        for waveform in waveforms
        for i, wave in enumerate(waveform)
    ]


def _condition(bundle: Bundle, units: Sequence[_Unit]) -> None:
    """Put into the units of one request the conditions that its modes share."""
    if not units:
        return
    first, clock = units[0], _Clock(bundle.device, lambda stage, fraction: None)
    with clock.timed("generate"):
        conditions = bundle.conditions(first.features, first.length, first.sampling)
    first.seconds["generate"] += clock.seconds["generate"]
    for unit in units:
        unit.conditions = conditions


def _batches(group: list[_Unit], most: int) -> Iterator[list[_Unit]]:
    """Units of one shape in lists of at most `most` sounds, or of one unit."""
    batch: list[_Unit] = []
    for unit in group:
        if batch and sum(u.request.count for u in batch) + unit.request.count > most:
            yield batch
            batch = []
        batch.append(unit)
    if batch:
        yield batch


def _generate(
    bundle: Bundle, batch: list[_Unit], stepped: Callable[[], None], report: Progress
) -> None:
    """Put into each unit of the batch its sounds."""
    clock = _Clock(bundle.device, report)
    channels, rate = bundle.network.config.latent_dim, bundle.codec.sample_rate
    counts = [unit.request.count for unit in batch]
    with clock.timed("generate"):
        noise = torch.cat(
            [Noise(u.request.seed, u.request.count, channels)(0, u.length) for u in batch]
        ).to(bundle.device)

        def rows(*parts: Tensor) -> Tensor:
            own = zip(parts, counts, strict=True)
            return torch.cat([part.expand(count, *part.shape[1:]) for part, count in own])

        conditions = pytree.tree_map(rows, *(unit.conditions for unit in batch))
        latents = bundle.latents(noise, conditions, batch[0].sampling, stepped)
    with clock.stage("decode"):
        joiner = Joiner(bundle.decode, bundle.codec.hop)
        joiner.add(0, latents)
        waveforms = joiner.finish()
    for unit, own in zip(batch, waveforms.split(counts), strict=True):
        seconds = {stage: unit.seconds.get(stage, 0.0) + clock.seconds[stage] for stage in STAGES}
        samples = max(1, round(unit.window.end * rate))
        unit.made += [
            # A copy: the sounds of others shall not live as long as this one.
            Audio(wave.clone()[None], rate, seed, seconds, len(own), unit.notes)
            for seed, wave in enumerate(own[:, :samples], unit.request.seed)
        ]
