from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mfmjt.errors import InputError
from mfmjt.train.store import FeatureStore

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


def test_a_damaged_shard_is_named(clock):
    (clock.folder / "a.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="Cannot read features"):
        FeatureStore(clock.folder.parent)
