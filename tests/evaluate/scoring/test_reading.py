from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mfmjt.evaluate.resample import resample
from mfmjt.evaluate.scoring.reading import length, read_clip
from tests.evaluate.scoring.conftest import RATE, Write, sound


def test_what_is_judged_is_the_mean_of_the_channels_without_what_is_constant(write: Write) -> None:
    left, right = sound(0), sound(1) + 0.25
    path = write("stereo.wav", np.stack([left, right], axis=1), subtype="FLOAT")
    clip = read_clip(path, 0.5, whole=False)
    assert (clip.rate, clip.channels, clip.seconds, clip.problem) == (RATE, 2, 1.0, "")
    wave = clip.at(RATE, 0.5, exact=True)
    assert wave.shape == (1, RATE // 2)
    heard = torch.from_numpy((left + right)[: int(0.55 * RATE)] / 2)
    # Sums of 8,800 values in another order.
    bound = 1e-7 * np.sqrt(8800)
    assert torch.allclose(wave[0], (heard - heard.mean())[: RATE // 2], rtol=0, atol=bound)


def test_av_benchmark_subtracts_the_mean_of_the_whole_file_and_does_not_fill_up(
    write: Write,
) -> None:
    samples = sound(0)
    samples[RATE // 2 :] += 0.5
    clip = read_clip(write("a.wav", samples, subtype="FLOAT"), 8.0, whole=True)
    wave = clip.at(48000, 8.0, exact=False)
    expected = resample(torch.from_numpy(samples) - torch.from_numpy(samples).mean(), RATE, 48000)
    assert torch.equal(wave[0], expected)


def test_a_clip_that_lacks_little_is_filled_up(write: Write) -> None:
    clip = read_clip(write("a.wav", sound(0, seconds=0.96)), 1.0, whole=False)
    wave = clip.at(32000, 1.0, exact=True)
    assert clip.problem == ""
    assert wave.shape == (1, 32000)
    assert not wave[0, -1280:].any()


@pytest.mark.parametrize(
    ("samples", "why"),
    [
        (np.zeros(RATE), "silent"),
        (np.full(RATE, 0.0009), "silent"),
        (np.stack([sound(0), -sound(0)], axis=1), "in the mean of its 2 channels"),
        (sound(0, seconds=0.9), "0.90 s long, and 1 s are judged"),
        (np.where(np.arange(RATE) == 9, np.nan, sound(0)), "NaN"),
        (np.zeros(0), "no samples"),
    ],
    ids=["silence", "dither", "opposite", "short", "nan", "empty"],
)
def test_what_is_wrong_is_told(write: Write, samples: np.ndarray, why: str) -> None:
    clip = read_clip(write("a.wav", samples, subtype="FLOAT"), 1.0, whole=False)
    assert why in clip.problem
    assert clip.wave is None


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF, but no more")
    assert "cannot be read" in read_clip(path, 1.0, whole=False).problem
    assert length(path) == 0.0


def test_of_an_hour_only_what_is_judged_is_read(write: Write) -> None:
    tone = np.tile(sound(0, rate=1000, seconds=1.0), 3600)
    clip = read_clip(write("hour.wav", tone, rate=1000), 1.0, whole=False)
    assert clip.seconds == 3600
    assert clip.wave is not None
    assert len(clip.wave) == 1050


def test_sound_of_a_video_is_read(tmp_path: Path) -> None:

    path = tmp_path / "a.m4a"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        samples = sound(0, rate=44100, seconds=2.0)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    clip = read_clip(path, 1.0, whole=False)
    assert (clip.rate, clip.problem) == (44100, "")
    assert length(path) == pytest.approx(2.0, abs=0.1)
