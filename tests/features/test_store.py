from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mfmjt.errors import InputError
from mfmjt.features import store as store_module
from mfmjt.features.format import write_part
from mfmjt.features.store import FeatureStore

LATENT_HZ, VIDEO_HZ, SYNC_HZ = 31.25, 8, 25
CLIPS = 5


@pytest.fixture
def clock(tmp_path) -> FeatureStore:
    """Every feature is the time it stands at; the second channel is the clip's number."""

    def times(count: int, rate: float, dim: int) -> torch.Tensor:
        feature = torch.zeros(CLIPS, count, dim)
        feature[..., 0] = torch.arange(count) / rate
        feature[..., 1] = torch.arange(CLIPS)[:, None]
        return feature.half()

    folder = tmp_path / "train"
    folder.mkdir()
    whole = {
        "mean": times(250, LATENT_HZ, 20),
        "logvar": torch.full((CLIPS, 250, 20), -torch.inf).half(),  # no noise
        "video": times(64, VIDEO_HZ, 4),
        "sync": times(200, SYNC_HZ, 4),
    }
    for name, rows in (("a", slice(0, 3)), ("b", slice(3, None))):
        part = {key: value[rows].contiguous() for key, value in whole.items()}
        save_file(part, folder / f"{name}.safetensors")
    index = {
        "shards": ["a.safetensors", "b.safetensors"],
        "latent_mean": [0.0] * 20,
        "latent_std": [1.0] * 20,
        "captions": ["one", "two", "one", "three", "four"],
        "labels": [0] * CLIPS,
        "events": [[]] * CLIPS,
    }
    (folder / "index.json").write_text(json.dumps(index))
    return FeatureStore(tmp_path)


def drawn(store: FeatureStore, *draw) -> dict[str, torch.Tensor]:
    return store.rows(*store.draw(*draw))


@pytest.mark.parametrize("window", [10, 30, 80, 240])
def test_windows_are_aligned(clock, window):
    generator = torch.Generator().manual_seed(1)
    half = torch.finfo(torch.float16).eps * 8  # rounding of a time in the store
    for _ in range(20):
        batch = drawn(clock, 6, window, generator)
        latent, video, sync = batch["latent"], batch["video"], batch["sync"]
        assert latent.shape[1] == window
        assert sync.shape[1] == window * 4 // 5
        assert video.shape[1] == round(window * VIDEO_HZ / LATENT_HZ)
        # Segments of sync frames begin where latents do; video is the nearest frame.
        assert torch.equal(latent[:, 0, 0], sync[:, 0, 0])
        places = latent[:, 0, 0] * LATENT_HZ / clock.grid
        assert ((places - places.round()).abs() <= half * LATENT_HZ).all()
        gap = (latent[:, 0, 0] - video[:, 0, 0]).abs()
        assert (gap <= 0.5 / VIDEO_HZ + half).all()
        for stream in (latent, video, sync):
            assert (stream[..., 1] == latent[:, :1, 1]).all()
            assert (stream[:, 1:, 0] > stream[:, :-1, 0]).all()


