from __future__ import annotations

import re

import numpy as np
import pytest

from mfmjt.data import _captions, foley
from mfmjt.data._draw import Camera, Canvas
from mfmjt.data.foley import CLASSES, FPS, IMPACT_CLASSES, SAMPLE_RATE, SPLITS, clip
from mfmjt.errors import InputError


@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_clip_is_a_function_of_split_seed_and_index(label: int) -> None:
    first = clip(label, "train", duration=2.0, size=24)
    again = clip(label, "train", duration=2.0, size=24)
    assert first.frames is not None
    assert again.frames is not None
    np.testing.assert_array_equal(first.audio, again.audio)
    np.testing.assert_array_equal(first.frames, again.frames)
    assert first.caption == again.caption
    others = [
        clip(label + len(CLASSES), "train", duration=2.0, size=24),
        clip(label, "test", duration=2.0, size=24),
        clip(label, "train", seed=1, duration=2.0, size=24),
    ]
    for other in others:
        assert other.label == first.label
        assert not np.array_equal(other.audio, first.audio)
        assert not np.array_equal(other.frames, first.frames)


@pytest.mark.parametrize("label", range(len(CLASSES)))
@pytest.mark.parametrize("duration", [0.5, 2.7, 8.0])
def test_shapes_levels_and_motion(label: int, duration: float) -> None:
    item = clip(label, "validation", duration=duration, size=32)
    assert item.frames is not None
    assert item.frames.shape == (round(duration * FPS), 32, 32, 3)
    assert item.frames.dtype == np.uint8
    assert item.audio.shape == (round(duration * SAMPLE_RATE),)
    assert item.audio.dtype == np.float32
    assert np.isfinite(item.audio).all()
    assert 0 < np.abs(item.audio).max() < 1
    assert item.class_name == CLASSES[label]
    if duration == 8.0:
        assert np.abs(np.diff(item.frames.astype(int), axis=0)).max() > 20, "nothing moves"


@pytest.mark.parametrize("name", IMPACT_CLASSES)
def test_sound_begins_at_the_events(name: str) -> None:
    item = clip(3, "train", class_name=name, render=False)
    assert item.events.size >= 2
    assert np.diff(item.events).min() > 0.14
    # Energy in the 10 ms after an event against the 10 ms before, where no older sound rings on.
    hop = SAMPLE_RATE // 100
    first = round(float(item.events[0]) * SAMPLE_RATE)
    before, after = item.audio[first - hop : first], item.audio[first : first + hop]
    assert np.square(after).mean() > 100 * np.square(before).mean()
    rises = 0
    for event in item.events:
        i = round(float(event) * SAMPLE_RATE)
        rises += np.abs(item.audio[i : i + hop]).max() > np.abs(item.audio[i - hop : i]).max()
    assert rises >= 0.9 * item.events.size


@pytest.mark.parametrize("name", ["ball_rubber", "ball_wood"])
def test_ball_touches_the_floor_at_its_events(name: str) -> None:
    """The lowest frames of the ball are those in which, or beside which, it is heard."""
    item = clip(11, "train", class_name=name)
    assert item.frames is not None
    moving = np.abs(item.frames.astype(int) - np.median(item.frames, axis=0)).sum(-1) > 60
    rows = np.arange(item.frames.shape[1])[:, None]
    height = np.where(
        moving.any((1, 2)), (moving * rows).sum((1, 2)) / moving.sum((1, 2)).clip(1), np.nan
    )
    lowest = np.nanmax(height)
    for event in item.events[:6]:
        k = int(event * FPS)
        assert np.nanmax(height[max(0, k - 1) : k + 2]) > lowest - 8


def test_continuous_classes_have_no_events() -> None:
    for name in set(CLASSES) - set(IMPACT_CLASSES):
        item = clip(0, "train", class_name=name, render=False)
        assert item.events.size == 0
        frames_rms = np.sqrt(np.square(item.audio.reshape(-1, SAMPLE_RATE // 4)).mean(1))
        assert frames_rms.min() > 0.01 * frames_rms.max(), "it never falls silent"


def test_captions_vary_and_test_wording_is_unseen() -> None:
    words = {s: [clip(i, s, render=False, duration=0.5).caption.lower() for i in range(240)]
             for s in SPLITS}  # fmt: skip
    assert len(set(words["train"])) > 120
    assert not set(words["train"]) & set(words["test"])
    vocabulary = set(re.findall(r"[a-z]+", " ".join(_captions.FRAMES[:-5])))
    for phrases in _captions.PHRASES.values():
        vocabulary |= set(re.findall(r"[a-z]+", " ".join(phrases[:-2])))
    stems = {w.rstrip("s") for w in vocabulary}
    for name, phrases in _captions.PHRASES.items():
        new = {w for p in phrases[-2:] for w in re.findall(r"[a-z]+", p)} - vocabulary
        unknown = {w for w in new if w.rstrip("s") not in stems}
        assert len(unknown) <= 3, (name, unknown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index": 0, "split": "dev"}, "Unknown split"),
        ({"index": -1, "split": "train"}, "at least 0"),
        ({"index": 0, "split": "train", "duration": 0.0}, "duration"),
        ({"index": 0, "split": "train", "class_name": "tuba"}, "Unknown class"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        clip(**arguments)


def test_shapes_cover_their_area() -> None:
    canvas = Canvas(100, Camera(0.0, 0.0, 1.0))
    canvas.ellipse(0.1, -0.2, 0.5, 0.5, (1.0, 1.0, 1.0))
    disc = canvas.pixels[..., 0].sum() / 50**2
    assert abs(disc - np.pi * 0.25) < 0.01
    canvas = Canvas(100, Camera(0.0, 0.0, 1.0))
    canvas.box(0.0, 0.0, 0.3, 0.6, (1.0, 1.0, 1.0))
    assert abs(canvas.pixels[..., 0].sum() / 50**2 - 0.72) < 0.02
    canvas.ellipse(5.0, 5.0, 0.5, 0.5, (0.0, 1.0, 0.0))  # outside: nothing happens
    assert canvas.to_uint8().shape == (100, 100, 3)


def test_frames_shown_are_those_on_the_screen():
    assert foley.frames_shown(200, 8).tolist() == [int(j / 8 * 25) for j in range(64)]
    assert foley.frames_shown(36, 25).tolist() == list(range(36))
    assert foley.frames_shown(4, 8).tolist() == [0, 3]
