from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mfmjt.codec import NanoCodec
from mfmjt.data import foley, open_set
from mfmjt.data.open_set import OpenSet
from mfmjt.errors import InputError
from mfmjt.features import procedural
from mfmjt.features.procedural import write_store
from mfmjt.features.store import FeatureStore, verify
from tests.support.bundles import CODEC
from tests.support.open_corpus import write_corpus
from tests.support.stores import files, listed

ROOT = Path(__file__).parents[2]


def test_features_are_those_of_the_clips(codec, encoders, store):
    part = load_file(store / "train" / "000000.safetensors")
    assert {key: tuple(value.shape[1:]) for key, value in part.items()} == {
        "mean": (250, 20),
        "logvar": (250, 20),
        "video": (64, 128),
        "sync": (200, 128),
    }
    clip = foley.clip(3, "train")
    frames = torch.from_numpy(clip.frames)
    with torch.no_grad():
        mean, _ = codec.encode(torch.from_numpy(clip.audio)[None])
        video = encoders.encode_frames(frames[[int(j / 8 * 25) for j in range(64)]][None])
    for name, expected in (("mean", mean), ("video", video)):
        # Equal up to fp16, and to sums in another order where the batch is another.
        bound = 4 * torch.finfo(torch.float16).eps * expected.abs().max()
        assert (part[name][3].float() - expected[0]).abs().max() <= bound
    index = FeatureStore(store)
    assert (index.captions[3], index.labels[3]) == (clip.caption, clip.label)
    assert index.events[3] == clip.events.tolist()
    assert verify(store) == 1


def test_index_has_the_statistics_of_sampled_latents(store):
    part = load_file(store / "train" / "000000.safetensors")
    mean, logvar = part["mean"].double().flatten(0, 1), part["logvar"].double().flatten(0, 1)
    index = FeatureStore(store)
    eps = torch.finfo(torch.float32).eps
    expected = (mean.var(0, correction=0) + logvar.exp().mean(0)).sqrt()
    torch.testing.assert_close(index.latent_mean.double(), mean.mean(0), rtol=eps, atol=eps)
    torch.testing.assert_close(index.latent_std.double(), expected, rtol=8 * eps, atol=eps)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(procedural, "PART_CLIPS", 2)


KILLED = """
import contextlib, sys, time
from mfmjt.codec import NanoCodec
from mfmjt.encoders import NanoEncoders
from mfmjt.features import format, procedural
out, codec, encoders = sys.argv[1:]
procedural.PART_CLIPS = 2
real, count = format.atomic_path, [0]
@contextlib.contextmanager
def slow(path):
    # Half a file, at a moment that a signal cannot miss.
    with real(path) as temporary:
        count[0] += 1
        if count[0] == 2:
            temporary.write_bytes(b"half of it")
            print("writing", flush=True)
            time.sleep(60)
        yield temporary
format.atomic_path = slow
models = NanoCodec.load(codec), NanoEncoders.load(encoders)
procedural.write_store(out, {"test": 5}, *models, workers=0)
"""


@pytest.mark.usefixtures("small_parts")
def test_killed_while_it_writes_it_goes_on_to_the_same_store(codec, encoders, tmp_path):
    part, whole = tmp_path / "part", tmp_path / "whole"
    weights = tmp_path / "codec.safetensors", tmp_path / "encoders.safetensors"
    codec.save(weights[0])
    encoders.save(weights[1])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(part), *map(str, weights)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert b"half of it" in files(part).values()
    first = part / "test" / "000000.safetensors"
    written = first.stat().st_mtime_ns
    write_store(part, {"test": 5}, codec, encoders, workers=2)  # the rest by other processes
    write_store(whole, {"test": 5}, codec, encoders, workers=0)
    assert first.stat().st_mtime_ns == written
    assert files(part) == files(whole)


@pytest.mark.usefixtures("small_parts")
def test_processes_share_the_work_and_make_the_same(codec, encoders, tmp_path, monkeypatch):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    write_store(whole, {"test": 3}, codec, encoders, workers=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, made in (("1", 1), ("0", 2)):  # whichever comes last writes the index
        monkeypatch.setenv("RANK", rank)
        write_store(shared, {"test": 3}, codec, encoders, workers=0)
        assert len(list(shared.glob("test/*.safetensors"))) == made
        assert (shared / "test" / "index.json").exists() == (made == 2)
    assert files(shared) == files(whole)


@pytest.mark.usefixtures("small_parts")
def test_a_store_can_grow_and_damage_is_made_good(codec, encoders, tmp_path):
    write_store(tmp_path, {"train": 1}, codec, encoders, workers=0)
    write_store(tmp_path, {"train": 3}, codec, encoders, workers=0)
    assert len(FeatureStore(tmp_path)) == 3
    whole = files(tmp_path)
    part = tmp_path / "train" / "000000.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    write_store(tmp_path, {"train": 3}, codec, encoders, workers=0)
    assert files(tmp_path) == whole


def test_features_of_other_weights_are_not_mixed_in(codec, encoders, tmp_path):
    write_store(tmp_path, {"train": 1}, codec, encoders, workers=0)
    before = files(tmp_path)
    torch.manual_seed(1)
    other = NanoCodec(CODEC)
    for models, seed in (((other, encoders), 0), ((codec, encoders), 1)):
        with pytest.raises(InputError, match=r"other weights or settings\. Give another out="):
            write_store(tmp_path, {"train": 1}, *models, workers=0, seed=seed)
    assert files(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_named(codec, encoders, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Give another out="):
        write_store(tmp_path / "file", {"train": 1}, codec, encoders, workers=0)


@pytest.mark.usefixtures("small_parts")
def test_of_the_open_set_some_clips_have_no_video(codec, encoders, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    write_store(tmp_path / "store", {"train": 6}, codec, encoders, workers=0, recordings=corpus)
    names = sorted(path.name for path in (tmp_path / "store" / "train").glob("*.safetensors"))
    stems = ("000000", "000002", "sound_000000", "sound_000002")
    assert names == [f"{stem}.safetensors" for stem in stems]
    store = FeatureStore(tmp_path / "store")
    made = OpenSet(corpus)
    clips = [made.clip(i, "train", render=False) for i in (0, 2, 4, 1, 3, 5)]
    assert store.captions == [clip.caption for clip in clips]
    assert store.labels == [clip.label for clip in clips]
    rows = store.rows(torch.arange(6))
    assert rows["video_mask"].tolist() == [True] * 3 + [False] * 3
    assert not rows["sync"][3:].any()
    assert bool(rows["sync"][:3].any())
    # Other recordings are not mixed in.
    table = corpus / "clips.csv"
    table.write_text(table.read_text().replace("the bell", "a bell"))
    open_set.open_set.cache_clear()
    with pytest.raises(InputError, match="other weights or settings"):
        write_store(tmp_path / "store", {"train": 6}, codec, encoders, workers=0, recordings=corpus)


@pytest.mark.usefixtures("small_parts")
def test_the_bytes_of_a_store_stay(codec, encoders, tmp_path, digests):
    write_store(tmp_path, {"validation": 3}, codec, encoders, workers=0)
    digests.check("store", *listed(tmp_path))
