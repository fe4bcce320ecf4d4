"""How good the generated sound is: one report per network and number of steps, and their table.

A report is made on clips of the procedural set, whose class and event times are known. Every figure
stands beside what the same judge says of the real audio, so that the judge's own error shows.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mfmjt import meanflow
from mfmjt.codec import NanoCodec
from mfmjt.data import foley
from mfmjt.encoders import NanoEncoders
from mfmjt.errors import InputError
from mfmjt.evaluate.classifier import Classifier, load_classifier
from mfmjt.evaluate.frechet import frechet_distance
from mfmjt.evaluate.onsets import OnsetScore, detect_onsets, match_onsets
from mfmjt.files import atomic_path
from mfmjt.meanflow.guidance import GuidanceMode
from mfmjt.model import MFMJT, Conditions

__all__ = [
    "CONDITIONS",
    "Examples",
    "Parts",
    "Report",
    "derangement",
    "evaluate",
    "examples",
    "generate",
    "load_parts",
    "read_reports",
    "suite",
    "table",
    "write_report",
]

CONDITIONS = ("both", "video", "text")
TOLERANCE = 0.05  # s, for generated sound against the events
CODEC_TOLERANCE = 0.02  # s, for decoded sound against the original
RESAMPLES = 1000
DIVERSITY_CLIPS = 48  # generated twice

Progress = Callable[[str, float], None]
"""Called with a stage's name and how much of it is done, from 0 to 1."""


class HasParts(Protocol):
    """A pipeline, or anything else that holds the three parts."""

    network: Any
    codec: Any
    encoders: Any


@dataclass
class Parts:
    """The three parts of a model; a `Pipeline` has the same attributes.

    Attributes:
        network: Average velocity on latents.
        codec: Waveform <-> latent.
        encoders: Frames and text -> features.
    """

    network: Any
    codec: Any
    encoders: Any


def load_parts(
    folder: str | os.PathLike[str] = "nano",
    network: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
) -> Parts:
    """Load a model folder, or the one that ships.

    Args:
        folder: Holds network.safetensors, codec.safetensors and encoders.safetensors; or `nano`.
        network: Another network file for the same codec and encoders.
        device: Where to put the parts.

    Raises:
        InputError: A file is missing or of something else.
    """
    folder = Path(folder)
    shipped = Path(__file__).parents[1] / "pretrained" / folder
    if not folder.is_dir() and shipped.is_dir():
        folder = shipped
    parts = (
        MFMJT.load(network or folder / "network.safetensors"),
        NanoCodec.load(folder / "codec.safetensors"),
        NanoEncoders.load(folder / "encoders.safetensors"),
    )
    return Parts(*(part.to(device).eval() for part in parts))


@dataclass
class Examples:
    """Clips with their features, as the network gets them.

    Attributes:
        indices: Numbers of the clips within the split.
        split: Name of the split.
        audio: Real sound (n, S) float32 at 16 kHz.
        labels: Index of each clip's class in `foley.CLASSES`, (n,) int64.
        events: Times of each clip's onsets in seconds; empty for continuous classes.
        captions: One sentence per clip.
        video, sync, text: Features (n, tokens, dim) on the CPU.
        seconds: What rendering and encoding took, by stage.
    """

    indices: list[int]
    split: str
    audio: Tensor
    labels: Tensor
    events: list[np.ndarray]
    captions: list[str]
    video: Tensor
    sync: Tensor
    text: Tensor
    seconds: dict[str, float]

    def __len__(self) -> int:
        return len(self.indices)

    def first(self, count: int) -> Examples:
        """The first `count` clips, or all if there are fewer."""
        cut = {
            field.name: getattr(self, field.name)[:count]
            for field in dataclasses.fields(self)
            if field.name not in ("split", "seconds")
        }
        return dataclasses.replace(self, **cut)


