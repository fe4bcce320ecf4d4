"""Sound read for training: in step with the pictures, in one channel, past what is damaged."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from mfmjt.errors import InputError
from mfmjt.media import read_audio
from tests.support.clips import write_video

RATE = 16_000
PCM = 2.0**-14  # of 16 bits, twice rounded


def noise(seconds: float, channels: int = 1) -> np.ndarray:
    drawn = np.random.default_rng(0).uniform(-0.5, 0.5, (channels, round(seconds * RATE)))
    return drawn.astype(np.float32)


def write(path: Path, sound: np.ndarray, begins: float, pictures_begin: float) -> Path:
    """Lossless sound and a few pictures, each track from a time of its own."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width = video.height = 16
        video.pix_fmt, video.options = "yuv420p", {"bf": "0"}
        track = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for i in range(25):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 9 * i, np.uint8), "rgb24")
            frame.pts, frame.time_base = round(pictures_begin * 25) + i, Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        samples = (sound * 2**15).round().astype(np.int16)
        heard = av.AudioFrame.from_ndarray(samples, "s16", "mono")
        heard.sample_rate, heard.time_base = RATE, Fraction(1, RATE)
        heard.pts = round(begins * RATE)
        container.mux(track.encode(heard))
        container.mux(track.encode())
    return path


