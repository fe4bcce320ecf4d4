from __future__ import annotations

import contextlib
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mfmjt.data.preview import write_clip
from mfmjt.errors import InputError, RunError
from mfmjt.extract import run
from mfmjt.extract.run import extract
from mfmjt.extract.tables import read_table
from mfmjt.features.store import FeatureStore, verify
from tests.extract.conftest import (
    RATE,
    SHORT,
    SOUND,
    rejects,
    write_table,
    write_wave,
)
from tests.support.clips import encode_sound, write_sound
from tests.support.stores import files


@pytest.fixture(scope="module")
def broken(clips, videos, tmp_path_factory) -> Path:
    """One good video, and every way in which one can be bad."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copy(videos / "a.mp4", folder / "good.mp4")
    frames, audio = clips[1].frames, clips[1].audio
    whole = (videos / "b.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    # Matroska has no index at its end: what is left of it plays.
    write_clip(folder / "b.mkv", frames, audio)
    matroska = (folder / "b.mkv").read_bytes()
    (folder / "half.mkv").write_bytes(matroska[: len(matroska) // 2])
    (folder / "b.mkv").unlink()
    write_clip(folder / "mute.mp4", frames, None)
    write_clip(folder / "silent.mp4", frames, np.zeros_like(audio))
    write_clip(folder / "short.mp4", frames[:10], audio[: 10 * RATE // 25])
    write_clip(folder / "single.mp4", frames[:1], audio)
    write_sound(folder / "sound.mp4")
    with av.open(str(folder / "frameless.mkv"), "w") as container:
        container.add_stream("libx264", rate=25).pix_fmt = "yuv420p"
        encode_sound(container, container.add_stream("aac", rate=RATE, layout="mono"), 1.0)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("This is not a video.")
    (folder / "folder.mp4").mkdir()
    return folder


REASONS = {
    "truncated": "cannot be opened",
    "half": "lasts 0|less than 0.96 s",
    "mute": "no sound track",
    "silent": "is silent",
    "short": "lasts 0.40 s, less than 0.96 s",
    "single": "single frame",
    "sound": "only sound",
    "frameless": "No frame",
    "empty": "cannot be opened",
    "text": "cannot be opened",
    "folder": "no file",
    "none": "no file none.mp4",
}


def test_bad_videos_are_listed_and_skipped(bundle, broken, tmp_path):
    matroska = ("half", "frameless")
    names = ["good.mp4", *(f"{n}{'.mkv' if n in matroska else '.mp4'}" for n in REASONS)]
    rows = [(name, f"caption of {name}") for name in names]
    table = write_table(tmp_path / "t.csv", ("path", "caption"), rows)
    (done,) = extract(read_table(table, media=broken), tmp_path / "out", bundle, SHORT)
    assert (done.clips, done.rejects) == (1, len(names) - 1)
    found = rejects(done.folder)
    assert found.keys() == set(names) - {"good.mp4"}
    for name, reason in found.items():
        words = REASONS[Path(name).stem].split("|")
        assert any(word in reason for word in words), (name, reason)
    assert FeatureStore(tmp_path / "out").captions == ["caption of good.mp4"]


def test_bad_sounds_are_listed_and_skipped(bundle, clips, tmp_path):
    audio = clips[0].audio
    write_wave(tmp_path / "good.wav", audio)
    for name, value in (("nan", np.nan), ("infinite", np.inf)):
        spoiled = audio.copy()
        spoiled[5] = value
        write_wave(tmp_path / f"{name}.wav", spoiled)
    write_wave(tmp_path / "silent.wav", 0 * audio)
    write_wave(tmp_path / "empty.wav", audio[:0])
    write_wave(tmp_path / "uncaptioned.wav", audio)
    # Silence as files have it: 16 bits with dither, and that behind codecs.
    dither = np.random.default_rng(0).triangular(-2, 0, 2, (len(audio), 2)).round() / 2**15
    for suffix in ("wav", "flac", "mp3", "ogg"):
        write_wave(tmp_path / f"dither.{suffix}", dither)
    with av.open(str(tmp_path / "dither.m4a"), "w") as container:
        track = container.add_stream("aac", rate=RATE, layout="stereo")
        planes = np.ascontiguousarray(dither.T, np.float32)
        heard = av.AudioFrame.from_ndarray(planes, "fltp", "stereo")
        heard.sample_rate = RATE
        container.mux(track.encode(heard))
        container.mux(track.encode())
    write_wave(tmp_path / "quiet.wav", audio / np.abs(audio).max() * 2.0**-9)
    names = ("good", "nan", "infinite", "silent", "empty", "uncaptioned")
    names += ("quiet.wav", *(f"dither.{suffix}" for suffix in ("wav", "flac", "mp3", "ogg", "m4a")))
    rows = [(name, "" if name == "uncaptioned" else "x") for name in names]
    table = write_table(tmp_path / "t.csv", ("id", "caption"), rows)
    (done,) = extract(read_table(table), tmp_path / "out", bundle, SOUND)
    assert done.clips == 2  # good and quiet
    found = rejects(done.folder)
    assert all("is silent" in found[name] for name in names if name.startswith("dither"))
    assert "NaN" in found["nan"]
    assert "NaN or infinite" in found["infinite"]
    assert "is silent" in found["silent"]
    assert "No sound" in found["empty"] or "lasts 0.00 s" in found["empty"]
    assert "neither pictures nor a caption" in found["uncaptioned"]


def test_features_that_are_not_finite_are_not_stored(bundle, videos, tmp_path, monkeypatch):
    """What overflows in fp16 would be infinite to every network."""
    real = bundle.codec.encode

    def huge(audio):
        mean, logvar = real(audio)
        mean[1] *= 1e6
        return mean, logvar

    monkeypatch.setattr(bundle.codec, "encode", huge)
    (done,) = extract(read_table(videos / "clips.csv"), tmp_path, bundle, SHORT)
    assert done.clips == 2
    assert "not finite" in rejects(done.folder)["b.mp4"]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a full disk, writing beyond it fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_run_and_it_goes_on(bundle, videos, tmp_path):
    rows, out = read_table(videos / "clips.csv"), tmp_path / "out"
    with largest_file(20_000), pytest.raises(RunError, match="Make room"):
        extract(rows, out, bundle, SHORT)
    left = files(out)
    assert all(len(content) <= 20_000 for content in left.values())
    assert not any(Path(name).name.startswith(".") for name in left)
    extract(rows, out, bundle, SHORT)
    extract(rows, tmp_path / "whole", bundle, SHORT)
    assert files(out) == files(tmp_path / "whole")


def test_a_folder_that_cannot_be_made_is_named(bundle, videos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Give another --out"):
        extract(read_table(videos / "clips.csv"), tmp_path / "file", bundle, SHORT)


@pytest.fixture
def store(bundle, videos, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(run, "PART_ROWS", 2)
    extract(read_table(videos / "clips.csv"), tmp_path / "store", bundle, SHORT)
    return tmp_path / "store"


@pytest.mark.parametrize("name", ["00000002.safetensors", "text-00000000.safetensors"])
def test_damage_is_found_and_made_good(bundle, videos, store, name):
    path = store / "train" / name
    whole = files(store)
    flipped = bytearray(path.read_bytes())
    flipped[-3] ^= 4
    path.write_bytes(bytes(flipped))
    with pytest.raises(RunError, match=rf"{name} is damaged: its checksum differs"):
        verify(store)
    path.write_bytes(path.read_bytes()[:-1])  # and one that bundle early
    with pytest.raises(RunError, match=f"{name} is damaged: it has"):
        verify(store)
    with pytest.raises(InputError, match=f"{name} is damaged"):
        FeatureStore(store)
    path.unlink()
    with pytest.raises(RunError, match=f"{name} is missing"):
        verify(store)
    with pytest.raises(InputError, match=f"{name} is missing"):
        FeatureStore(store)
    path.write_bytes(b"")
    extract(read_table(videos / "clips.csv"), store, bundle, SHORT)
    assert files(store) == whole
    assert verify(store) == 3


def test_a_header_that_was_changed_is_found(store):
    path = store / "train" / "00000000.safetensors"
    content = path.read_bytes()
    assert content.count(b"a.mp4") == 1
    path.write_bytes(content.replace(b"a.mp4", b"x.mp4"))
    with pytest.raises(RunError, match="its checksum differs"):
        verify(store)


def test_a_store_that_is_not_finished_says_so(bundle, videos, store):
    (store / "train" / "index.json").unlink()
    with pytest.raises(InputError, match="no finished store"):
        verify(store)
    with pytest.raises(InputError, match="mfmjt extract"):
        FeatureStore(store)
    (store / "train" / "index.json").write_text("{")
    with pytest.raises(RunError, match=r"index\.json cannot be read"):
        verify(store)


def test_rows_are_what_they_were_whoever_reads(store):
    """Two readers of one file, and the file itself, are not changed by what is done to batches."""
    before = files(store)
    one, two = FeatureStore(store), FeatureStore(store)
    batch = one.rows(torch.arange(3))
    for value in batch.values():
        value.zero_()
    assert all(bool(value.any()) for value in two.rows(torch.arange(3)).values())
    assert files(store) == before
