"""Several requests at once: what has the same shape goes through the network in one batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mfmjt.errors import MfmjtError, RunError
from mfmjt.meanflow import sample
from mfmjt.meanflow.guidance import GuidanceMode
from mfmjt.media import Video
from mfmjt.model.conditioning import Conditions
from mfmjt.pipeline.audio import STAGES, Audio
from mfmjt.pipeline.features import lengths
from mfmjt.pipeline.pipeline import NOT_FINITE, TEXT_DURATION, Pipeline, check_call
from mfmjt.pipeline.prompt import prompt_notes
from mfmjt.pipeline.windows import STRETCH, Noise, decoded

__all__ = ["Request", "generate_together"]

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Request:
    """What `Pipeline` is called with, for one sound or several.

    Attributes:
        video: As it was read, None for a prompt alone.
        prompt: What is to be heard, in words.
        steps: As for `Pipeline`.
        guidance: As for `Pipeline`.
        modes: Ways of guidance; each makes all sounds. Empty takes the pipeline's own.
        seed: As for `Pipeline`.
        duration: As for `Pipeline`.
        count: Sounds of each mode.
    """

    video: Video | None = None
    prompt: str | None = None
    steps: int | None = None
    guidance: float | None = None
    modes: tuple[GuidanceMode, ...] = ()
    seed: int = 0
    duration: float | None = None
    count: int = 1


@dataclass
class _Unit:
    """The sounds of one request and mode, on their way through the network.

    Attributes:
        features: Of video and text, for a compiled step, which reads them itself.
        conditions: With and without them, for the network as it is; None for a compiled step.
    """

    owner: int
    request: Request
    steps: int
    guidance: float
    mode: GuidanceMode
    length: int
    features: dict[str, Tensor]
    conditions: tuple[Conditions, Conditions] | None
    seconds: dict[str, float]
    notes: tuple[str, ...]
    made: list[Audio] = field(default_factory=list)

    @property
    def key(self) -> tuple[object, ...]:
        if self.conditions is None:
            shapes: object = [(name, self.features[name].shape) for name in sorted(self.features)]
        else:
            shapes = [part.shape for part in self.conditions[0]]
        return self.length, self.steps, self.guidance, self.mode, str(shapes)


@torch.inference_mode()
def generate_together(
    pipeline: Pipeline,
    requests: Sequence[Request],
    progress: Progress | None = None,
    most: int = 16,
) -> list[list[Audio] | MfmjtError]:
    """Make sound for several requests, those of one shape in one batch.

    A request's sounds are those that the pipeline makes for it alone. What is longer than the
    network makes in one go is made alone.

    Args:
        pipeline: Makes the sounds.
        requests: What is asked.
        progress: As for `Pipeline`, of all requests; what it raises ends all of them.
        most: Sounds in a batch.

    Returns:
        For each request its sounds, all of the first mode first, or the error that it ended with.
    """
    report = progress or (lambda stage, fraction: None)
    made: list[list[Audio] | MfmjtError] = [[] for _ in requests]
    units: list[_Unit] = []
    for owner, request in enumerate(requests):
        modes = request.modes or (pipeline.settled()[2],)
        try:
            if _seconds(request) > STRETCH * pipeline.window:
                made[owner] = _alone(pipeline, request, modes, report)
            else:
                report("encode", owner / len(requests))
                units += _prepared(pipeline, owner, request, modes)
        except MfmjtError as error:
            made[owner] = error
    groups: dict[tuple[object, ...], list[_Unit]] = {}
    for unit in units:
        groups.setdefault(unit.key, []).append(unit)
    batches = [batch for group in groups.values() for batch in _batches(group, most)]
    done, of = 0, sum(batch[0].steps for batch in batches)

    def stepped() -> None:
        nonlocal done
        done += 1
        report("generate", done / of)

    report("generate", 0.0)
    for batch in batches:
        try:
            _generate(pipeline, batch, stepped, report)
        except MfmjtError as error:
            for unit in batch:
                made[unit.owner] = error
    for unit in units:
        sounds = made[unit.owner]
        if isinstance(sounds, list):
            sounds += unit.made
    return made


def _seconds(request: Request) -> float:
    if request.duration is not None:
        return request.duration
    return TEXT_DURATION if request.video is None else request.video.duration


def _alone(
    pipeline: Pipeline, request: Request, modes: Sequence[GuidanceMode], report: Progress
) -> list[Audio]:
    made: list[Audio] = []
    for number, mode in enumerate(modes):

        def reported(stage: str, fraction: float, number: int = number) -> None:
            report(stage, (number + fraction) / len(modes) if stage == "generate" else fraction)

        sounds = pipeline(
            request.video,
            request.prompt,
            request.steps,
            request.guidance,
            mode,
            request.seed,
            request.duration,
            request.count,
            reported,
        )
        made += sounds if isinstance(sounds, list) else [sounds]
    return made


def _prepared(
    pipeline: Pipeline, owner: int, request: Request, modes: Sequence[GuidanceMode]
) -> Iterator[_Unit]:
    """The conditions of a request that is made in one go."""
    settled = [pipeline.settled(request.steps, request.guidance, mode) for mode in modes]
    for steps, guidance, mode in settled:
        check_call(
            request.video,
            request.prompt,
            steps,
            guidance,
            mode,
            request.seed,
            request.duration,
            request.count,
        )
    seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds[name] += time.perf_counter() - begin

    features: dict[str, Tensor] = {}
    notes = prompt_notes(pipeline.encoders, request.prompt)
    if request.video is not None:
        source = pipeline._video(request.video, request.duration, None)
        ((_, features),) = source.windows(stage)
        notes += source.notes
    with stage("encode"):
        features = features | pipeline._text(request.prompt)
        length, _, _ = lengths(pipeline.encoders, pipeline.network.config, _seconds(request))
        compiled = [pipeline.one_step is not None and steps == 1 for steps, _, _ in settled]
        cond, null = (
            None
            if all(compiled)
            else pipeline.network.conditions(
                **features,
                video_mask=torch.tensor([keep], device=pipeline.device),
                text_mask=torch.tensor([keep], device=pipeline.device),
                latent_length=length,
            )
            for keep in (True, False)
        )
    for (steps, guidance, mode), ready in zip(settled, compiled, strict=True):
        both = None if ready or cond is None or null is None else (cond, null)
        yield _Unit(owner, request, steps, guidance, mode, length, features, both, seconds, notes)
        seconds = dict.fromkeys(STAGES, 0.0)  # what the modes share is counted once


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
    pipeline: Pipeline, batch: list[_Unit], stepped: Callable[[], None], report: Progress
) -> None:
    """Put into each unit of the batch its sounds."""
    first = batch[0]
    channels, rate = pipeline.network.config.latent_dim, pipeline.codec.sample_rate

    def together(conditions: Sequence[Conditions]) -> dict[str, Conditions]:
        rows = (
            tuple(part.expand(unit.request.count, *part.shape[1:]) for part in own)
            for unit, own in zip(batch, conditions, strict=True)
        )
        return {"cond": Conditions(*map(torch.cat, zip(*rows, strict=True)))}

    def velocity(z: Tensor, r: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        u = pipeline.network(z, r, t, cond=cond)
        stepped()
        return u

    begin = time.perf_counter()
    noise = torch.cat(
        [Noise(u.request.seed, u.request.count, channels)(0, u.length) for u in batch]
    )
    noise = noise.to(pipeline.device)
    conditions = [unit.conditions for unit in batch if unit.conditions is not None]
    if pipeline.one_step is not None and not conditions:
        features = {
            name: torch.cat(
                [u.features[name].expand(u.request.count, -1, -1) for u in batch],
            )
            for name in first.features
        }
        latent = pipeline.one_step(noise, **features, guidance=first.guidance, mode=first.mode)
        stepped()
    else:
        latent = sample(
            velocity,
            noise,
            first.steps,
            together([cond for cond, _ in conditions]),
            together([null for _, null in conditions]),
            first.guidance,
            first.mode,
            instantaneous=pipeline.flow_matching,
        )
    latent = pipeline.network.unnormalize(latent)
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
    middle = time.perf_counter()
    report("decode", 0.0)
    parts = decoded(lambda z: pipeline.decode(z).float().cpu(), [latent], pipeline.codec.hop)
    waveforms = torch.cat(list(parts), dim=1)
    end = time.perf_counter()
    if not bool(torch.isfinite(waveforms).all()):
        raise RunError(NOT_FINITE)
    place = 0
    for unit in batch:
        seconds = unit.seconds | {"generate": middle - begin, "decode": end - middle}
        count, samples = unit.request.count, max(1, round(_seconds(unit.request) * rate))
        for i in range(count):
            # A copy: the sounds of others shall not live as long as this one.
            wave = waveforms[place + i, :samples].clone()[None]
            unit.made.append(Audio(wave, rate, unit.request.seed + i, seconds, count, unit.notes))
        place += count