@pytest.mark.parametrize(("begins", "pictures_begin"), [(0.0, 0.0), (0.48, 0.0), (0.0, 0.4)])
def test_time_0_is_the_first_picture(tmp_path, begins, pictures_begin):
    sound = noise(1.5)
    found = read_audio(write(tmp_path / "x.mkv", sound, begins, pictures_begin), RATE)
    shift = round((begins - pictures_begin) * RATE)
    if shift >= 0:
        assert not found[:shift].any()
        assert np.abs(found[shift:] - sound[0]).max() <= PCM
    else:
        assert np.abs(found - sound[0, -shift:]).max() <= PCM
    cut = read_audio(tmp_path / "x.mkv", RATE, 0.6)
    assert np.array_equal(cut, found[: round(0.6 * RATE)])


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_channels_are_averaged_and_the_rate_is_changed(tmp_path, suffix):
    seconds = 1.0
    time = np.arange(round(44_100 * seconds)) / 44_100
    both = np.stack([np.sin(2 * np.pi * 440 * time), np.zeros_like(time)], axis=1)
    soundfile.write(tmp_path / f"x{suffix}", both, 44_100)
    found = read_audio(tmp_path / f"x{suffix}", RATE)
    assert abs(len(found) / RATE - seconds) <= 0.1  # lossy codecs work in frames
    inner = found[RATE // 4 : RATE // 2]
    spectrum = np.abs(np.fft.rfft(inner * np.hanning(len(inner))))
    assert abs(np.argmax(spectrum) * RATE / len(inner) - 440) <= RATE / len(inner)
    assert np.abs(inner).max() == pytest.approx(0.5, rel=0.05)  # half of one channel's


def channels(seed: int, *gains: float) -> np.ndarray:
    """One second of independent noise in as many channels, (S, C) float32."""
    drawn = np.random.default_rng(seed).uniform(-0.5, 0.5, (RATE, len(gains)))
    return (drawn * np.array(gains)).astype(np.float32)


def opposite(loss: float = 0.0, step: float = 0.0, silent: int = 0) -> np.ndarray:
    """Stereo whose second channel is the first one's negative, but for a loss and a dither."""
    (left,) = channels(1, 1.0).T
    drawn = np.random.default_rng(2).triangular(-step, 0, step, (2, RATE)) if step else 0.0
    both = np.stack((left, -(1 - loss) * left)) + drawn
    return np.concatenate((both, np.zeros((silent, RATE)))).T.astype(np.float32)


MEANS = {
    "mono": channels(0, 1.0),
    "one silent": channels(0, 1.0, 0.0),
    "wide": channels(0, 1.0, 0.8),
    "nearly mono": np.repeat(channels(0, 1.0), 2, axis=1),
    "sides louder by 12 dB": opposite(0.5),
    "5.1, all different": channels(0, 1.0, 0.9, 0.8, 0.1, 0.5, 0.5),
    "5.1, the centre alone": channels(0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0),
    "silence": channels(0, 0.0, 0.0),
}
CANCELLED = {
    "exactly": opposite(),
    "but for dither": opposite(step=2.0**-15),
    "by 40 dB": opposite(0.02),
    "5.1, the front": opposite(silent=4),
    "beside a constant": opposite() + np.float32(0.05),
}


@pytest.mark.parametrize("kind", MEANS)
def test_channels_that_do_not_cancel_have_their_mean(tmp_path, kind):
    soundfile.write(tmp_path / "x.wav", MEANS[kind], RATE, subtype="FLOAT")
    notes: list[str] = []
    found = read_audio(tmp_path / "x.wav", RATE, notes=notes)
    assert np.array_equal(found, MEANS[kind].T.mean(0, dtype=np.float32))
    assert notes == []


@pytest.mark.parametrize("kind", CANCELLED)
def test_of_channels_that_cancel_the_loudest_is_taken(tmp_path, kind):
    sound = CANCELLED[kind]
    soundfile.write(tmp_path / "x.wav", sound, RATE, subtype="FLOAT")
    notes: list[str] = []
    found = read_audio(tmp_path / "x.wav", RATE, 0.5, notes)
    loudest = int(sound[: RATE // 2].var(0).argmax())
    assert np.array_equal(found, sound[: RATE // 2, loudest])
    assert notes == [
        f"The channels of {tmp_path / 'x.wav'} cancel one another: channel {loudest + 1}, the "
        "loudest, is read instead of their mean."
    ]
    assert np.array_equal(read_audio(tmp_path / "x.wav", RATE, 0.5), found)


@pytest.mark.parametrize(
    ("codec", "suffix"), [("aac", ".mp4"), ("libmp3lame", ".mp3"), ("libopus", ".ogg")]
)
def test_channels_cancel_after_a_codec_too(tmp_path, codec, suffix):
    rate = 48_000
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    with av.open(str(tmp_path / f"x{suffix}"), "w") as container:
        track = container.add_stream(codec, rate=rate, layout="stereo")
        heard = av.AudioFrame.from_ndarray(
            np.stack((wave, -wave)).astype(np.float32), "fltp", "stereo"
        )
        heard.sample_rate, heard.time_base, heard.pts = rate, Fraction(1, rate), 0
        container.mux(track.encode(heard))
        container.mux(track.encode())
    notes: list[str] = []
    found = read_audio(tmp_path / f"x{suffix}", RATE, notes=notes)
    assert len(notes) == 1
    inner = found[RATE // 4 : RATE // 2]
    assert np.abs(inner).max() == pytest.approx(0.3, rel=0.1)


def test_numbers_that_are_not_finite_come_through(tmp_path):
    samples = noise(1.0)[0]
    samples[7] = np.nan
    soundfile.write(tmp_path / "x.wav", samples, RATE, subtype="FLOAT")
    assert np.isnan(read_audio(tmp_path / "x.wav", RATE)).any()
    for value in (np.nan, np.inf):
        both = opposite()
        both[7] = value
        soundfile.write(tmp_path / "x.wav", both, RATE, subtype="FLOAT")
        assert not np.isfinite(read_audio(tmp_path / "x.wav", RATE)).all()


def test_what_is_cut_off_is_read_as_far_as_it_goes(tmp_path):
    soundfile.write(tmp_path / "x.flac", noise(2.0)[0], RATE)
    content = (tmp_path / "x.flac").read_bytes()
    (tmp_path / "x.flac").write_bytes(content[: len(content) // 2])
    assert 0.5 < len(read_audio(tmp_path / "x.flac", RATE)) / RATE < 1.5


def test_files_without_sound_say_so(tmp_path):
    write_video(tmp_path / "mute.mp4", frames=3)
    (tmp_path / "text.wav").write_text("not a sound")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    for name, words in (
        ("mute.mp4", "no sound track"),
        ("text.wav", "cannot be opened as a file of sound"),
        ("empty.wav", "No sound of .* can be decoded"),
        ("none.wav", "no file"),
        ("", "is a folder"),
    ):
        with pytest.raises(InputError, match=words):
            read_audio(tmp_path / name, RATE)
