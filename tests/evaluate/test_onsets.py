from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfmjt.errors import InputError
from mfmjt.evaluate import onsets
from mfmjt.evaluate.onsets import OnsetScore, detect_onsets, match_onsets, onset_f1

RATE = 16000


def strikes(times: list[float], duration: float, level: float = 0.5, seed: int = 0) -> np.ndarray:
    """Struck bars: three partials that die away within a fifth of a second."""
    rng = np.random.default_rng(seed)
    track = np.zeros(round(duration * RATE))
    t = np.arange(round(0.4 * RATE)) / RATE
    for time in times:
        partials = [np.sin(2 * np.pi * f * t) for f in rng.uniform(400, 4000, 3)]
        sound = sum(partials) * np.exp(-t / 0.05) * level / 3
        start = round(time * RATE)
        track[start : start + len(sound)] += sound[: len(track) - start]
    return track.astype(np.float32)


def largest_matching(reference: list[float], estimated: list[float], tolerance: float) -> int:
    """By trying every assignment of the shorter list to the longer."""
    short, long = sorted((reference, estimated), key=len)
    return max(
        sum(abs(a - b) <= tolerance for a, b in zip(short, chosen, strict=True))
        for chosen in itertools.permutations(long, len(short))
    )


# Multiples of 1/8 are exact, so "within the tolerance" means the same to both sides.
times = st.lists(st.integers(0, 24).map(lambda n: n / 8), max_size=5)


@settings(deadline=None, max_examples=200)
@given(times, times, st.integers(0, 8).map(lambda n: n / 8))
def test_matching_is_the_largest_there_is(
    reference: list[float], estimated: list[float], tolerance: float
) -> None:
    expected = largest_matching(reference, estimated, tolerance)
    assert match_onsets(reference, estimated, tolerance) == expected


def test_matching_takes_times_in_any_order_and_pairs_each_once() -> None:
    assert match_onsets([2.0, 1.0], [1.0, 2.0], 0.05) == 2
    assert match_onsets([1.0], [0.97, 1.0, 1.03], 0.05) == 1


def test_scores_are_averaged_over_onsets_not_over_clips() -> None:
    reference = [[1.0, 2.0, 3.0], [1.0]]
    estimated = [[1.0, 2.0, 3.0], [2.0, 3.0]]
    score = onset_f1(reference, estimated, 0.05)
    assert score == OnsetScore(matched=3, reference=4, estimated=5)
    assert score.precision == 3 / 5
    assert score.recall == 3 / 4
    assert score.f1 == 6 / 9


def test_no_onsets_at_all_are_a_perfect_score_and_missing_ones_are_not() -> None:
    assert onset_f1([[]], [[]]).f1 == 1
    assert onset_f1([[1.0]], [[]]).f1 == 0
    assert onset_f1([[]], [[1.0]]).f1 == 0


def test_onsets_of_other_clip_counts_are_refused() -> None:
    with pytest.raises(InputError, match="per clip"):
        onset_f1([[1.0]], [])


@pytest.mark.parametrize("level", [0.9, 0.01], ids=["loud", "quiet"])
def test_strikes_are_found_where_they_are(level: float) -> None:
    expected = [0.31, 0.62, 0.745, 1.2, 1.9]
    found = detect_onsets(strikes(expected, 2.5, level), RATE)
    assert len(found) == len(expected)
    # No onset is placed finer than the detector looks: its lag and half its window.
    resolution = onsets.LAG * onsets.HOP + onsets.WINDOW / 2
    assert np.abs(found - expected).max() < resolution


def test_strikes_in_noise_are_found() -> None:
    expected = [0.4, 0.9, 1.5]
    noise = np.random.default_rng(1).standard_normal(2 * RATE) * 0.01
    found = detect_onsets(strikes(expected, 2.0) + noise, RATE)
    assert onset_f1([expected], [found], 0.02).recall == 1


def test_the_rate_of_the_audio_does_not_move_the_onsets() -> None:
    expected = [0.4, 0.9, 1.5]
    wave = torch.from_numpy(strikes(expected, 2.0))
    doubled = torch.nn.functional.interpolate(wave[None, None], scale_factor=2, mode="linear")
    found = detect_onsets(doubled[0, 0], 2 * RATE)
    assert onset_f1([expected], [found], 0.02).f1 == 1


def test_two_sounds_within_the_refractory_time_are_one() -> None:
    found = detect_onsets(strikes([0.5, 0.5 + onsets.REFRACTORY / 2, 1.0], 1.5), RATE)
    assert len(found) == 2
    assert np.diff(found).min() >= onsets.REFRACTORY


def test_a_steady_sound_has_one_onset_its_beginning() -> None:
    t = np.arange(2 * RATE) / RATE
    found = detect_onsets(np.sin(2 * np.pi * 440 * t).astype(np.float32), RATE)
    assert found.tolist() == [0.0]


@pytest.mark.parametrize("samples", [0, 1, 7, 80, 255, 257])
def test_clips_shorter_than_a_window_are_taken(samples: int) -> None:
    assert len(detect_onsets(np.full(samples, 0.5, dtype=np.float32), RATE)) <= 1


def test_silence_and_near_silence_have_no_onsets() -> None:
    assert len(detect_onsets(np.zeros(RATE, dtype=np.float32), RATE)) == 0
    hum = np.random.default_rng(0).uniform(-1, 1, RATE) * onsets.SILENCE / 2
    assert len(detect_onsets(hum, RATE)) == 0


def test_an_offset_alone_is_no_stream_of_onsets() -> None:
    assert len(detect_onsets(np.full(RATE, 0.3, dtype=np.float32), RATE)) <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(bad: float) -> None:
    wave = np.zeros(RATE, dtype=np.float32)
    wave[5] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        detect_onsets(wave, RATE)


def test_stereo_and_absurd_rates_are_refused() -> None:
    with pytest.raises(InputError, match="one channel"):
        detect_onsets(np.zeros((2, RATE), dtype=np.float32), RATE)
    with pytest.raises(InputError, match="too low"):
        detect_onsets(np.zeros(RATE, dtype=np.float32), 10)
