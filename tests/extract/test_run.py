from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mfmjt.errors import InputError, RunError
from mfmjt.extract import run
from mfmjt.extract.clips import PEAK, Cut, decode
from mfmjt.extract.run import NOTES, Settings, extract
from mfmjt.extract.tables import read_table
from mfmjt.families import Bundle
from mfmjt.features.format import Part
from mfmjt.features.store import FeatureStore, verify
from mfmjt.media import read_video
from tests.extract.conftest import (
    RATE,
    SECONDS,
    SHORT,
    SOUND,
    rejects,
    write_json,
    write_table,
    write_wave,
)
from tests.support.stores import files, listed

ROOT = Path(__file__).parents[2]


def tone(seconds: float, rate: int = RATE, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(0.1 * np.arange(round(seconds * rate)))).astype(np.float32)


def test_features_are_those_of_the_clips(bundle, videos, clips, tmp_path):
    (done,) = extract(read_table(videos / "clips.csv"), tmp_path, bundle, SHORT)
    assert (done.folder, done.clips, done.rejects) == (tmp_path / "train", 3, 0)
    store = FeatureStore(tmp_path)
    assert store.captions == [clip.caption for clip in clips]
    rows = store.rows(torch.arange(3))
    assert {key: tuple(value.shape) for key, value in rows.items()} == {
        "latent": (3, 30, 20),
        "video": (3, 8, 128),
        "sync": (3, 24, 128),
        "text": (3, 32, 128),
    }
    part = Part(tmp_path / "train" / "00000000.safetensors").tensors
    seen = read_video(videos / "b.mp4", size=64, duration=1.0).frames
    with torch.no_grad():
        (piece,) = decode(videos / "b.mp4", SHORT.cut, bundle)
        assert float(piece.audio.abs().max()) <= PEAK
        expected = {
            "video": bundle.encoders.encode_frames(torch.from_numpy(seen[0][:8])[None]),
            "sync": bundle.encoders.encode_sync(torch.from_numpy(seen[1][:24])[None]),
            "mean": bundle.codec.encode(piece.audio[None])[0],
            "text": bundle.encoders.encode_text([clips[1].caption]),
        }
    for key, value in expected.items():
        found = rows["text"][1] if key == "text" else part[key][1].float()
        # Equal up to fp16, and to sums in another order where the batch is another.
        bound = 4 * torch.finfo(torch.float16).eps * value.abs().max()
        assert (found - value[0]).abs().max() <= bound, key


def test_texts_are_stored_once_and_the_empty_one_first(bundle, videos, tmp_path):
    rows = [("a.mp4", "same"), ("b.mp4", ""), ("c.mp4", "same")]
    table = write_table(tmp_path / "t.csv", ("path", "caption"), rows)
    extract(read_table(table, media=videos), tmp_path / "out", bundle, SHORT)
    text = Part(tmp_path / "out" / "train" / "text-00000000.safetensors").tensors["text"]
    assert len(text) == 2
    with torch.no_grad():
        expected = bundle.encoders.encode_text(["", "same"])
    assert torch.equal(text, expected.half())
    batch = FeatureStore(tmp_path / "out").rows(torch.arange(3))
    assert batch["text_mask"].tolist() == [True, False, True]
    assert torch.equal(batch["text"], text[[1, 0, 1]].float())


