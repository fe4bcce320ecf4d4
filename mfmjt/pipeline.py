"""Video, text or both in, sound out: the object that a user holds."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfmjt import media
from mfmjt.codec import NanoCodec
from mfmjt.device import choose_device
from mfmjt.encoders import NanoEncoders
from mfmjt.errors import InputError, RunError
from mfmjt.meanflow import sample
from mfmjt.meanflow.guidance import GuidanceMode, check_mode
from mfmjt.model import MFMJT
from mfmjt.model.conditioning import Conditions
from mfmjt.model.config import SYNC_SEGMENT

__all__ = ["MAX_DURATION", "STAGES", "Audio", "Pipeline"]

STAGES = ("read", "encode", "generate", "decode")
"""The stages of a call, in order: video file -> features -> latents -> waveform."""
MAX_DURATION = 60.0
"""Longest sound of one call, in seconds; attention over it grows with its square."""
TEXT_DURATION = 8.0
"""Seconds of sound for a prompt alone, unless asked otherwise: the length of training clips."""
PRETRAINED = Path(__file__).parent / "pretrained"

Progress = Callable[[str, float], None]
"""Called with a stage's name and how much of it is done, from 0 to 1."""


@dataclass(frozen=True)
class Audio:
    """Sound made by a `Pipeline`.

    Attributes:
        waveform: float32 `(channels, samples)`, nominally in [-1, 1], on the CPU.
        sample_rate: In Hz.
        seed: The seed that makes this very sound again.
        timings: Seconds that each stage of the call took (`STAGES`), for all its sounds together.
        count: Number of sounds the call made.
        notes: One line each on what was odd about the input but could be used.
    """

    waveform: Tensor
    sample_rate: int
    seed: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    count: int = 1
    notes: tuple[str, ...] = ()

    @property
    def duration(self) -> float:
        """Seconds of sound."""
        return self.waveform.shape[1] / self.sample_rate

    @property
    def rtf_generator(self) -> float:
        """Seconds of the network alone per second of sound; below 1 is faster than real time."""
        return self.timings["generate"] / (self.duration * self.count)

    @property
    def rtf_end_to_end(self) -> float:
        """Seconds from the video file to the waveform per second of sound, all stages counted."""
        return sum(self.timings.values()) / (self.duration * self.count)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a sound file; the suffix chooses the format, such as `.wav` or `.flac`.

        Raises:
            InputError: The suffix is not known.
            RunError: The file cannot be written.
        """
        media.write_audio(path, self.waveform.numpy(), self.sample_rate)

    def mux(self, video: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
        """Write `video` with this sound to `path`; the pictures are copied, not encoded again.

        Raises:
            InputError: `video` is no video, or `path` names no container that can hold it.
            RunError: The file cannot be written.
        """
        media.mux(video, self.waveform.numpy(), self.sample_rate, path)


class Pipeline:
    """Makes sound with a network, a codec and encoders that belong together.

    Args:
        network: Predicts average velocities of latents.
        codec: Turns latents into waveforms.
        encoders: Turn frames and text into the network's conditions.
        device: Such as "cpu" or "cuda"; None takes CUDA where there is one.
        dtype: Of the network's weights and arithmetic; codec and encoders stay in float32.

    Raises:
        InputError: The parts do not belong together, or the device or dtype cannot be used.
    """

    def __init__(
        self,
        network: MFMJT,
        codec: NanoCodec,
        encoders: NanoEncoders,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = network.config
        made, heard = config.latent_dim, codec.latent_dim
        if (made, config.sample_rate) != (heard, codec.sample_rate):
            raise InputError(
                f"The network makes {made} latent channels for {config.sample_rate} Hz, and the "
                f"codec takes {heard} for {codec.sample_rate} Hz. Give parts of one model."
            )
        self.device = choose_device(device)
        if dtype == torch.float16 and self.device.type == "cpu":
            raise InputError(
                "float16 has no fast arithmetic on the CPU. Use bfloat16 or float32 there."
            )
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(f"The network cannot run in {dtype}. Use float32 or bfloat16.")
        self.dtype = dtype
        self.network = network.to(self.device, dtype).eval().requires_grad_(False)
        self.codec = codec.to(self.device).eval().requires_grad_(False)
        self.encoders = encoders.to(self.device).eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = "nano",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Pipeline:
        """Load a model that ships, by name, or any other from its folder.

        Args:
            name: "nano", or a folder with `network.safetensors`, `codec.safetensors` and
                `encoders.safetensors`.
            device: As for `Pipeline`.
            dtype: As for `Pipeline`.

        Raises:
            InputError: There is no such model, or its files are not what they should be.
        """
        folder = Path(name)
        if not folder.is_dir():
            shipped = sorted(p.name for p in PRETRAINED.iterdir() if p.is_dir())
            if str(name) not in shipped:
                raise InputError(
                    f"There is no model {name}: it is neither a folder nor one that ships "
                    f"({', '.join(shipped)}). Give one of these."
                )
            folder = PRETRAINED / name
        return cls(
            MFMJT.load(folder / "network.safetensors"),
            NanoCodec.load(folder / "codec.safetensors"),
            NanoEncoders.load(folder / "encoders.safetensors"),
            device,
            dtype,
        )

    @torch.inference_mode()
    def __call__(
        self,
        video: str | os.PathLike[str] | None = None,
        prompt: str | None = None,
        steps: int = 1,
        guidance: float = 1.5,
        mode: GuidanceMode = "cfg_scaled",
        seed: int = 0,
        duration: float | None = None,
        count: int = 1,
        progress: Progress | None = None,
    ) -> Audio | list[Audio]:
        """Make sound for a video, a prompt, or both.

        Args:
            video: A file that PyAV can read.
            prompt: What is to be heard, in words.
            steps: Evaluations of the network; it was trained to need one.
            guidance: Strength of guidance; 1 follows the conditions as they are.
            mode: "cfg_scaled" (the paper's), "cfg", or "none", which takes half the time.
            seed: Sound number i is made from seed + i; the same seed gives the same sound.
            duration: Seconds of sound, from the video's start; None takes the whole video, or
                8 s where there is none.
            count: Number of different sounds to make, all at once.
            progress: Called as (stage, fraction done) at the beginning and end of each stage and
                after each step.

        Returns:
            An `Audio`, or a list of `count` of them if `count` is above 1.

        Raises:
            InputError: Neither a video nor a prompt, an argument out of range, or a video that
                cannot be used.
            RunError: The network's output is not finite.
        """
        _check(video, prompt, steps, guidance, seed, duration, count)
        check_mode(mode)
        clock = _Clock(progress)
        notes: tuple[str, ...] = ()
        frames: list[Tensor] = []
        with clock.stage("read"):
            if video is not None:
                rates = (self.encoders.video_fps, self.encoders.sync_fps)
                read = media.read_video(
                    video, rates, self.encoders.frame_size, duration, limit=MAX_DURATION
                )
                duration, notes = read.duration, read.notes
                frames = [torch.from_numpy(f)[None].to(self.device) for f in read.frames]
        if prompt and (unread := self.encoders.unread(prompt)):
            notes += (f"The prompt is too long: its end, from {unread[:30]!r} on, is not read.",)
        duration = TEXT_DURATION if duration is None else duration
        # Synchronisation features come in segments. The network works on whole ones, where frames
        # and latents stay in step, and what is beyond the duration is cut off the waveform.
        segment = SYNC_SEGMENT / self.encoders.sync_fps
        whole = math.ceil(duration / segment - 1e-6) * segment
        with clock.stage("encode"):
            features = self._features(frames, whole, prompt)
        with clock.stage("generate"):
            length = round(whole * self.network.config.latent_rate)
            noise = self._noise(length, seed, count)
            latent = self._generate(noise, features, steps, guidance, mode, clock)
        with clock.stage("decode"):
            samples = max(1, round(duration * self.codec.sample_rate))
            waveform = self.codec.decode(latent)[:, :samples].float().cpu()
        if not bool(torch.isfinite(waveform).all()):
            raise RunError(
                "The network gave samples that are not finite. Use float32, less guidance, or "
                "another checkpoint."
            )
        sounds = [
            Audio(w[None], self.codec.sample_rate, seed + i, clock.seconds, count, notes)
            for i, w in enumerate(waveform)
        ]
        return sounds[0] if count == 1 else sounds

    def _features(
        self, frames: list[Tensor], duration: float, prompt: str | None
    ) -> dict[str, Tensor]:
        """Features `(1, tokens, dim)` of the frames at both rates and of the prompt."""
        features = {}
        if frames:
            rates = (self.encoders.video_fps, self.encoders.sync_fps)
            seen, synced = (
                _hold_last(f, round(duration * rate)) for f, rate in zip(frames, rates, strict=True)
            )
            features["video"] = self.encoders.encode_frames(seen)
            features["sync"] = self.encoders.encode_sync(synced)
        if prompt and prompt.strip():
            features["text"] = self.encoders.encode_text([prompt])
        return features

    def _noise(self, length: int, seed: int, count: int) -> Tensor:
        """Normal noise `(count, length, C)`; a seed means the same on any device, in any batch."""
        shape = (length, self.network.config.latent_dim)
        rows = [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed + i))
            for i in range(count)
        ]
        return torch.stack(rows).to(self.device)

    def _generate(
        self,
        noise: Tensor,
        features: dict[str, Tensor],
        steps: int,
        guidance: float,
        mode: GuidanceMode,
        clock: _Clock,
    ) -> Tensor:
        """Latents `(count, length, C)` in the codec's space."""
        count, length = noise.shape[:2]
        done = 0

        def velocity(z: Tensor, r: Tensor, t: Tensor, cond: Conditions) -> Tensor:
            nonlocal done
            u = self.network(z, r, t, cond=cond)
            done += 1
            clock.report(done / steps)
            return u

        def encoded(keep: bool) -> dict[str, Conditions]:
            mask = torch.tensor([keep], device=self.device)
            once = self.network.conditions(
                **features, video_mask=mask, text_mask=mask, latent_length=length
            )
            return {"cond": Conditions(*(part.expand(count, *part.shape[1:]) for part in once))}

        latent = sample(velocity, noise, steps, encoded(True), encoded(False), guidance, mode)
        return self.network.unnormalize(latent)


class _Clock:
    """Seconds of each stage, and its progress."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._progress = progress
        self._stage = STAGES[0]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._stage = name
        self.report(0.0)
        begin = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = time.perf_counter() - begin
        self.report(1.0)

    def report(self, fraction: float) -> None:
        if self._progress is not None:
            self._progress(self._stage, fraction)


def _hold_last(frames: Tensor, count: int) -> Tensor:
    """Frames `(1, T, H, W, 3)` cut to `count`, or extended to it by the last one."""
    index = torch.arange(count, device=frames.device).clamp(max=frames.shape[1] - 1)
    return frames[:, index]


def _check(
    video: Any,
    prompt: str | None,
    steps: int,
    guidance: float,
    seed: int,
    duration: float | None,
    count: int,
) -> None:
    if video is None and not (prompt and prompt.strip()):
        raise InputError("There is nothing to make sound for. Give a video, a prompt, or both.")
    if not 1 <= steps <= 1000:
        raise InputError(f"steps is {steps}. Give 1 to 1000; one is what the network is made for.")
    if not 0 <= guidance <= 100:
        raise InputError(f"guidance is {guidance}. Give 0 to 100, such as 1.5.")
    if not 0 <= seed < 2**63 - 1024:
        raise InputError(f"seed is {seed}. Give a whole number from 0 up.")
    if not 1 <= count <= 64:
        raise InputError(f"count is {count}. Give 1 to 64, and another seed for more.")
    if duration is not None and not 0 < duration <= MAX_DURATION:
        raise InputError(
            f"duration is {duration:g} s. Give more than 0 and at most {MAX_DURATION:g} seconds."
        )
