from __future__ import annotations

from pathlib import Path

import numpy as np

from mfmjt.data.recordings import Recordings
from mfmjt.train.tasks.recorded import crop, mixture, shares
from tests.support.recordings import write_recordings

SAMPLES = 4096


def test_a_crop_is_a_tone_up_to_two_semitones_and_a_third_away() -> None:
    t = np.arange(32000) / 16000
    wave = np.sin(2 * np.pi * 1000 * t).astype(np.float32)
    found = set()
    for seed in range(40):
        cut = crop(wave, SAMPLES, np.random.default_rng(seed))
        assert cut.shape == (SAMPLES,)
        assert cut.dtype == np.float32
        window = np.hanning(SAMPLES)
        found.add(round(16000 / SAMPLES * np.abs(np.fft.rfft(cut * window)).argmax() / 62.5))
    # Factors 14/16 to 18/16 of 1000 Hz, which are multiples of 62.5 Hz.
    assert found == {14, 15, 16, 17, 18}


def test_a_short_recording_lies_whole_in_silence() -> None:
    wave = np.ones(200, np.float32)
    places = set()
    for seed in range(20):
        cut = crop(wave, SAMPLES, np.random.default_rng(seed))
        loud = np.flatnonzero(np.abs(cut) > 0.5)
        places.add(int(loud.mean()) // 512 if len(loud) else -1)
    assert len(places) > 3


def test_recordings_are_drawn_by_the_root_of_their_crops(tmp_path: Path) -> None:
    rows = Recordings(write_recordings(tmp_path, seconds=(0.1, 1.0, 4.0))).of("train")
    np.testing.assert_allclose(shares(rows, 16000), [0.25, 0.25, 0.5])


def test_mixtures_stay_in_range_and_repeat(tmp_path: Path) -> None:
    corpus = Recordings(write_recordings(tmp_path, labels=("low", "high")))
    rows = corpus.of("train")
    chances, both = shares(rows, SAMPLES), 0
    for seed in range(40):
        first, second = (
            mixture(corpus, rows, chances, SAMPLES, np.random.default_rng(seed)) for _ in range(2)
        )
        np.testing.assert_array_equal(first, second)
        assert np.abs(first).max() <= 1
        power = np.abs(np.fft.rfft(first * np.hanning(SAMPLES))) ** 2
        bands = power[round(850 / 3.9) : round(1150 / 3.9)], power[round(1700 / 3.9) : 590]
        both += min(b.sum() for b in bands) > 1e-3 * max(b.sum() for b in bands)
    # Three of ten are mixtures, half of which join the two pitches: 6 of 40, less 2.5 sd at least.
    assert 1 <= both <= 20