@pytest.mark.parametrize("layout", ["vggsound", "audiocaps", "esc50", "wavcaps"])
def test_miniature_copies_of_data_sets(bundle, videos, clips, tmp_path, layout):
    media = tmp_path / "media"
    captions = [clip.caption for clip in clips[:2]]
    if layout == "vggsound":
        media.mkdir()
        for name, start in (("a", 30), ("b", 7)):
            (media / f"{name}_{start:06d}.mp4").symlink_to(videos / f"{name}.mp4")
        rows = [("a", 30, captions[0], "train"), ("b", 7, captions[1], "test")]
        table, splits = write_table(tmp_path / "vggsound.csv", None, rows), ["train", "test"]
    elif layout == "audiocaps":
        for name, clip in zip("ab", clips, strict=False):
            write_wave(media / f"{name}_30.wav", clip.audio)
        header = ("audiocap_id", "youtube_id", "start_time", "caption")
        rows = [(i, name, 30, captions[i]) for i, name in enumerate("ab")]
        table, splits = write_table(tmp_path / "train.csv", header, rows), ["train"]
    elif layout == "esc50":
        for name, clip in zip("ab", clips, strict=False):
            write_wave(media / f"{name}.wav", clip.audio)
        captions = ["a dog barking", "rain falling"]
        rows = [("a.wav", 1, "dog"), ("b.wav", 5, "rain")]
        table = write_table(tmp_path / "esc50.csv", ("filename", "fold", "category"), rows)
        splits = ["train", "test"]
    else:
        for name, clip in zip("ab", clips, strict=False):
            write_wave(media / f"Y{name}.flac", clip.audio, 32_000)
        content = [
            {"id": f"Y{name}.wav", "caption": c} for name, c in zip("ab", captions, strict=True)
        ]
        table, splits = write_json(tmp_path / "as_final.json", {"data": content}), ["train"]
    # What is written at twice its rate is half as long.
    seconds = SECONDS / 3 if layout == "wavcaps" else SECONDS
    settings = Settings(Cut(seconds, seconds, pictures=layout == "vggsound"), workers=0)
    out = tmp_path / "out"
    done = extract(read_table(table, layout, media), out, bundle, settings)
    assert [(d.folder.name, d.rejects) for d in done] == [(split, 0) for split in splits]
    found = [caption for split in splits for caption in FeatureStore(out, split).captions]
    assert found == captions
    assert ("video" in FeatureStore(out).rows(torch.arange(1))) == (layout == "vggsound")
    assert verify(out) == 2 * len(splits)


def test_sound_is_cut_into_pieces_and_filled_up(bundle, tmp_path):
    for name, seconds in (("long", 3.5), ("whole", 0.95), ("short", 0.6), ("tiny", 0.3)):
        write_wave(tmp_path / f"{name}.wav", tone(seconds, 8_000), 8_000)
    rows = [(name, name) for name in ("long", "whole", "short", "tiny")]
    table = write_table(tmp_path / "t.csv", ("id", "caption"), rows)
    cut = Cut(SECONDS, 0.5, pieces=2, pictures=False)
    (done,) = extract(read_table(table), tmp_path / "out", bundle, Settings(cut))
    index = json.loads((done.folder / "index.json").read_text())
    assert index["captions"] == ["long", "long", "whole", "short"]
    assert index["starts"] == [0.0, SECONDS, 0.0, 0.0]
    assert rejects(done.folder).keys() == {"tiny"}
    assert "lasts 0.30 s, less than 0.5 s" in rejects(done.folder)["tiny"]
    (short,) = decode(tmp_path / "short.wav", cut, bundle)
    samples = round(SECONDS * RATE)
    assert len(short.audio) == samples
    assert not short.audio[round(0.61 * RATE) :].any()
    # The resampler may overshoot the peak of what it was given; ours is taken after it.
    assert float(short.audio.abs().max()) == pytest.approx(PEAK, rel=torch.finfo().eps)


def test_silence_after_the_beginning_is_no_clip(bundle, tmp_path):
    sound = np.concatenate([tone(SECONDS), np.zeros(2 * RATE, np.float32), tone(SECONDS)])
    path = write_wave(tmp_path / "x.wav", sound)
    cut = Cut(SECONDS, SECONDS, pieces=9, pictures=False)
    assert [piece.start for piece in decode(path, cut, bundle)] == [0.0, 3 * SECONDS]


def test_a_quiet_part_of_a_quiet_file_is_no_clip(bundle, tmp_path):
    sound = np.concatenate([tone(SECONDS) / 8, tone(SECONDS) / 2**12, tone(SECONDS) / 8])
    path = write_wave(tmp_path / "x.wav", sound)
    cut = Cut(SECONDS, SECONDS, pieces=9, pictures=False)
    assert [piece.start for piece in decode(path, cut, bundle)] == [0.0, 2 * SECONDS]


