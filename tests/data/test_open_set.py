from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mfmjt.data import _open_captions, _takes, foley, open_set, wordings
from mfmjt.data.foley import SAMPLE_RATE, SPLITS
from mfmjt.data.open_set import KINDS, SOUNDS, OpenSet, clips_of, has_picture
from mfmjt.data.recordings import SOUND, TABLE
from mfmjt.errors import InputError
from tests.support.open_corpus import LASTING, PITCH, STRUCK, stroke, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def made(corpus: Path) -> OpenSet:
    return OpenSet(corpus)


@pytest.mark.parametrize("index", range(8))
def test_clip_is_a_function_of_split_seed_and_index(
    made: OpenSet, corpus: Path, index: int
) -> None:
    options = {"duration": 2.0, "size": 16}
    first = made.clip(index, "train", **options)
    again = OpenSet(corpus).clip(index, "train", **options)
    np.testing.assert_array_equal(first.audio, again.audio)
    np.testing.assert_array_equal(first.events, again.events)
    assert (first.caption, first.label, first.seen) == (again.caption, again.label, again.seen)
    assert (first.frames is None) == (again.frames is None) == (not has_picture(index, corpus))
    if first.frames is not None:
        np.testing.assert_array_equal(first.frames, again.frames)
    for other in (
        made.clip(index + 8, "train", **options),
        made.clip(index, "test", **options),
        made.clip(index, "train", seed=1, **options),
    ):
        assert not np.array_equal(other.audio, first.audio)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("duration", [0.5, 2.7, 8.0])
def test_shapes_and_levels(made: OpenSet, kind: str, duration: float) -> None:
    for index in range(6):
        clip = made.clip(index, "validation", duration=duration, size=16, kind=kind)
        assert clip.audio.shape == (round(duration * SAMPLE_RATE),)
        assert clip.audio.dtype == np.float32
        assert np.isfinite(clip.audio).all()
        assert 0 < np.abs(clip.audio).max() < 1
        assert made.classes[clip.label] == clip.class_name
        assert (clip.frames is not None) == bool(clip.seen) == (kind == "scene")
        if clip.frames is not None:
            assert clip.frames.shape == (round(duration * foley.FPS), 16, 16, 3)
            assert clip.class_name in SOUNDS[clip.seen]
        else:
            assert clip.events.size == 0


def test_strokes_begin_at_the_events(made: OpenSet) -> None:
    """Within a millisecond, where nothing else sounds."""
    looked_at = 0
    for index in range(60):
        clip = made.clip(index, "train", kind="scene", render=False, seed=3)
        if clip.seen not in ("footsteps", "bell", "pendulum") or not clip.events.size:
            continue
        first = round(float(clip.events[0]) * SAMPLE_RATE)
        before = np.abs(clip.audio[: first - _takes._LEAD])
        after = np.abs(clip.audio[first : first + SAMPLE_RATE // 50])
        if before.max(initial=0.0) > 0.02 * after.max():
            continue  # something in the background
        millisecond = SAMPLE_RATE // 1000
        begun = np.abs(clip.audio[first - millisecond : first + millisecond]).max()
        assert begun >= 0.25 * after.max()
        looked_at += 1
    assert looked_at >= 5


def test_a_take_is_put_with_its_onset_on_the_sample() -> None:
    sound = np.zeros(3000, np.float32)
    sound[100:] = np.exp(-np.arange(2900) / 300)
    (take,) = _takes.find_takes(np.concatenate([np.zeros(4000, np.float32), sound]))
    times = np.array([0.1, 0.5004])
    track = _takes.place([take], times, np.ones(2), SAMPLE_RATE)
    for time in times:
        at = round(time * SAMPLE_RATE)
        assert np.abs(track[at - _takes._LEAD - 1 :][:1]) < 1e-6
        assert int(np.argmax(track[at - 40 : at + 40] > 0.25)) == 40


def test_softer_is_quieter_and_duller() -> None:
    rng = np.random.default_rng(0)
    take = _takes.Take(stroke(rng, 2000.0).astype(np.float32), 0)
    hard, soft = _takes.struck(take, 1.0), _takes.struck(take, 0.3)
    # A whole strength changes nothing; float32's rounding through two transforms of 2^13.
    assert np.abs(hard - take.sound).max() < 13 * np.finfo(np.float32).eps * np.abs(hard).max()
    high, low = slice(700, None), slice(0, 300)
    spectra = [np.abs(np.fft.rfft(sound)) for sound in (hard, soft)]
    fall = [spectra[1][part].sum() / spectra[0][part].sum() for part in (low, high)]
    assert fall[1] < fall[0] < 0.3**1.1


def test_two_strokes_of_a_recording_are_two_takes_and_a_double_none() -> None:
    rng = np.random.default_rng(1)
    one, pause = stroke(rng, 1000.0), np.zeros(SAMPLE_RATE // 4)
    recording = np.concatenate([pause, one, pause, 0.7 * one]).astype(np.float32)
    takes = _takes.find_takes(recording)
    assert len(takes) == 2
    assert all(np.abs(take.sound).max() == pytest.approx(1.0) for take in takes)
    assert not _takes.find_takes(np.zeros(SAMPLE_RATE, np.float32))


@pytest.mark.parametrize("semitones", [-2.0, 1.5])
def test_shifted_moves_the_pitch_and_the_length(semitones: float) -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(8000) / SAMPLE_RATE).astype(np.float32)
    sound, ratio = _takes.shifted(tone, semitones)
    assert abs(12 * np.log2(ratio) - semitones) < 0.7
    assert len(sound) == np.ceil(8000 / ratio)
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 1 << 17))
    assert spectrum.argmax() * SAMPLE_RATE / (1 << 17) == pytest.approx(1000 * ratio, rel=1e-3)
    assert np.abs(sound[200:-200]).max() == pytest.approx(1.0, abs=0.02)


