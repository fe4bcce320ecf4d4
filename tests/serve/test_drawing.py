from __future__ import annotations

import base64

import numpy as np
import pytest
import torch

from mfmjt.serve.drawing import BANDS, COLUMNS, drawing

RATE = 16_000


def levels(drawn: dict) -> np.ndarray:
    """uint8 (columns, bands)."""
    data = np.frombuffer(base64.b64decode(drawn["spectrogram"]), np.uint8)
    return data.reshape(drawn["columns"], drawn["bands"])


@pytest.mark.parametrize("hertz", [120.0, 1000.0, 6000.0])
def test_a_tone_is_loudest_in_its_band(hertz: float) -> None:
    time = torch.arange(2 * RATE) / RATE
    drawn = drawing(0.5 * torch.sin(2 * torch.pi * hertz * time), RATE)
    edges = np.geomspace(drawn["low"], drawn["high"], BANDS + 1)
    band = int(levels(drawn)[COLUMNS // 2].argmax())
    # A band narrower than a bin shares it with its neighbours.
    bin_width = RATE / 512
    assert edges[band] - bin_width <= hertz <= edges[band + 1] + bin_width


def test_clicks_are_where_they_are() -> None:
    wave = torch.zeros(RATE)
    places = [0.25, 0.7]
    for place in places:
        start = round(place * RATE)
        wave[start : start + 400] = torch.randn(400).clamp(-1, 1)
    drawn = drawing(wave, RATE)
    assert len(drawn["onsets"]) == 2
    low, high = (np.array(part) for part in drawn["peaks"])
    loud = np.flatnonzero((high - low) > 0.1) / drawn["columns"]
    for place in places:
        assert np.abs(loud - place).min() < 1 / drawn["columns"]
    column = levels(drawn).max(1)
    assert column[round(0.25 * COLUMNS) + 3] > column[round(0.5 * COLUMNS)]
    assert drawn["duration"] == 1.0


@pytest.mark.parametrize("samples", [1, 5, 599, 601, 16_000 * 20])
def test_any_length(samples: int) -> None:
    drawn = drawing(torch.zeros(samples), RATE)
    assert drawn["columns"] == min(samples, COLUMNS)
    assert len(drawn["peaks"][0]) == len(drawn["peaks"][1]) == drawn["columns"]
    assert levels(drawn).shape == (drawn["columns"], BANDS)
    assert drawn["onsets"] == []