def test_channels_that_cancel_are_trained_on_by_the_loudest_and_noted(bundle, clips, tmp_path):
    audio = clips[0].audio
    noise = np.random.default_rng(0).triangular(-1, 0, 1, (2, len(audio))) / 2**15
    write_wave(tmp_path / "one.wav", audio)
    write_wave(tmp_path / "both.wav", np.stack((audio, -0.9 * audio), -1))
    write_wave(tmp_path / "against.wav", (np.stack((0.99 * audio, -audio)) + noise).T)
    names = ("one", "both", "against")
    table = write_table(tmp_path / "t.csv", ("id", "caption"), [(name, "x") for name in names])
    for _ in range(2):  # and once more over what is there
        (done,) = extract(read_table(table), tmp_path / "out", bundle, SOUND)
        assert (done.clips, done.notes) == (3, 1)
        (note,) = map(json.loads, (done.folder / NOTES).read_text().splitlines())
        assert (note["id"], note["start"]) == ("against", 0.0)
        assert "channel 2, the loudest, is read instead" in note["note"]
    (whole,), (against,) = (
        decode(tmp_path / f"{name}.wav", SOUND.cut, bundle) for name in ("one", "against")
    )
    assert float((whole.audio + against.audio).abs().max()) <= 8 * 2.0**-15 * PEAK / audio.max()
    (done,) = extract(read_table(table)[:2], tmp_path / "none", bundle, SOUND)
    assert done.notes == 0
    assert not (done.folder / NOTES).exists()


@pytest.fixture
def many(tmp_path, clips) -> Path:
    """Eight sounds, of which two cannot be used."""
    for i in range(7):
        write_wave(tmp_path / f"{i}.wav", np.roll(clips[i % 3].audio, 100 * i))
    (tmp_path / "3.wav").write_bytes(b"RIFF of nothing")
    rows = [(str(i), f"number {i % 4}") for i in range(8)]
    return write_table(tmp_path / "t.csv", ("id", "caption"), rows)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(run, "PART_ROWS", 2)
    monkeypatch.setattr(run, "PART_TEXTS", 2)


@pytest.mark.usefixtures("small_parts")
def test_processes_share_the_work_and_make_the_same(bundle, many, tmp_path, monkeypatch):
    rows = read_table(many)
    (done,) = extract(rows, tmp_path / "one", bundle, SOUND)
    assert (done.clips, done.rejects) == (6, 2)
    settings = dataclasses.replace(SOUND, workers=0)
    for rank in (2, 0, 1):  # in any order: whichever comes last writes the index
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        (done,) = extract(rows, tmp_path / "three", bundle, settings)
        assert done.finished == (rank == 1)
    assert files(tmp_path / "three") == files(tmp_path / "one")


KILLED = """
import contextlib, sys, time
from mfmjt.extract import run
from mfmjt.extract.tables import read_table
from mfmjt.families import open_bundle
from mfmjt.features import format as parts
from tests.extract.conftest import SOUND
table, out, model = sys.argv[1:]
run.PART_ROWS = run.PART_TEXTS = 2
real, count = parts.atomic_path, [0]
@contextlib.contextmanager
def slow(path):
    # Half a file, at a moment that a signal cannot miss.
    with real(path) as temporary:
        count[0] += 1
        if count[0] == 4:
            temporary.write_bytes(b"half of it")
            print("writing", flush=True)
            time.sleep(60)
        yield temporary
parts.atomic_path = slow
run.extract(read_table(table), out, open_bundle(model, False), SOUND)
"""


@pytest.mark.usefixtures("small_parts")
def test_killed_while_it_writes_it_goes_on_to_the_same_store(bundle, many, tmp_path):
    model, part, whole = (tmp_path / name for name in ("model", "part", "whole"))
    model.mkdir()
    bundle.codec.save(model / "codec.safetensors")
    bundle.encoders.save(model / "encoders.safetensors")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(many), str(part), str(model)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = files(part)
    assert any(content == b"half of it" for content in left.values())
    finished = {name for name in left if not Path(name).name.startswith(".")}
    assert len(finished) == 3
    before = {name: (part / name).stat().st_mtime_ns for name in finished}
    rows = read_table(many)
    extract(rows, part, bundle, SOUND)
    extract(rows, whole, bundle, SOUND)
    assert files(part) == files(whole)
    assert {name: (part / name).stat().st_mtime_ns for name in finished} == before