def test_every_place_and_clip_is_drawn(clock):
    generator = torch.Generator().manual_seed(0)
    batch = drawn(clock, 4000, 80, generator)
    starts = (batch["latent"][:, 0, 0] * LATENT_HZ / clock.grid).round().long()
    assert starts.unique().tolist() == list(range((250 - 80) // clock.grid + 1))
    assert batch["latent"][:, 0, 1].unique().tolist() == list(range(CLIPS))


def test_the_first_clips_of_a_store(clock):
    folder = clock.folder.parent
    few = FeatureStore(folder, clips=2)
    clips, _ = few.choose(64, None, torch.Generator().manual_seed(0))
    assert set(clips.tolist()) == {0, 1}
    assert len(few) == CLIPS
    with pytest.raises(InputError, match=f"clips=6: .* holds {CLIPS}"):
        FeatureStore(folder, clips=6)


def test_whole_clips(clock):
    batch = drawn(clock, 3, None, torch.Generator().manual_seed(0))
    assert [batch[k].shape[1] for k in ("latent", "video", "sync")] == [250, 64, 200]
    assert (batch["latent"][:, 0, 0] == 0).all()


def test_a_draw_is_a_function_of_the_generator(clock):
    first = drawn(clock, 4, 80, torch.Generator().manual_seed(3))
    again = drawn(clock, 4, 80, torch.Generator().manual_seed(3))
    other = drawn(clock, 4, 80, torch.Generator().manual_seed(4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["latent"], other["latent"])


def test_latents_are_sampled_and_normalised(clock):
    mean, std = 2.0, 0.5
    folder = clock.folder
    for name in ("a", "b"):
        tensors = load_file(folder / f"{name}.safetensors")
        tensors["mean"].fill_(mean)
        tensors["logvar"].fill_(2 * torch.tensor(std).log())
        save_file(tensors, folder / f"{name}.safetensors")
    clock = FeatureStore(folder.parent)
    clock.latent_mean, clock.latent_std = torch.full((20,), mean), torch.full((20,), std)
    latent = drawn(clock, 40, None, torch.Generator().manual_seed(0))["latent"]
    n = latent.numel()
    # Five standard errors of mean and variance of a unit normal, and log std as stored in fp16.
    assert latent.mean().abs() <= 5 / n**0.5
    assert (latent.var() - 1).abs() <= 5 * (2 / n) ** 0.5 + 2 * torch.finfo(torch.float16).eps
    assert (clock.rows(torch.arange(2))["latent"] == 0).all()


def test_text_is_encoded_once_per_caption(clock):
    asked = []

    class Encoders:
        def encode_text(self, texts):
            asked.extend(texts)
            return torch.tensor([[[float(len(t))]] for t in texts])

    clock.encode_text(Encoders(), batch=2)
    assert asked == ["one", "two", "three", "four"]
    text = clock.rows(torch.arange(CLIPS))["text"][:, 0, 0]
    assert text.tolist() == [len(c) for c in clock.captions]


def test_a_missing_store_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match="stage `features`"):
        FeatureStore(tmp_path)


def test_a_damaged_part_is_named(clock):
    (clock.folder / "a.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="Cannot read features"):
        FeatureStore(clock.folder.parent)


SHAPES = {"mean": (20, 4), "logvar": (20, 4), "video": (5, 3), "sync": (16, 2)}


def write_store(folder, clips, streams=tuple(SHAPES), first=0, text=True, captions=None, std=1.0):
    """A store whose clip i has i + `first` in every place."""
    (folder / "train").mkdir(parents=True)
    number = torch.arange(first, first + clips).float()
    tensors = {
        key: number.view(-1, 1, 1).expand(clips, *SHAPES[key]).contiguous() for key in streams
    }
    tensors["logvar"] = torch.full((clips, *SHAPES["logvar"]), -torch.inf)
    captions = captions or [f"clip {i + first}" for i in range(clips)]
    texts = ["", *dict.fromkeys(c for c in captions if c)]
    index = {
        "shards": ["a.safetensors", "b.safetensors"],
        "captions": captions,
        "latent_mean": [0.0] * 4,
        "latent_std": [std] * 4,
    }
    for name, part in (("a", slice(0, 1)), ("b", slice(1, None))):
        cut = {key: value[part].contiguous() for key, value in tensors.items()}
        write_part(folder / "train" / f"{name}.safetensors", cut, {})
    if text:
        features = torch.stack([torch.full((2, 3), float(len(t))) for t in texts])
        write_part(folder / "train" / "text.safetensors", {"text": features}, {})
        index |= {"text_shards": ["text.safetensors"], "texts": texts}
    (folder / "train" / "index.json").write_text(json.dumps(index))
    return folder


SOUND = ("mean", "logvar")


@pytest.fixture
def two(tmp_path):
    """3 clips with pictures, numbered from 0, and 5 sounds from 100."""
    return (
        write_store(tmp_path / "video", 3, std=2.0),
        write_store(tmp_path / "audio", 5, SOUND, 100, std=3.0),
    )


def test_rows_of_several_stores_and_their_masks(two):
    store = FeatureStore([(two[0], 1.0), (two[1], 1.0)])
    assert len(store) == 8
    assert store.latent_std.tolist() == [2.0] * 4  # the first one's
    batch = store.rows(torch.tensor([7, 1, 3, 2]))
    assert (2 * batch["latent"][:, 0, 0]).tolist() == [104, 1, 100, 2]
    assert batch["video_mask"].tolist() == [False, True, False, True]
    assert batch["video"][:, 0, 0].tolist() == [0, 1, 0, 2]
    assert batch["sync"][:, -1, -1].tolist() == [0, 1, 0, 2]
    lengths = [len(store.captions[i]) for i in (7, 1, 3, 2)]
    assert batch["text"][:, 0, 0].tolist() == lengths
    assert "text_mask" not in batch  # all have one


def test_clips_without_pictures_or_captions_alone(tmp_path):
    sound = FeatureStore(write_store(tmp_path / "sound", 3, SOUND, captions=["one", "", "two"]))
    batch = sound.rows(torch.arange(3))
    assert not batch.keys() & {"video", "sync"}
    assert batch["video_mask"].tolist() == [False] * 3
    assert batch["text_mask"].tolist() == [True, False, True]
    assert batch["text"][1].eq(0).all()
    assert sound.null_text is not None
    assert torch.equal(batch["text"][1], sound.null_text)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.1, 0.9)])
