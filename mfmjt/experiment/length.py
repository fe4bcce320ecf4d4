"""The paper's third open question: sounds that are longer than what the network was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mfmjt.evaluate.classifier import load_classifier
from mfmjt.evaluate.examples import Examples, procedural
from mfmjt.evaluate.onsets import detect_onsets, onset_f1
from mfmjt.experiment.base import Arm, Claim, Experiment, Row, Trained, ways_at
from mfmjt.families import Bundle
from mfmjt.meanflow import Sampling
from mfmjt.pipeline.windows import OVERLAP, Joiner, Noise, plan
from mfmjt.plotting import COLORS, figure

__all__ = ["EXPERIMENT", "looping", "made"]

POSITIONS = ("rotary", "none", "sinusoidal", "learned")
WINDOW = 120
"""Latents of a training window, 3.84 s."""
SECONDS = 4
"""Of a window of a long sound."""
SEGMENT = 8.0
"""Seconds of the parts in which a long sound is judged."""
SHORTEST = 1.0
"""Seconds after which a sound may be said to repeat itself."""
PANELS = {
    "onset_f1": "onset F1",
    "class_accuracy": "class",
    "level": "level, dB over real",
}


def _arms(quick: bool) -> tuple[Arm, ...]:
    settings = {"window": WINDOW, "batch": 8}
    return tuple(
        Arm(name, {**settings, "overrides.positions": name}, ways_at((1,))) for name in POSITIONS
    )


def made(bundle: Bundle, examples: Examples, window: int | None) -> tuple[Tensor, Tensor]:
    """Make long sounds in one pass, or of windows of so many seconds.

    Returns:
        Waveforms (n, S), and latents (n, N, C) of one pass or of all windows one after another.
    """
    codec, latents = bundle.codec, []
    rate = bundle.network.config.latent_rate
    noise = Noise(examples.seed, len(examples), codec.latent_dim)
    fade = 0 if window is None else round(OVERLAP * rate)
    joiner = Joiner(bundle.decode, codec.hop, fade)
    length = int(examples.duration) if window is None else window
    for part in plan(length, lambda upto: examples.duration if upto >= examples.duration else None):
        sizes = bundle.lengths(part.duration)
        begin = round(part.start * rate)
        cut = {"video": (8, sizes.frames), "sync": (25, sizes.sync)}
        features = {name: rows.to(bundle.device) for name, rows in examples.features.items()}
        for name, (per_second, count) in cut.items():
            # Whole segments may end after the clip, which then stands still.
            at = per_second * part.start + torch.arange(count)
            rows = features[name]
            features[name] = rows[:, at.clamp(max=rows.shape[1] - 1)]
        sampling = Sampling()
        cond = bundle.conditions(features, sizes.latents, sampling)
        found = bundle.latents(noise(begin, sizes.latents).to(bundle.device), cond, sampling)
        latents.append(found.float())
        joiner.add(begin, latents[-1])
    samples = round(examples.duration * codec.sample_rate)
    return joiner.finish()[:, :samples], torch.cat(latents, dim=1)


def looping(latents: Tensor, rate: float) -> float:
    """Return the largest mean cosine of latents (n, N, C) with those at one distance in time.

    Latents are taken less their mean over time, distances from 1 s to half of the sound; the mean
    is over clips.
    """
    x = latents - latents.mean(dim=1, keepdim=True)
    x = torch.nn.functional.normalize(x, dim=2)
    lags = range(round(SHORTEST * rate), x.shape[1] // 2)
    each = torch.stack([(x[:, lag:] * x[:, :-lag]).sum(2).mean(1) for lag in lags])
    return float(each.amax(dim=0).mean())


@torch.inference_mode()
def _probe(trained: Trained) -> Iterator[Row]:
    """Yield figures of each segment of long sounds, made in both ways, and of the real ones."""
    bundle = trained.bundle
    clips, seconds = max(2, len(trained.examples) // 8), 32.0 if trained.quick else 64.0
    examples = procedural(bundle.encoders, clips, split="test", duration=seconds, batch=1)
    rate = bundle.network.config.latent_rate
    encoded = torch.cat(
        [bundle.codec.encode(w.to(bundle.device))[0] for w in examples.audio.split(1)]
    )
    for way, (waves, latents) in {
        "real": (examples.audio, encoded),
        "one pass": made(bundle, examples, None),
        "windows": made(bundle, examples, SECONDS),
    }.items():
        yield {"way": way, "looping": round(looping(latents, rate), 4)}
        for segment in _segments(examples, waves):
            yield {"way": way, **segment}


def _segments(examples: Examples, waves: Tensor) -> Iterator[Row]:
    """Yield onset F1, class and level of each part of the sounds (n, S)."""
    assert examples.events is not None
    assert examples.labels is not None
    rate = examples.sample_rate
    classifier = load_classifier()
    heard = [detect_onsets(waves[i], rate) for i in examples.impact]
    events = [examples.events[i] for i in examples.impact]
    for start in np.arange(0, examples.duration, SEGMENT):
        first, last = round(start * rate), round((start + SEGMENT) * rate)
        part, real = waves[:, first:last], examples.audio[:, first:last]

        def own(times: np.ndarray, start: float = float(start)) -> np.ndarray:
            return times[(times >= start) & (times < start + SEGMENT)]

        score = onset_f1([own(t) for t in events], [own(t) for t in heard])
        right = classifier.judge(part)[0] == examples.labels
        yield {
            "from": float(start),
            "onset_f1": round(score.f1, 4),
            "class_accuracy": round(float(right.float().mean()), 4),
            "level": round(float((_level(part) - _level(real)).mean()), 2),
        }


def _level(waves: Tensor) -> Tensor:
    """Level of sounds (n, S) in dB."""
    return 10 * torch.log10(waves.square().mean(dim=1).clamp(min=1e-8))


def _mean(probes: list[Row], key: str, **wanted: object) -> float:
    found = [r[key] for r in probes if key in r and all(r.get(k) == v for k, v in wanted.items())]
    return float(np.mean(found))


def _draw(rows: list[Row], probes: list[Row], folder: Path) -> dict[str, str]:
    segments = sorted({row["from"] for row in probes if "from" in row})
    with figure(folder / "length.svg", (9.5, 3.4)) as drawn:
        for axis, (key, title) in zip(drawn.subplots(1, len(PANELS)), PANELS.items(), strict=True):
            for name, color in zip(POSITIONS, COLORS, strict=True):
                for way, style in (("one pass", "-"), ("windows", "--")):
                    means = [_mean(probes, key, arm=name, way=way, **{"from": s}) for s in segments]
                    label = f"{name}, {way}"
                    axis.plot(segments, means, f"o{style}", color=color, label=label, markersize=3)
            axis.set_title(title)
            axis.set_xlabel("s from the start")
            axis.grid(visible=True, alpha=0.3)
        handles, labels = axis.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=4)
    return {"length.svg": "Parts of 8 s of long sounds, made in one pass or of windows of 4 s."}


def _told(probes: list[Row]) -> str:
    lines = [
        "### Long sounds",
        "",
        "| positions | way | onset F1, first part | last part | class, first | last "
        "| level over real, first, dB | last | looping |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    last = max(row["from"] for row in probes if "from" in row)
    for name in POSITIONS:
        for way in ("one pass", "windows", "real"):
            figures = [
                f"{_mean(probes, key, arm=name, way=way, **{'from': at}):.{digits}f}"
                for key, digits in (("onset_f1", 3), ("class_accuracy", 2), ("level", 1))
                for at in (0.0, last)
            ]
            looped = _mean(probes, "looping", arm=name, way=way)
            lines.append(f"| {name} | {way} | {' | '.join(figures)} | {looped:.3f} |")
    lines += [
        "",
        "Means over seeds. Looping is the largest mean cosine of latents, less their mean, with "
        "those at one distance of 1 s or more; a real sound repeats itself, too, where its events "
        "do. Windows share noise and latents where they overlap.",
    ]
    return "\n".join(lines)


EXPERIMENT = Experiment(
    title="Length: trained on 4 s, made at 64 s",
    question="The paper's network has no absolute positions, so that it makes sounds of any "
    "length. How much longer than it was trained on (arXiv 2509.06389 asks for minutes), and does "
    "the rotation of rotary positions help or harm there?",
    method="Four networks are trained on windows of 3.84 s: with rotary positions, with none, with "
    "sinusoids and with learned rows that are added to latent and video tokens. Each makes sound "
    "for clips of 64 s (32 s in the quick grid) in one pass and of windows of 4 s that overlap by "
    "1 s; every 8 s are judged by themselves. The table of figures is of clips of 8 s, made in "
    "one pass.",
    limits="All networks see synchronization features at their own times, whatever their "
    "positions: that alone says when something happens. A learned row that no training window "
    "reached is as it was drawn.",
    arms=_arms,
    claims=tuple(
        Claim(
            f"At twice the length of training, rotary is better than {other}",
            {"arm": "rotary"},
            {"arm": other},
            key,
        )
        for key in ("onset_f1", "frechet")
        for other in POSITIONS[1:]
    ),
    draw=_draw,
    probe=_probe,
    told=_told,
)