@pytest.mark.usefixtures("small_parts")
def test_a_table_may_grow(bundle, many, tmp_path):
    rows, out = read_table(many), tmp_path / "out"
    extract(rows[:5], out, bundle, SOUND)
    part = out / "train" / "00000000.safetensors"
    written = part.stat().st_mtime_ns
    extract(rows, out, bundle, SOUND)
    assert part.stat().st_mtime_ns == written
    extract(rows, tmp_path / "whole", bundle, SOUND)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.usefixtures("small_parts")
def test_files_that_were_missing_may_come_later(bundle, many, clips, tmp_path):
    out = tmp_path / "out"
    extract(read_table(many), out, bundle, SOUND)
    kept = out / "train" / "00000000.safetensors"
    written = kept.stat().st_mtime_ns
    write_wave(tmp_path / "7.wav", clips[0].audio)
    (done,) = extract(read_table(many), out, bundle, SOUND)
    assert (done.clips, rejects(done.folder).keys()) == (7, {"3"})
    assert kept.stat().st_mtime_ns == written
    extract(read_table(many), tmp_path / "whole", bundle, SOUND)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.usefixtures("small_parts")
def test_the_bytes_of_a_store_stay(bundle, raw_media, tmp_path, digests):
    for name, settings in (("video", SHORT), ("sound", SOUND)):
        extract(read_table(raw_media / f"{name}.csv"), tmp_path / name, bundle, settings)
        digests.check(name, *listed(tmp_path / name))


def test_another_table_is_not_mixed_in(bundle, many, tmp_path):
    rows, out = read_table(many), tmp_path / "out"
    extract(rows, out, bundle, SOUND)
    before = files(out)
    renamed = [dataclasses.replace(row, caption=f"{row.caption}!") for row in rows]
    for other in (rows[:-1], rows[1:], renamed):
        with pytest.raises(InputError, match="another table"):
            extract(other, out, bundle, SOUND)
    assert files(out) == before


def test_other_weights_or_settings_are_not_mixed_in(bundle, many, tmp_path):
    rows, out = read_table(many), tmp_path / "out"
    extract(rows, out, bundle, SOUND)
    before = files(out)
    for other in (
        dataclasses.replace(SOUND, dtype="float32"),
        dataclasses.replace(SOUND, cut=Cut(SECONDS, 0.5, pictures=False)),
    ):
        with pytest.raises(InputError, match="other weights or settings"):
            extract(rows, out, bundle, other)
    changed = Bundle(bundle.network, bundle.codec, type(bundle.encoders)())
    with pytest.raises(InputError, match="other weights or settings"):
        extract(rows, out, changed, SOUND)
    assert files(out) == before


def test_float32_is_kept_as_it_is(bundle, many, tmp_path):
    settings = dataclasses.replace(SOUND, dtype="float32")
    extract(read_table(many)[:1], tmp_path / "out", bundle, settings)
    (piece,) = decode(many.parent / "0.wav", SOUND.cut, bundle)
    with torch.no_grad():
        mean, _ = bundle.codec.encode(piece.audio[None])
    found = Part(tmp_path / "out" / "train" / "00000000.safetensors").tensors["mean"]
    assert torch.equal(found, mean)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"cut": {"seconds": 0.0, "shortest": 0.0}}, "more than 0"),
        ({"cut": {"seconds": 8.0, "shortest": 9.0}}, "no more for the shortest"),
        ({"cut": {"pieces": 2}}, "1 where they have pictures"),
        ({"dtype": "float64"}, "float16, float32"),
        ({"workers": -1}, "0 or more"),
    ],
)
def test_wrong_settings_say_what_to_do(arguments, words):
    with pytest.raises(InputError, match=words):
        Settings(**{k: Cut(**v) if k == "cut" else v for k, v in arguments.items()})


def test_lengths_at_which_frames_and_latents_part_are_refused(bundle, many, tmp_path):
    with pytest.raises(InputError, match=r"every 0\.32 s\. Give a multiple"):
        extract(read_table(many), tmp_path, bundle, Settings(Cut(1.0, 1.0)))


def test_nothing_usable_is_an_error_with_a_reason(bundle, many, tmp_path):
    rows = [row for row in read_table(many) if row.id in ("3", "7")]
    with pytest.raises(RunError, match=r"None of 2 clips could be used.*rejects\.jsonl"):
        extract(rows, tmp_path / "out", bundle, SOUND)
    assert rejects(tmp_path / "out" / "train").keys() == {"3", "7"}