def test_a_split_hears_its_own_recordings_alone(made: OpenSet) -> None:
    for split in SPLITS:
        for index in range(16):
            clip = made.clip(index, split, duration=2.0, render=False)
            power = np.square(np.abs(np.fft.rfft(clip.audio)))
            near = {
                name: power[
                    (edges := np.array([0.8, 1.25]) * pitch * 2).astype(int)[0] : int(edges[1])
                ].sum()
                for name, pitch in PITCH.items()
            }
            assert max(near, key=near.__getitem__) == split, (split, index)


def test_a_class_can_be_forced(made: OpenSet) -> None:
    assert made.clip(0, "test", kind="scene", class_name="bell", render=False).seen == "bell"
    assert (
        made.clip(1, "test", kind="mixture", class_name="wind", render=False).class_name == "wind"
    )


def test_what_fits_a_picture_can_be_seen(made: OpenSet) -> None:
    for split in SPLITS:
        fits = made.in_scenes(split)
        assert fits == {*STRUCK, "rain", "engine", "machine"}
        assert "wind" in made.labels(split)
    for label in fits:
        assert made.clip(0, "train", kind="scene", class_name=label, render=False).seen


def test_a_long_sound_that_lasts_has_no_seam() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(2 * SAMPLE_RATE).astype(np.float32)
    track = _takes.lasting(rng, noise, 5 * SAMPLE_RATE)
    assert len(track) == 5 * SAMPLE_RATE
    level = np.sqrt(np.square(track).reshape(-1, SAMPLE_RATE // 10).mean(1))
    # Equal-power fades of noise keep its level; 1,600 samples give it to 1.8 % (one sigma).
    assert np.abs(level - 1).max() < 5 * 0.018


def test_captions_say_no_word_that_is_kept_unseen() -> None:
    phrases = [text for texts in _open_captions.SEEN.values() for text in texts]
    joints = [
        text
        for name in ("TOGETHER", "BESIDE", "THEN", "AND")
        for text in vars(_open_captions)[name]
    ]
    said = wordings.words(*phrases, *joints)
    assert not said & wordings.unseen_words()


def test_test_scenes_are_worded_as_no_other(made: OpenSet) -> None:
    rng = np.random.default_rng(0)
    for source in _open_captions.SEEN:
        trained = {_open_captions.scene(rng, source, "a", "train") for _ in range(60)} - {"a"}
        tested = {_open_captions.scene(rng, source, "a", "test") for _ in range(60)} - {"a"}
        assert tested
        assert not trained & tested


def test_clips_of_none_are_procedural(corpus: Path) -> None:
    assert clips_of(None) is foley.clip
    assert clips_of(corpus)(0, "train", render=False, duration=1.0).class_name in STRUCK + LASTING
    assert open_set.open_set(corpus) is open_set.open_set(corpus)
    assert all(has_picture(i, None) for i in range(8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index": -1, "split": "train"}, "at least 0"),
        ({"index": 0, "split": "dev"}, "Unknown split"),
        ({"index": 0, "split": "train", "kind": "film"}, "Unknown kind"),
        ({"index": 0, "split": "train", "kind": "scene", "class_name": "wind"}, "fits a picture"),
        ({"index": 0, "split": "train", "kind": "single", "class_name": "tuba"}, "no recording"),
    ],
)
def test_refuses(made: OpenSet, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        made.clip(**arguments)


def test_recordings_of_one_label_are_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / SOUND).symlink_to(corpus / SOUND)
    lines = (corpus / TABLE).read_text().splitlines()
    (tmp_path / TABLE).write_text("\n".join([lines[0], *(row for row in lines if "bell" in row)]))
    with pytest.raises(InputError, match="two labels are needed"):
        OpenSet(tmp_path)
