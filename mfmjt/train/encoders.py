"""Training of the nano encoders on procedural clips, contrastively.

Frames and captions learn to agree as CLIP's do (Radford et al., 2021, arXiv:2103.00020), where all
captions of a class are right for a frame of it (supervised contrast, Khosla et al., 2020,
arXiv:2004.11362). Motion learns to find its own moment of sound among all moments of the batch, as
Synchformer's first stage does (Iashin et al., 2024, arXiv:2401.16423), against an audio tower that
is thrown away. One thing goes beyond those recipes: the procedural set knows when events happen,
and an auxiliary head, thrown away as well, learns to say so from the motion features.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.codec.mel import filterbank, stft
from mfmjt.data import foley
from mfmjt.data._captions import words
from mfmjt.encoders import NanoEncoders, NanoEncodersConfig
from mfmjt.train.ends import Trainer, render_array

__all__ = ["EncodersConfig", "train_encoders"]

_REACH = 4
_PER_FRAME = 4  # mel frames per video frame
_BANDS = 40


@dataclass(frozen=True)
class EncodersConfig:
    """Settings of `train_encoders`.

    Attributes:
        out: Folder of the log, the checkpoint, the rendered frames and `encoders.safetensors`.
        steps: Optimiser steps.
        windows: Clips per step for the sync encoder.
        window: Frames of each.
        batch: Clips per step for the frame and text encoders.
        pictures: Frames of each.
        lr: Peak learning rate.
        warmup: Steps to reach it.
        ema: Decay of the averaged weights, which are the ones exported.
        clips: Training clips rendered (2.5 MB each, on disk).
        validation_clips: Validation clips.
        seed: Of the data and of every draw.
        workers: Processes that render; 0 renders in this one.
        threads: Of PyTorch; 0 leaves its default.
        bf16: Run the networks in bfloat16.
        on_disk: Keep the rendered frames in `out`; otherwise in memory.
        resume: Continue from the checkpoint in `out`.
        log_every: Steps between lines of the log.
        save_every: Steps between checkpoints and validations.
        model: Sizes of the encoders.
    """

    out: Path = Path("runs/encoders")
    steps: int = 1200
    windows: int = 10
    window: int = 48
    batch: int = 36
    pictures: int = 2
    lr: float = 1.5e-3
    warmup: int = 100
    ema: float = 0.995
    clips: int = 1800
    validation_clips: int = 96
    seed: int = 0
    workers: int = 2
    threads: int = 0
    bf16: bool = True
    on_disk: bool = True
    resume: bool = True
    log_every: int = 25
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
        self.encoders.vocabulary = words()
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

    def __init__(self, split: str, count: int, config: EncodersConfig) -> None:
        path = config.out / f"{split}_{count}.npy" if config.on_disk else None
        size = NanoEncoders.frame_size
        self.length = round(foley.DURATION * foley.FPS)
        self.frames = render_array(
            path, count, (self.length, size, size, 3), "uint8",
            functools.partial(_frames, split, config.seed), config.workers,
        )  # fmt: skip
        clips = [foley.clip(i, split, config.seed, render=False) for i in range(count)]
        self.captions = [clip.caption for clip in clips]
        self.labels = np.array([clip.label for clip in clips])
        self.events = [clip.events for clip in clips]
        # Four frames of silence on both sides: what a window at the very start looks back on.
        self.mel = np.stack([_log_mel(clip.audio) for clip in clips]).astype(np.float16)
        self.targets = np.stack([_event_targets(clip.events, self.length) for clip in clips])


def _frames(split: str, seed: int, index: int) -> np.ndarray[Any, Any]:
    frames = foley.clip(index, split, seed, size=NanoEncoders.frame_size).frames
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
    """What cameras, encoders and resizing do to frames.

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
        # Blocks of eight pixels that flicker, as coarse quantisation makes them.
        blocks = rng.standard_normal((length, 3, height // 8, 1, width // 8, 1), dtype=np.float32)
        x = x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8))
        x = x + float(rng.uniform(0, 0.03)) * torch.from_numpy(blocks)
        clips.append(x.flatten(4, 5).flatten(2, 3).clamp(-1, 1))
    return torch.stack(clips)


def _reword(text: str, rng: np.random.Generator) -> str:
    """A caption as another person might type it: words dropped, in another order, or only some."""
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


def train_encoders(config: EncodersConfig) -> Path:
    """Train `NanoEncoders` on procedural clips, from the start or from the checkpoint.

    Returns:
        Path of the exported `encoders.safetensors` (averaged weights, float16).

    Raises:
        InputError: The folder holds a checkpoint of another model.
        RunError: The training diverged.
    """
    c = config
    if c.threads:
        torch.set_num_threads(c.threads)
    torch.manual_seed(c.seed)
    towers = _Towers(c.model)
    trainer = Trainer(
        towers, c.out, steps=c.steps, lr=c.lr, warmup=c.warmup, decay=c.ema, seed=c.seed,
        resume=c.resume,
    )  # fmt: skip
    clips = _Clips("train", c.clips, c)
    held_out = _Clips("validation", c.validation_clips, c)

    def loss(rng: np.random.Generator, generator: torch.Generator) -> dict[str, Tensor]:
        del generator
        with torch.autocast("cpu", torch.bfloat16, enabled=c.bf16):
            match = _match_loss(towers, clips, c, rng)
            sync, event = _sync_loss(towers, clips, c, rng)
        total = match + sync + event
        return {"loss": total, "match": match, "sync": sync, "event": event}

    trainer.run(
        "encoders",
        loss,
        functools.partial(_validate, towers, held_out),
        log_every=c.log_every,
        save_every=c.save_every,
    )
    path = c.out / "encoders.safetensors"
    with trainer.averaged():
        towers.encoders.save(path, torch.float16)
    return path