class _Stopwatch:
    """Adds up wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began


def _silent(stage: str, done: float) -> None:
    pass


def _device(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device


@torch.inference_mode()
def examples(
    encoders: Any,
    clips: int = 200,
    seed: int = 0,
    split: str = "test",
    *,
    duration: float = foley.DURATION,
    batch: int = 20,
    progress: Progress = _silent,
) -> Examples:
    """Render clips and encode their frames and captions; the frames are not kept.

    Args:
        encoders: Frame and text encoders.
        clips: Number of clips.
        seed: Which clips: numbers seed * clips to (seed + 1) * clips - 1 of the split, so two
            seeds share none.
        split: Split of the procedural set.
        duration: Length of a clip in seconds.
        batch: Clips encoded at once.
        progress: Called as (stage, fraction done) after every batch.

    Raises:
        InputError: Fewer than two clips, or a negative seed.
    """
    if clips < 2 or seed < 0:
        raise InputError(
            f"{clips} clips with seed {seed} cannot be evaluated: at least 2 clips and a seed of "
            "at least 0 are needed."
        )
    watch = _Stopwatch()
    device = _device(encoders)
    indices = list(range(seed * clips, (seed + 1) * clips))
    audio: list[Tensor] = []
    labels: list[int] = []
    events: list[np.ndarray] = []
    captions: list[str] = []
    features: dict[str, list[Tensor]] = {"video": [], "sync": [], "text": []}
    for start in range(0, clips, batch):
        with watch("render"):
            rows = [foley.clip(i, split, duration=duration) for i in indices[start : start + batch]]
            frames = torch.stack([torch.from_numpy(row.frames) for row in rows])
        audio += [torch.from_numpy(row.audio) for row in rows]
        labels += [row.label for row in rows]
        events += [np.asarray(row.events, dtype=np.float64) for row in rows]
        captions += [row.caption for row in rows]
        with watch("encode"):
            shown = foley.frames_shown(frames.shape[1], encoders.video_fps)
            features["video"].append(encoders.encode_frames(frames[:, shown].to(device)).cpu())
            features["sync"].append(encoders.encode_sync(frames.to(device)).cpu())
            features["text"].append(encoders.encode_text([row.caption for row in rows]).cpu())
        progress("render", (start + len(rows)) / clips)
    return Examples(
        indices,
        split,
        torch.stack(audio),
        torch.tensor(labels),
        events,
        captions,
        **{name: torch.cat(parts) for name, parts in features.items()},
        seconds=watch.seconds,
    )


@torch.inference_mode()
def generate(
    parts: HasParts,
    clips: Examples,
    *,
    steps: int = 1,
    guidance: float = 1.5,
    mode: GuidanceMode = "cfg_scaled",
    conditions: str = "both",
    instantaneous: bool = False,
    seed: int = 0,
    batch: int = 20,
    progress: Progress = _silent,
    watch: Any = None,
) -> Tensor:
    """Sound for every clip.

    Args:
        parts: Network and codec.
        clips: What to condition on.
        steps: Evaluations of the network, twice that many with guidance.
        guidance: Weight w of the conditioned velocity.
        mode: `cfg_scaled`, `cfg` or `none`.
        conditions: `both`, `video` (frames alone) or `text` (caption alone).
        instantaneous: Ask the network for u(z, t, t), as a flow-matching network was trained.
        seed: Decides the noise; clip number i gets the same noise in every batch size and set.
        batch: Clips generated at once.
        progress: Called as (stage, fraction done) after every batch.
        watch: Stopwatch for the stages `generate` and `decode`.

    Returns:
        Waveforms (n, S) float32 on the CPU, as long as the real ones.

    Raises:
        InputError: Unknown conditions.
    """
    if conditions not in CONDITIONS:
        raise InputError(
            f"Unknown conditions {conditions!r}: there are {', '.join(CONDITIONS)}. Give one."
        )
    watch = watch or _Stopwatch()
    network, codec = parts.network, parts.codec
    device = _device(network)
    names = {"both": ("video", "sync", "text"), "video": ("video", "sync"), "text": ("text",)}
    samples = clips.audio.shape[1]
    length = -(-samples // codec.hop)

    waves: list[Tensor] = []
    for start in range(0, len(clips), batch):
        rows = clips.indices[start : start + batch]
        with watch("generate"):
            noise = torch.stack([_noise(seed, row, length, codec.latent_dim) for row in rows])
            cond = {
                name: getattr(clips, name)[start : start + batch].to(device)
                for name in names[conditions]
            }
            latent = meanflow.sample(
                network,
                noise.to(device),
                steps=steps,
                cond={"cond": _conditions(network, len(rows), length, cond)},
                null={"cond": _conditions(network, len(rows), length, {})},
                guidance=guidance,
                mode=mode,
                instantaneous=instantaneous,
            )
            latent = network.unnormalize(latent)
            _finish(device)
        with watch("decode"):
            waves.append(codec.decode(latent.float())[:, :samples].cpu())
        progress("generate", (start + len(rows)) / len(clips))
    return torch.cat(waves)


def _conditions(network: MFMJT, rows: int, length: int, given: dict[str, Tensor]) -> Conditions:
    """Conditions computed once for all steps; null ones, too, have a row for every clip."""
    encoded = network.conditions(**given, latent_length=length)
    return Conditions(*(part.expand(rows, *part.shape[1:]) for part in encoded))


def _noise(seed: int, index: int, length: int, dim: int) -> Tensor:
    # NumPy's streams are the same on every platform and device.
    rng = np.random.default_rng([seed, index])
    return torch.from_numpy(rng.standard_normal((length, dim), dtype=np.float32))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def derangement(count: int, rng: np.random.Generator) -> np.ndarray:
    """A random permutation (count,) that moves every element: one cycle through all.

    Raises:
        InputError: Fewer than two elements.
    """
    if count < 2:
        raise InputError(f"{count} clips cannot be exchanged with one another. Use more clips.")
    order = rng.permutation(count)
    result = np.empty(count, dtype=np.int64)
    result[order] = np.roll(order, 1)
    return result


@dataclass
class Report:
    """Every figure of one network at one number of steps; `dataclasses.asdict` gives the JSON.

    Onset figures are over the clips of impact classes, micro-averaged (onsets are counted over all
    clips), at ±50 ms against the known event times. Shuffled means: scored against the events of
    another impact clip, which is what sound made for another clip's video gets here. `interval`
    holds 95 % bootstrap intervals over clips; the Fréchet distances have none, because resampling
    biases them. `frechet_real` is the distance between the real audio of these clips and as many
    clips of the validation split: what perfect sound would get. `diversity` is how far apart, in
    the classifier's embedding, two sounds made for one clip from different noise lie, over how far
    apart two real clips of one class do: near 0 for a network that answers with the mean of all
    sounds that would fit, below 1 for a good one, since the picture settles part of the sound.
    """

    model: str
    clips: int
    impact_clips: int
    split: str
    seed: int
    steps: int
    guidance: float
    mode: str
    conditions: str
    instantaneous: bool
    onset_f1: float = 0.0
    onset_precision: float = 0.0
    onset_recall: float = 0.0
    onset_f1_shuffled: float = 0.0
    onset_f1_real: float = 0.0
    onset_f1_real_shuffled: float = 0.0
    class_accuracy: float = 0.0
    class_accuracy_real: float = 0.0
    frechet: float = 0.0
    frechet_real: float = 0.0
    diversity: float = 0.0
    text_class_accuracy: float | None = None
    text_frechet: float | None = None
    codec_onset_f1_20ms: float | None = None
    codec_class_kept: float | None = None
    codec_class_accuracy: float | None = None
    frechet_codec: float | None = None
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds_per_clip: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)


def _scores(
    references: Sequence[np.ndarray], estimates: Sequence[np.ndarray], tolerance: float
) -> np.ndarray:
    """Matched, reference and estimated onsets of each clip, (n, 3)."""
    return np.array(
        [
            (match_onsets(r, e, tolerance), len(r), len(e))
            for r, e in zip(references, estimates, strict=True)
        ]
    ).reshape(-1, 3)


def _total(counts: np.ndarray) -> OnsetScore:
    return OnsetScore(*(int(n) for n in counts.sum(axis=0)))


def _f1_interval(counts: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % bootstrap interval of the micro-averaged F1 over clips."""
    drawn = rng.integers(0, len(counts), (RESAMPLES, len(counts)))
    matched, reference, estimated = np.moveaxis(counts[drawn].sum(axis=1), 1, 0)
    f1 = 2 * matched / np.maximum(reference + estimated, 1)
    low, high = np.quantile(f1, (0.025, 0.975))
    return float(low), float(high)


