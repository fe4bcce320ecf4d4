"""The sound of one file as the networks get it, and what is wrong with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mfmjt.errors import InputError, reason
from mfmjt.evaluate.resample import resample

__all__ = ["LONGEST", "Clip", "benchmark_wave", "length", "read_clip"]

LONGEST = 10.0
"""Seconds that are judged of a clip unless more are asked for: PaSST takes no more."""
SILENCE = 2.0**-10
"""Largest sample of what is silent, as for features: -60 dB."""
SLACK = 0.05
"""Seconds that a clip may lack."""


@dataclass(frozen=True)
class Clip:
    """What is known of a file of sound.

    Attributes:
        rate: Its sample rate in Hz; 0 where it cannot be read.
        channels: Number of them.
        seconds: Its length, which may be more than is judged.
        problem: Why it is not scored; empty if it is.
        wave: The judged part at its own rate, (S,) float32, the mean of the channels and without
            what is constant; None where there is a problem.
    """

    rate: int = 0
    channels: int = 0
    seconds: float = 0.0
    problem: str = ""
    wave: Tensor | None = None

    def at(self, rate: int, seconds: float, exact: bool) -> Tensor:
        """Return the sound (1, S) at a rate, cut to `seconds`, and filled up to them if `exact`."""
        assert self.wave is not None
        wave = resample(self.wave, self.rate, rate)[: int(rate * seconds)]
        if exact:
            wave = torch.nn.functional.pad(wave, (0, int(rate * seconds) - len(wave)))
        return wave[None]


def length(path: Path) -> float:
    """Return the length of a file of sound in seconds; 0 where it cannot be told."""
    import soundfile

    try:
        return float(soundfile.info(path).duration)
    except soundfile.SoundFileError:
        return read_clip(path, LONGEST, whole=False).seconds


def read_clip(path: Path, seconds: float, whole: bool) -> Clip:
    """Read one file, and say what is wrong with it.

    Args:
        path: Of the formats of libsndfile, or any that PyAV can open.
        seconds: That are judged.
        whole: As av-benchmark does: the mean of the whole file is subtracted, and silent and short
            files are judged. Otherwise only what is judged is read, and they are problems.
    """
    try:
        wave, rate, channels, duration = _decoded(path, math.inf if whole else seconds + SLACK)
    except InputError as error:
        return Clip(problem=reason(error))
    facts = Clip(rate, channels, duration)
    problem = ""
    if len(wave) == 0:
        problem = "it has no samples"
    elif not np.isfinite(wave).all():
        problem = "it holds NaN or infinite samples"
    elif not whole and duration < seconds - SLACK:
        problem = f"it is {duration:.2f} s long, and {seconds:g} s are judged"
    elif not whole and np.abs(wave[: math.ceil(seconds * rate)]).max() <= SILENCE:
        problem = "it is silent: no sample above -60 dB" + (
            f" in the mean of its {channels} channels" if channels > 1 else ""
        )
    if problem:
        return Clip(facts.rate, facts.channels, facts.seconds, problem)
    mono = torch.from_numpy(wave)
    return Clip(rate, channels, duration, wave=mono - mono.mean())


def benchmark_wave(path: Path, network: str, rate: int, seconds: float) -> Tensor:
    """Return the sound as av-benchmark gives it to networks with readers of their own.

    Nothing constant is subtracted. ImageBind gets all channels (1, C, S) of the whole file, and
    Synchformer the mean of the channels (1, S), cut to `seconds`.
    """
    import soundfile

    samples, before = soundfile.read(path, dtype="float32", always_2d=True)
    wave = torch.from_numpy(samples).T.contiguous()
    if network == "imagebind":
        return resample(wave, before, rate)[None]
    return resample(wave.mean(dim=0), before, rate)[None, : int(rate * seconds)]


def _decoded(path: Path, most: float) -> tuple[np.ndarray, int, int, float]:
    """Return the mean of the channels (S,) float32, rate, channels and length in seconds."""
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            rate, channels = file.samplerate, file.channels
            count = -1 if math.isinf(most) else math.ceil(most * rate)
            samples = file.read(count, dtype="float32", always_2d=True)
            duration = max(file.frames, len(samples)) / rate
        mean = torch.from_numpy(samples).T.contiguous().mean(dim=0)
        return mean.numpy(), rate, channels, duration
    except soundfile.SoundFileError as error:
        from mfmjt.media import native_audio

        try:
            wave, rate = native_audio(path, None if math.isinf(most) else most)
        except InputError:
            if path.suffix.lower() in (".wav", ".flac"):
                raise InputError(f"it cannot be read: {reason(error)}") from error
            raise
        return wave, rate, 1, len(wave) / rate