def _match_loss(
    towers: _Towers, clips: _Clips, config: EncodersConfig, rng: np.random.Generator
) -> Tensor:
    rows = rng.choice(len(clips.labels), size=config.batch, replace=False)
    when = rng.integers(clips.length, size=(config.batch, config.pictures))
    frames = _augment(
        np.stack([clips.frames[row, t] for row, t in zip(rows, when, strict=True)]), rng
    )
    seen = towers.encoders.frame_encoder(frames.flatten(0, 1)).unflatten(0, (config.batch, -1))
    # A random frame now and then alone: one frame must do as well as the mean over a clip.
    seen = torch.cat([seen.mean(1), seen[:, 0]])
    texts = [_reword(clips.captions[row], rng) for row in rows]
    told = towers.encoders.text_encoder(texts).mean(1)
    labels = torch.from_numpy(clips.labels[rows])
    same = (labels[:, None] == labels).float()
    a, b = towers.embed("frames", seen), towers.embed("text", told)
    scale = towers.temperatures()[0]
    first, second = a.chunk(2)
    return 0.5 * (_contrast(first, b, scale, same) + _contrast(second, b, scale, same))


def _sync_loss(
    towers: _Towers, clips: _Clips, config: EncodersConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    rows = rng.choice(len(clips.labels), size=config.windows, replace=False)
    starts = rng.integers(clips.length - config.window + 1, size=config.windows)
    span = np.arange(-_REACH, config.window + _REACH)
    index = np.clip(starts[:, None] + span, 0, clips.length - 1)
    frames = np.stack([clips.frames[row, i] for row, i in zip(rows, index, strict=True)])
    moving = towers.encoders.sync_encoder(_augment(frames, rng))
    width = config.window + 2 * _REACH
    mel = np.stack([clips.mel[row, s : s + width] for row, s in zip(rows, starts, strict=True)])
    louder = rng.uniform(-0.3, 0.3, size=(config.windows, 1, 1))
    sounding = towers.audio(torch.from_numpy(mel + louder).float())
    a = towers.embed("motion", moving).flatten(0, 1)
    b = towers.embed("audio", sounding).flatten(0, 1)
    sync = _contrast(a, b, towers.temperatures()[1], torch.eye(len(a)))
    targets = np.stack(
        [clips.targets[row, s : s + config.window] for row, s in zip(rows, starts, strict=True)]
    )
    event = F.binary_cross_entropy_with_logits(
        towers.event(moving).squeeze(-1).float(),
        torch.from_numpy(targets),
        pos_weight=torch.tensor(4.0),
    )
    return sync, event


@torch.no_grad()
def _validate(towers: _Towers, clips: _Clips) -> dict[str, float]:
    """Class retrieval both ways, share of clips put in sync, F1 of the event head."""
    seen, offsets, counts = [], [], np.zeros(3)
    for row in range(len(clips.labels)):
        frames = torch.from_numpy(np.array(clips.frames[row]))[None]
        picked = frames[:, :: foley.FPS // 8]
        seen.append(towers.embed("frames", towers.encoders.encode_frames(picked).mean(1)))
        if foley.CLASSES[clips.labels[row]] not in foley.IMPACT_CLASSES:
            continue
        moving = towers.encoders.encode_sync(frames)[:, : clips.length]
        sounding = towers.audio(torch.from_numpy(clips.mel[row][None].astype(np.float32)))
        a, b = towers.embed("motion", moving)[0], towers.embed("audio", sounding)[0]
        offsets.append(abs(_best_offset(a @ b.T)) <= 1)
        said = _peaks(towers.event(moving)[0, :, 0].sigmoid().numpy())
        counts += _matches(said, clips.events[row] * foley.FPS - 0.5)
    told = towers.embed("text", towers.encoders.encode_text(clips.captions).mean(1))
    match = torch.cat(seen) @ told.T
    labels = torch.from_numpy(clips.labels)
    hits, precise, recalled = counts
    return {
        "frame_to_text": float((labels[match.argmax(1)] == labels).float().mean()),
        "text_to_frame": float((labels[match.argmax(0)] == labels).float().mean()),
        "in_sync": float(np.mean(offsets)) if offsets else 0.0,
        "event_f1": 2 * hits / max(1.0, precise + recalled),
    }


def _best_offset(similarity: Tensor, reach: int = 25) -> int:
    """Offset in frames whose diagonal of `(T, T)` is highest on average."""
    means = [similarity.diagonal(d).mean() for d in range(-reach, reach + 1)]
    return int(torch.stack(means).argmax()) - reach


def _peaks(chance: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Frames above one half and above their neighbours."""
    padded = np.pad(chance, 1)
    high = (chance > 0.5) & (chance >= padded[:-2]) & (chance > padded[2:])
    return np.flatnonzero(high).astype(np.float64)


def _matches(said: np.ndarray[Any, Any], true: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One-to-one matches within 1.25 frames (50 ms), number said, number true."""
    hits, free = 0, list(true)
    for spot in said:
        near = [t for t in free if abs(t - spot) <= 1.25]
        if near:
            free.remove(min(near, key=lambda t: abs(t - spot)))
            hits += 1
    return np.array([hits, len(said), len(true)], dtype=np.float64)