def _share_interval(right: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % bootstrap interval of the share of true values over clips."""
    drawn = rng.integers(0, len(right), (RESAMPLES, len(right)))
    low, high = np.quantile(right[drawn].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def _refuse_silence_of_reason(waves: Tensor) -> None:
    if not bool(torch.isfinite(waves).all()):
        raise InputError(
            "The network made NaN or infinite samples, which cannot be judged. "
            "Its weights are damaged or untrained: give others."
        )


@dataclass
class _Judgement:
    onsets: list[np.ndarray]
    predicted: np.ndarray
    embedding: np.ndarray


def _judge(classifier: Classifier, waves: Tensor) -> _Judgement:
    predicted, embedding = classifier.judge(waves)
    return _Judgement(
        [detect_onsets(wave, foley.SAMPLE_RATE) for wave in waves],
        predicted.numpy(),
        embedding.double().numpy(),
    )


@torch.inference_mode()
def _decoded(codec: Any, audio: Tensor, batch: int) -> Tensor:
    device = _device(codec)
    waves = []
    for rows in audio.split(batch):
        mean, _ = codec.encode(rows.to(device))
        waves.append(codec.decode(mean)[:, : audio.shape[1]].cpu())
    return torch.cat(waves)


def evaluate(
    parts: HasParts,
    classifier: Classifier | None = None,
    *,
    clips: int | Examples = 200,
    seed: int = 0,
    steps: int = 1,
    guidance: float = 1.5,
    mode: GuidanceMode = "cfg_scaled",
    split: str = "test",
    conditions: str = "both",
    instantaneous: bool = False,
    text_only: bool = True,
    codec: bool = True,
    batch: int = 20,
    model: str = "nano",
    progress: Progress = _silent,
) -> Report:
    """Generate sound for held-out clips and judge it.

    Args:
        parts: Network, codec and encoders: a `Pipeline`, or `Parts`.
        classifier: The judge of class and embedding; the shipped one by default.
        clips: Number of clips, or examples made before by `examples` with the same `seed`.
        seed: Decides which clips and the noise.
        steps: Evaluations of the network from noise to sound.
        guidance: Weight of the conditioned velocity.
        mode: `cfg_scaled`, `cfg` or `none`.
        split: Split of the procedural set.
        conditions: `both`, `video` or `text`.
        instantaneous: For flow-matching networks, which know u(z, t, t) only.
        text_only: Also generate from the captions alone and report their class accuracy.
        codec: Also encode and decode the real audio and report what is kept.
        batch: Clips at once.
        model: What to call the network in the report.
        progress: Called as (stage, fraction done) after every batch.

    Returns:
        The report.

    Raises:
        InputError: Unknown conditions, too few clips, or a network that makes NaN.
    """
    classifier = classifier or load_classifier()
    watch = _Stopwatch()
    if isinstance(clips, int):
        clips = examples(parts.encoders, clips, seed, split, batch=batch, progress=progress)
    watch.seconds.update(clips.seconds)
    options: dict[str, Any] = {
        "steps": steps,
        "guidance": guidance,
        "mode": mode,
        "instantaneous": instantaneous,
        "seed": seed,
        "batch": batch,
    }
    waves = generate(parts, clips, conditions=conditions, progress=progress, watch=watch, **options)
    _refuse_silence_of_reason(waves)
    with watch("judge"):
        real = _judge(classifier, clips.audio)
        made = _judge(classifier, waves)

    rng = np.random.default_rng(seed)
    labels = clips.labels.numpy()
    impact = np.flatnonzero([foley.CLASSES[label] in foley.IMPACT_CLASSES for label in labels])
    events = [clips.events[i] for i in impact]
    made_onsets = [made.onsets[i] for i in impact]
    real_onsets = [real.onsets[i] for i in impact]
    other = [events[i] for i in derangement(len(impact), rng)]
    counts = _scores(events, made_onsets, TOLERANCE)
    shuffled = _scores(other, made_onsets, TOLERANCE)
    right = made.predicted == labels
    score = _total(counts)

    report = Report(
        model=model,
        clips=len(clips),
        impact_clips=len(impact),
        split=clips.split,
        seed=seed,
        steps=steps,
        guidance=guidance,
        mode=mode,
        conditions=conditions,
        instantaneous=instantaneous,
        onset_f1=score.f1,
        onset_precision=score.precision,
        onset_recall=score.recall,
        onset_f1_shuffled=_total(shuffled).f1,
        onset_f1_real=_total(_scores(events, real_onsets, TOLERANCE)).f1,
        onset_f1_real_shuffled=_total(_scores(other, real_onsets, TOLERANCE)).f1,
        class_accuracy=float(right.mean()),
        class_accuracy_real=float((real.predicted == labels).mean()),
        frechet=frechet_distance(made.embedding, real.embedding),
        environment=_environment(_device(parts.network)),
    )
    report.interval = {
        "onset_f1": _f1_interval(counts, rng),
        "onset_f1_shuffled": _f1_interval(shuffled, rng),
        "class_accuracy": _share_interval(right, rng),
    }
    with watch("judge"):
        samples = clips.audio.shape[1] / foley.SAMPLE_RATE
        others = torch.stack(
            [
                torch.from_numpy(foley.clip(i, "validation", duration=samples, render=False).audio)
                for i in clips.indices
            ]
        )
        _, embedding = classifier.judge(others)
        report.frechet_real = frechet_distance(embedding.numpy(), real.embedding)
    some = clips.first(DIVERSITY_CLIPS)
    again = generate(parts, some, conditions=conditions, **(options | {"seed": seed + 1}))
    spread = np.linalg.norm(
        made.embedding[: len(some)] - classifier.judge(again)[1].double().numpy(), axis=1
    )
    # Clips of one number have one class in every split.
    apart = np.linalg.norm(real.embedding - embedding.double().numpy(), axis=1)
    report.diversity = float(spread.mean() / apart.mean())

    if text_only:
        spoken = (
            waves
            if conditions == "text"
            else generate(parts, clips, conditions="text", progress=progress, **options)
        )
        predicted, embedding = classifier.judge(spoken)
        said = predicted.numpy() == labels
        report.text_class_accuracy = float(said.mean())
        report.text_frechet = frechet_distance(embedding.numpy(), real.embedding)
        report.interval["text_class_accuracy"] = _share_interval(said, rng)
    if codec:
        with watch("codec"):
            kept = _judge(classifier, _decoded(parts.codec, clips.audio, batch))
        decoded = _scores(real_onsets, [kept.onsets[i] for i in impact], CODEC_TOLERANCE)
        report.codec_onset_f1_20ms = _total(decoded).f1
        report.codec_class_kept = float((kept.predicted == real.predicted).mean())
        report.codec_class_accuracy = float((kept.predicted == labels).mean())
        report.frechet_codec = frechet_distance(kept.embedding, real.embedding)
        report.interval["codec_onset_f1_20ms"] = _f1_interval(decoded, rng)

    for label, name in enumerate(foley.CLASSES):
        own = labels == label
        if not own.any():
            continue
        row = {"clips": float(own.sum()), "class_accuracy": float(right[own].mean())}
        if name in foley.IMPACT_CLASSES:
            row["onset_f1"] = _total(counts[own[impact]]).f1
        if text_only:
            row["text_class_accuracy"] = float(said[own].mean())
        report.per_class[name] = row
    report.seconds_per_clip = {
        stage: seconds / len(clips) for stage, seconds in watch.seconds.items()
    }
    return report


def _environment(device: torch.device) -> dict[str, Any]:
    """What the figures were made with; the commit only in a checkout."""
    stamp: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
    }
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
        if found.returncode == 0:
            stamp["commit"] = found.stdout.strip()
    return stamp


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("onset_f1", "onset F1", 3),
    ("onset_f1_shuffled", "shuffled", 3),
    ("class_accuracy", "class accuracy", 3),
    ("frechet", "Fréchet", 2),
    ("diversity", "diversity", 2),
    ("text_class_accuracy", "text only: class", 3),
    ("text_frechet", "text only: Fréchet", 2),
)


def table(reports: Sequence[Report]) -> str:
    """Markdown table: a row per report, then the real audio and the codec as the bounds."""
    lines = [
        "| network | steps | " + " | ".join(name for _, name, _ in _COLUMNS) + " | s per clip |",
        "|---|---|" + "---|" * (len(_COLUMNS) + 1),
    ]

    def cell(report: Report, name: str, digits: int) -> str:
        value = getattr(report, name)
        if value is None:
            return ""
        text = f"{value:.{digits}f}"
        if name in report.interval:
            low, high = report.interval[name]
            text += f" ({low:.{digits}f} to {high:.{digits}f})"
        return text

    for report in reports:
        seconds = sum(report.seconds_per_clip.get(stage, 0.0) for stage in ("generate", "decode"))
        cells = [cell(report, name, digits) for name, _, digits in _COLUMNS]
        lines.append(f"| {report.model} | {report.steps} | {' | '.join(cells)} | {seconds:.3f} |")
    if reports:
        last = reports[0]
        lines.append(
            f"| real audio | | {last.onset_f1_real:.3f} | {last.onset_f1_real_shuffled:.3f} | "
            f"{last.class_accuracy_real:.3f} | {last.frechet_real:.2f} | 1.00 | | | |"
        )
        for report in reports:
            if report.codec_class_accuracy is not None:
                lines.append(
                    f"| codec alone (onsets against the original's, ±20 ms) | | "
                    f"{report.codec_onset_f1_20ms:.3f} | | {report.codec_class_accuracy:.3f} | "
                    f"{report.frechet_codec:.2f} | | | | |"
                )
                break
    return "\n".join(lines) + "\n"


def write_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a report as indented JSON.

    Raises:
        RunError: The folder cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")


def read_reports(folder: str | os.PathLike[str]) -> list[Report]:
    """The reports that `suite` wrote, by network and steps.

    Raises:
        InputError: There are none.
    """
    reports = []
    for path in sorted(Path(folder).glob("evaluate_*.json")):
        values = json.loads(path.read_text())
        values["interval"] = {k: tuple(v) for k, v in values["interval"].items()}
        reports.append(Report(**values))
    if not reports:
        raise InputError(f"No evaluate_*.json in {folder}. Make them with the evaluation suite.")
    return sorted(reports, key=lambda report: (report.instantaneous, report.steps))


def suite(
    mean_flow: HasParts,
    flow_matching: HasParts | None,
    out: str | os.PathLike[str],
    classifier: Classifier | None = None,
    *,
    clips: int = 200,
    seed: int = 0,
    steps: Sequence[int] = (1, 4, 25),
    guidance: float = 1.5,
    mode: GuidanceMode = "cfg_scaled",
    batch: int = 20,
    progress: Progress = _silent,
) -> list[Report]:
    """The table: MeanFlow and flow matching at each number of steps on the same clips and noise.

    Writes evaluate_{meanflow,flow}_{steps}.json and table.md into `out` as it goes.

    Args:
        mean_flow: The MeanFlow network with its codec and encoders.
        flow_matching: The network of the same size and budget trained without MeanFlow, if any;
            codec and encoders must be the same.
        out: Folder, made if missing.
        classifier: The judge; the shipped one by default.
        clips: Number of test clips.
        seed: Decides which clips and the noise.
        steps: Numbers of steps to try.
        guidance: As in `evaluate`.
        mode: As in `evaluate`.
        batch: As in `evaluate`.
        progress: As in `evaluate`.

    Returns:
        The reports in the order of the table.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    classifier = classifier or load_classifier()
    made = examples(mean_flow.encoders, clips, seed, batch=batch, progress=progress)
    reports: list[Report] = []
    for name, stem, parts in (
        ("MeanFlow", "meanflow", mean_flow),
        ("flow matching", "flow", flow_matching),
    ):
        if parts is None:
            continue
        for count in steps:
            report = evaluate(
                parts,
                classifier,
                clips=made,
                seed=seed,
                steps=count,
                guidance=guidance,
                mode=mode,
                instantaneous=stem == "flow",
                codec=not reports,
                batch=batch,
                model=name,
                progress=progress,
            )
            write_report(report, out / f"evaluate_{stem}_{count}.json")
            reports.append(report)
            with atomic_path(out / "table.md") as temporary:
                temporary.write_text(table(reports))
    return reports
