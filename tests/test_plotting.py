from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mfmjt.plotting import FLOOR, plot_sound, spectrogram

RATE = 16000


@pytest.mark.parametrize("rate", [16000, 44100])
def test_a_tone_is_drawn_at_its_frequency_and_time(rate: int) -> None:
    axis = Figure().subplots()
    time = torch.arange(rate) / rate
    tone = torch.sin(2 * torch.pi * 2000 * time) * (time >= 0.5)
    spectrogram(axis, tone, rate)
    (drawn,) = axis.get_images()
    level, (left, right, low, high) = np.asarray(drawn.get_array()), drawn.get_extent()
    assert (left, right) == (0, 1)
    assert level.min() == FLOOR
    assert level.max() == 0
    # The tick of 2 kHz is in the loudest band.
    ticks = dict(
        zip([t.get_text() for t in axis.get_yticklabels()], axis.get_yticks(), strict=True)
    )
    band = int((ticks["2"] - low) / (high - low) * len(level))
    assert abs(int(level[:, -1].argmax()) - band) <= 1
    assert (level[:, : int(0.45 * level.shape[1])] == FLOOR).all()


def test_silence_and_very_short_sounds_are_drawn(tmp_path: Path) -> None:
    for samples in (1, 100, RATE):
        plot_sound(tmp_path / "sound.png", torch.zeros(samples), RATE, [])
        with Image.open(tmp_path / "sound.png") as picture:
            assert picture.size == (1320, 495)


def test_frames_stand_above_the_sound(tmp_path: Path) -> None:
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    plot_sound(tmp_path / "sound.png", torch.zeros(RATE), RATE, [0.5], ([red, red], 1.0))
    with Image.open(tmp_path / "sound.png") as file:
        picture = np.asarray(file.convert("RGB"))
    pure = (picture == (255, 0, 0)).all(axis=2)
    assert pure[: len(picture) // 4].mean() > 0.5
    assert not pure[len(picture) // 4 :].any()