def test_realized_proportions_are_the_weights(two, weights):
    store = FeatureStore(list(zip(two, weights, strict=True)))
    n = 20_000
    clips, starts = store.choose(n, None, torch.Generator().manual_seed(0))
    assert starts is None
    share = weights[0] / sum(weights)
    # Five standard errors of a binomial share, there and of each clip.
    counts = torch.bincount(clips, minlength=8)
    assert counts.shape == (8,)
    for found, expected in (
        (counts[:3].sum(), share),
        *((c, share / 3) for c in counts[:3]),
        *((c, (1 - share) / 5) for c in counts[3:]),
    ):
        assert abs(float(found) / n - expected) <= 5 * (expected * (1 - expected) / n) ** 0.5


def test_windows_of_several_stores(two):
    store = FeatureStore([(two[0], 1.0), (two[1], 1.0)])
    assert store.grid == 10
    clips, starts, noise = store.draw(50, 10, torch.Generator().manual_seed(0))
    assert set(starts.tolist()) == {0, 10}
    batch = store.rows(clips, starts, noise)
    sizes = {key: batch[key].shape[1] for key in ("latent", "video", "sync")}
    assert sizes == {"latent": 10, "video": 2, "sync": 8}


def test_features_that_overlap_are_taken_whole(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "sync", (24, 2))  # as Synchformer's: no place where both begin
    store = FeatureStore(write_store(tmp_path, 2))
    generator = torch.Generator()
    with pytest.raises(InputError, match="window of 20 or more"):
        store.choose(2, 10, generator)
    assert store.choose(2, 20, generator)[1] is None


def test_what_was_prefetched_is_what_is_read(two, monkeypatch):
    store = FeatureStore([(two[0], 1.0), (two[1], 1.0)])
    clips, starts, noise = store.draw(6, 10, torch.Generator().manual_seed(0))
    expected = store.rows(clips, starts, noise)
    store.prefetch(clips, starts, 10)
    read, calls = store._read, []
    monkeypatch.setattr(store, "_read", lambda *a: calls.append(a) or read(*a))
    found = store.rows(clips, starts, noise)
    assert not calls
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    store.prefetch(clips, starts, 10)
    other = store.rows(clips.flip(0), starts.flip(0), noise)  # not what was prefetched
    assert torch.equal(other["video"], expected["video"].flip(0))
    assert not store._ahead


def test_the_host_need_not_ask_the_device_what_to_read(two):
    """A meta tensor's values are known to nobody; a GPU's only to who waits for it."""
    for stores in ([(two[0], 1.0)], [(two[0], 1.0), (two[1], 1.0)]):
        here, there = FeatureStore(stores), FeatureStore(stores, device="meta")
        expected = here.choose(6, 10, torch.Generator().manual_seed(0))
        found = there.choose(6, 10, torch.Generator().manual_seed(0))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        there.prefetch(*found, 10)
        rows = there.rows(*found, torch.empty(6, 10, 4, device="meta"))
        assert rows["latent"].shape == (6, 10, 4)
        assert not there._ahead  # it was what was prefetched


def test_it_settles_when_all_is_read(two, monkeypatch):
    monkeypatch.setattr(store_module, "will_need", lambda *_: time.sleep(0.2))  # a slow disk
    store = FeatureStore([(two[0], 1.0)])
    for seed in range(2):
        store.prefetch(*store.choose(6, 10, torch.Generator().manual_seed(seed)), 10)
    store.settle()
    assert [future.done() for future in store._ahead.values()] == [True, True]


@pytest.mark.parametrize(
    ("changes", "weight", "words"),
    [
        ({"text": False}, 1.0, "some have features of text"),
        ({}, 0.0, "give positive numbers"),
        ({}, float("nan"), "give positive numbers"),
    ],
)
def test_stores_that_do_not_fit_say_so(two, tmp_path, changes, weight, words):
    other = write_store(tmp_path / "other", 2, **changes)
    with pytest.raises(InputError, match=words):
        FeatureStore([(two[0], 1.0), (other, weight)])


def test_stores_of_other_lengths_do_not_fit(two, tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "mean", (30, 4))
    monkeypatch.setitem(SHAPES, "logvar", (30, 4))
    other = write_store(tmp_path / "other", 2)
    with pytest.raises(InputError, match="different kinds"):
        FeatureStore([(two[0], 1.0), (other, 1.0)])


def test_an_index_that_names_other_clips_is_refused(tmp_path):
    folder = write_store(tmp_path, 3)
    path = folder / "train" / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"captions": index["captions"][:2]}))
    with pytest.raises(InputError, match="names 2 clips and the parts hold 3"):
        FeatureStore(folder)


def test_opening_a_store_reads_headers_only(tmp_path):
    """A store larger than memory: what is opened is not resident, and files are not held open."""
    folder = write_store(tmp_path, 3)
    before = len(os.listdir("/proc/self/fd"))
    store = FeatureStore(folder)
    store.rows(torch.arange(3))
    assert len(os.listdir("/proc/self/fd")) == before
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "b.saf" in line]
    assert mapped
    assert "b.safetensors" in mapped[0]
