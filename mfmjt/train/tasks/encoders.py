"""Training of the nano encoders on procedural or open clips, contrastively.

Frames and captions learn to agree as CLIP's do (Radford et al., 2021, arXiv:2103.00020), where all
captions of what is seen are right for a frame of it (supervised contrast, Khosla et al., 2020,
arXiv:2004.11362). Motion learns to find its own moment of sound among all moments of the batch, as
Synchformer's first stage does (Iashin et al., 2024, arXiv:2401.16423), against an audio tower that
is thrown away. One thing goes beyond those recipes: the sets know when events happen, and an
auxiliary head, thrown away as well, learns to say so from the motion features.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.codec.mel import filterbank, stft
from mfmjt.data import foley, wordings
from mfmjt.data._captions import words
from mfmjt.data.open_set import clips_of, has_picture, open_set
from mfmjt.encoders import NanoEncoders, NanoEncodersConfig
from mfmjt.errors import InputError
from mfmjt.train.tasks.procedural import (
    ProceduralTask,
    ProceduralTraining,
    render_array,
    whole_batch,
)
from mfmjt.train.trainer import Batch, TrainingResult, train

__all__ = ["EncodersTask", "EncodersTraining", "train_encoders"]

_REACH = 4
_PER_FRAME = 4  # mel frames per video frame
_BANDS = 40


@dataclass(frozen=True)
class EncodersTraining(ProceduralTraining):
    """How the encoders are trained.

    Attributes:
        batch: Clips per step for the frame and text encoders.
        pictures: Frames of each.
        windows: Clips per step for the sync encoder.
        window: Frames of each.
        clips: Training clips rendered (2.5 MB each, on disk).
        on_disk: Keep the rendered frames in `out`; otherwise in memory.
        recordings: Corpus of the open set, from `mfmjt data real`, of which clips with a picture
            are taken; null for the procedural set.
        init_from: Encoders to start the frame and sync encoders from, of the same sizes.
        text_from: Encoders whose text encoder is taken and stays as it is, such as the stage
            `text` makes; null to train one.
        model: Sizes of the encoders.
    """

    out: Path = Path("runs/encoders")
    steps: int = 1200
    windows: int = 10
    window: int = 48
    batch: int = 36
    pictures: int = 2
    clips: int = 1800
    validation_clips: int = 96
    on_disk: bool = True
    recordings: Path | None = None
    init_from: Path | None = None
    text_from: Path | None = None
    save_every: int = 200
    model: NanoEncodersConfig = field(default_factory=NanoEncodersConfig)


class _AudioTower(nn.Module):
    """Log-mel of a window `(B, T, 160)`, four frames per video frame -> `(B, T - 8, dim)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.stem = nn.Linear(_PER_FRAME * _BANDS, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(_REACH))
        self.mixes = nn.ModuleList(nn.Conv1d(dim, dim, 3) for _ in range(_REACH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            x = x[:, 1:-1] + mix(F.gelu(norm(x)).transpose(1, 2)).transpose(1, 2)
        return F.gelu(x)


class _Towers(nn.Module):
    """The encoders and everything that only their training needs."""

    def __init__(self, config: NanoEncodersConfig) -> None:
        super().__init__()
        dim = config.dim
        self.encoders = NanoEncoders(config)
        self.audio = _AudioTower(dim)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(dim, 64) for name in ("frames", "text", "motion", "audio")}
        )
        self.event = nn.Linear(dim, 1)
        # Temperatures 1 / 14, CLIP's start.
        self.scale = nn.Parameter(torch.full((2,), 2.66))

    def embed(self, name: str, x: Tensor) -> Tensor:
        return F.normalize(self.heads[name](x).float(), dim=-1)

    def temperatures(self) -> Tensor:
        return self.scale.clamp(max=4.6).exp()


class _Clips:
    """A split of the set, ready for training."""

    def __init__(self, split: str, count: int, config: EncodersTraining) -> None:
        name = f"{split}_{count}"
        if config.recordings is not None:
            name += f"_{open_set(config.recordings).recordings.digest[:8]}"
        path = config.out / f"{name}.npy" if config.on_disk else None
        size = NanoEncoders.frame_size
        self.length = round(foley.DURATION * foley.FPS)
        numbered = (i for i in itertools.count() if has_picture(i, config.recordings))
        numbers = list(itertools.islice(numbered, count))
        self.frames = render_array(
            path, count, (self.length, size, size, 3), "uint8",
            functools.partial(_frames, config.recordings, split, config.seed, numbers),
            config.workers,
        )  # fmt: skip
        make = clips_of(config.recordings)
        clips = [make(i, split, config.seed, render=False) for i in numbers]
        self.captions = [clip.caption for clip in clips]
        self.seen = np.unique([clip.seen for clip in clips], return_inverse=True)[1]
        self.events = [clip.events for clip in clips]
        # Four frames of silence on both sides: what a window at the very start looks back on.
        self.mel = np.stack([_log_mel(clip.audio) for clip in clips]).astype(np.float16)
        self.targets = np.stack([_event_targets(clip.events, self.length) for clip in clips])


def _frames(
    recordings: Path | None, split: str, seed: int, numbers: list[int], row: int
) -> np.ndarray[Any, Any]:
    make = clips_of(recordings)
    frames = make(numbers[row], split, seed, size=NanoEncoders.frame_size).frames
    assert frames is not None
    return frames


def _log_mel(audio: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`(S,)` -> `(T + 8, 160)`: row i + 4 is the sound during video frame i."""
    hop = foley.SAMPLE_RATE // foley.FPS // _PER_FRAME
    window = 512
    margin = (window - hop) // 2
    rate = hop * _PER_FRAME
    sound = torch.from_numpy(audio)
    sound = F.pad(sound, (_REACH * rate + margin, -len(sound) % rate + _REACH * rate + margin))
    spectrum = stft(sound, torch.hann_window(window), hop)
    basis = filterbank(foley.SAMPLE_RATE, window, _BANDS)
    mel = torch.log10((basis @ spectrum.abs()).clamp(min=1e-5))
    folded = (mel.T.reshape(-1, _PER_FRAME * _BANDS) + 3.0) / 1.5
    return folded.numpy()


def _event_targets(events: np.ndarray[Any, Any], length: int) -> np.ndarray[Any, Any]:
    """1 at the frame shown when an event sounds, falling to 0 over one and a half frames."""
    # Frame i shows the moment (i + 1/2) / fps.
    spots = events.astype(np.float64) * foley.FPS - 0.5
    away = np.abs(np.arange(length)[:, None] - spots).min(axis=1, initial=np.inf)
    return np.clip(1.0 - away / 1.5, 0.0, 1.0).astype(np.float32)


def _augment(frames: np.ndarray[Any, Any], rng: np.random.Generator) -> Tensor:
    """Apply what cameras, encoders and resizing do to frames.

    The same for all frames of a clip, but for the noise. Hue stays: it tells wood from steel.

    Args:
        frames: uint8 `(B, T, H, W, 3)`.
        rng: Of every draw.

    Returns:
        float `(B, T, 3, H, W)` in [-1, 1].
    """
    _, length, height, width, _ = frames.shape
    # Fresh noise for every pixel would cost more than the network; clips share one draw.
    grain = torch.from_numpy(rng.standard_normal(2 * frames[0].size, dtype=np.float32))
    clips = []
    for clip in frames:
        down, right = rng.integers(-4, 5, size=2)
        rows = np.clip(np.arange(height) + down, 0, height - 1)
        columns = np.clip(np.arange(width) + right, 0, width - 1)
        if rng.uniform() < 0.5:
            columns = columns[::-1]
        x = torch.from_numpy(clip[:, rows[:, None], columns]).permute(0, 3, 1, 2).float()
        x = x / 127.5 - 1.0
        if rng.uniform() < 0.4:
            soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
            x = torch.lerp(x, soft, float(rng.uniform(0.2, 0.9)))
        x = x * float(rng.uniform(0.8, 1.2)) + float(rng.uniform(-0.15, 0.15))
        start = int(rng.integers(x.numel()))
        x = x + float(rng.uniform(0, 0.04)) * grain[start : start + x.numel()].view(x.shape)
        # Blocks of eight pixels that flicker, as coarse quantization makes them.
        blocks = rng.standard_normal((length, 3, height // 8, 1, width // 8, 1), dtype=np.float32)
        x = x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8))
        x = x + float(rng.uniform(0, 0.03)) * torch.from_numpy(blocks)
        clips.append(x.flatten(4, 5).flatten(2, 3).clamp(-1, 1))
    return torch.stack(clips)


def _reword(text: str, rng: np.random.Generator) -> str:
    """Reword a caption as another person might: words dropped, in another order, or some."""
    words = text.split()
    choice = rng.uniform()
    if choice < 0.3:
        words = [word for word in words if rng.uniform() > 0.2] or words
    elif choice < 0.45:
        words = [words[i] for i in rng.permutation(len(words))]
    return " ".join(words)


def _contrast(a: Tensor, b: Tensor, scale: Tensor, positive: Tensor) -> Tensor:
    """InfoNCE in both directions with one or more positives per row; a, b `(n, d)` unit vectors."""
    logits = scale * a @ b.T
    targets = positive / positive.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))


class EncodersTask(ProceduralTask):
    """The encoders, and the towers and heads that only their training needs."""

    title = "encoders"
    figures = ("loss", "match", "sync", "event")

    def __init__(self, recipe: EncodersTraining) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.towers = _Towers(recipe.model)
        encoders = self.towers.encoders
        if recipe.init_from is not None:
            _take(encoders, recipe.init_from, "frame_encoder", "sync_encoder")
        if recipe.text_from is not None:
            given = _take(encoders, recipe.text_from, "text_encoder")
            encoders.text_encoder.requires_grad_(False)
        super().__init__(recipe, self.towers)
        self.clips = _Clips("train", recipe.clips, recipe)
        self.held_out = _Clips("validation", recipe.validation_clips, recipe)
        if recipe.text_from is not None:
            encoders.vocabulary = given.vocabulary
        elif recipe.recordings is not None:
            encoders.vocabulary = wordings.words(*self.clips.captions)
        else:
            encoders.vocabulary = words()

    def draw(self, step: int) -> Batch:
        """Draw frames and captions to match, and windows of motion and sound."""
        rng, _ = self.generators(step)
        match, sync = self._draw_match(rng), self._draw_sync(rng)
        return whole_batch(self.recipe.batch, self.figures, *match, *sync)

    def _draw_match(self, rng: np.random.Generator) -> tuple[Tensor, list[str], Tensor]:
        clips, c = self.clips, self.recipe
        rows = rng.choice(len(clips.seen), size=c.batch, replace=False)
        when = rng.integers(clips.length, size=(c.batch, c.pictures))
        frames = np.stack([clips.frames[row, t] for row, t in zip(rows, when, strict=True)])
        augmented = _augment(frames, rng)
        texts = [_reword(clips.captions[row], rng) for row in rows]
        return augmented, texts, torch.from_numpy(clips.seen[rows])

    def _draw_sync(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        clips, c = self.clips, self.recipe
        rows = rng.choice(len(clips.seen), size=c.windows, replace=False)
        starts = rng.integers(clips.length - c.window + 1, size=c.windows)
        span = np.arange(-_REACH, c.window + _REACH)
        index = np.clip(starts[:, None] + span, 0, clips.length - 1)
        frames = np.stack([clips.frames[row, i] for row, i in zip(rows, index, strict=True)])
        augmented = _augment(frames, rng)
        places = [(row, start) for row, start in zip(rows, starts, strict=True)]
        width = c.window + 2 * _REACH
        mel = np.stack([clips.mel[row, start : start + width] for row, start in places])
        louder = rng.uniform(-0.3, 0.3, size=(c.windows, 1, 1))
        events = np.stack([clips.targets[row, start : start + c.window] for row, start in places])
        return augmented, torch.from_numpy(mel + louder).float(), torch.from_numpy(events)

    def loss(
        self,
        frames: Tensor,
        texts: list[str],
        labels: Tensor,
        moving: Tensor,
        mel: Tensor,
        events: Tensor,
    ) -> dict[str, Tensor]:
        """Return the contrasts of both pairs, and the error of the event head.

        Args:
            frames: Of clips (B, pictures, 3, H, W).
            texts: Their captions.
            labels: What they show (B,): equal numbers look the same.
            moving: Windows of frames (W, T + 8, 3, H, W).
            mel: Their sound (W, T + 8, 160).
            events: 1 where an event sounds (W, T).
        """
        towers = self.towers
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            match = _match_loss(towers, frames, texts, labels)
            sync, event = _sync_loss(towers, moving, mel, events)
        total = match + sync + event
        return {"loss": total, "match": match, "sync": sync, "event": event}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return retrieval both ways, share of clips put in sync, F1 of the event head."""
        towers, clips = self.towers, self.held_out
        seen, offsets, counts = [], [], np.zeros(3)
        for row in range(len(clips.seen)):
            frames = torch.from_numpy(np.array(clips.frames[row]))[None]
            picked = frames[:, :: foley.FPS // 8]
            seen.append(towers.embed("frames", towers.encoders.encode_frames(picked).mean(1)))
            if not clips.events[row].size:
                continue
            moving = towers.encoders.encode_sync(frames)[:, : clips.length]
            sounding = towers.audio(torch.from_numpy(clips.mel[row][None].astype(np.float32)))
            a, b = towers.embed("motion", moving)[0], towers.embed("audio", sounding)[0]
            offsets.append(abs(_best_offset(a @ b.T)) <= 1)
            predicted = _peaks(towers.event(moving)[0, :, 0].sigmoid().numpy())
            counts += _matches(predicted, clips.events[row] * foley.FPS - 0.5)
        texts = towers.embed("text", towers.encoders.encode_text(clips.captions).mean(1))
        match = torch.cat(seen) @ texts.T
        labels = torch.from_numpy(clips.seen)
        hits, precise, recalled = counts
        return {
            "frame_to_text": float((labels[match.argmax(1)] == labels).float().mean()),
            "text_to_frame": float((labels[match.argmax(0)] == labels).float().mean()),
            "in_sync": float(np.mean(offsets)) if offsets else 0.0,
            "event_f1": 2 * hits / max(1.0, precise + recalled),
        }

    def export(self) -> Path:
        """Write `encoders.safetensors`, in float16."""
        path = Path(self.loop.out) / "encoders.safetensors"
        self.towers.encoders.save(path, torch.float16)
        return path


def train_encoders(recipe: EncodersTraining) -> TrainingResult:
    """Train `NanoEncoders` on procedural or open clips; see `mfmjt.train.trainer.train`."""
    return train(recipe.loop(), lambda _: EncodersTask(recipe))


def _take(encoders: NanoEncoders, path: Path, *names: str) -> NanoEncoders:
    """Give encoders some of the encoders in a file; return all of these."""
    given = NanoEncoders.load(path)
    for name in names:
        state = getattr(given, name).state_dict()
        own = getattr(encoders, name).state_dict()
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
            raise InputError(
                f"The {name} in {path} has other sizes: {given.config}. Give its sizes as model."
            )
        getattr(encoders, name).load_state_dict(state)
    return given


def _match_loss(towers: _Towers, frames: Tensor, texts: list[str], labels: Tensor) -> Tensor:
    seen = towers.encoders.frame_encoder(frames.flatten(0, 1)).unflatten(0, (len(frames), -1))
    # A random frame now and then alone: one frame must do as well as the mean over a clip.
    seen = torch.cat([seen.mean(1), seen[:, 0]])
    read = towers.encoders.text_encoder(texts).mean(1)
    same = (labels[:, None] == labels).float()
    a, b = towers.embed("frames", seen), towers.embed("text", read)
    scale = towers.temperatures()[0]
    first, second = a.chunk(2)
    return 0.5 * (_contrast(first, b, scale, same) + _contrast(second, b, scale, same))


def _sync_loss(
    towers: _Towers, frames: Tensor, mel: Tensor, events: Tensor
) -> tuple[Tensor, Tensor]:
    moving = towers.encoders.sync_encoder(frames)
    a = towers.embed("motion", moving).flatten(0, 1)
    b = towers.embed("audio", towers.audio(mel)).flatten(0, 1)
    sync = _contrast(a, b, towers.temperatures()[1], torch.eye(len(a)))
    event = F.binary_cross_entropy_with_logits(
        towers.event(moving).squeeze(-1).float(), events, pos_weight=torch.tensor(4.0)
    )
    return sync, event


def _best_offset(similarity: Tensor, reach: int = 25) -> int:
    """Offset in frames whose diagonal of `(T, T)` is highest on average."""
    means = [similarity.diagonal(d).mean() for d in range(-reach, reach + 1)]
    return int(torch.stack(means).argmax()) - reach


def _peaks(chance: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Frames above one half and above their neighbors."""
    padded = np.pad(chance, 1)
    high = (chance > 0.5) & (chance >= padded[:-2]) & (chance > padded[2:])
    return np.flatnonzero(high).astype(np.float64)


def _matches(predicted: np.ndarray[Any, Any], true: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One-to-one matches within 1.25 frames (50 ms), number predicted, number true."""
    hits, free = 0, list(true)
    for spot in predicted:
        near = [t for t in free if abs(t - spot) <= 1.25]
        if near:
            free.remove(min(near, key=lambda t: abs(t - spot)))
            hits += 1
    return np.array([hits, len(predicted), len(true)], dtype=np.float64)
