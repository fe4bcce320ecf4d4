from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from mfmjt.codec import NanoCodec
from mfmjt.data import foley
from mfmjt.errors import InputError
from mfmjt.train import features
from mfmjt.train.features import extract, video_frames
from mfmjt.train.shards import Shard
from mfmjt.train.store import FeatureStore


def test_features_are_those_of_the_clips(ends, store):
    shard = load_file(store / "train" / "000000.safetensors")
    assert {key: tuple(value.shape[1:]) for key, value in shard.items()} == {
        "mean": (250, 20),
        "logvar": (250, 20),
        "video": (64, 128),
        "sync": (200, 128),
    }
    clip = foley.clip(3, "train")
    frames = torch.from_numpy(clip.frames)
    with torch.no_grad():
        mean, _ = ends.codec.encode(torch.from_numpy(clip.audio)[None])
        video = ends.encoders.encode_frames(video_frames(frames, 25, 8)[None])
    for name, expected in (("mean", mean), ("video", video)):
        # Equal up to fp16, and to sums in another order where the batch is another.
        bound = 4 * torch.finfo(torch.float16).eps * expected.abs().max()
        assert (shard[name][3].float() - expected[0]).abs().max() <= bound
    index = FeatureStore(store)
    assert (index.captions[3], index.labels[3]) == (clip.caption, clip.label)
    assert index.events[3] == clip.events.tolist()


def test_index_has_the_statistics_of_sampled_latents(store):
    shard = load_file(store / "train" / "000000.safetensors")
    mean, logvar = shard["mean"].double().flatten(0, 1), shard["logvar"].double().flatten(0, 1)
    index = FeatureStore(store)
    eps = torch.finfo(torch.float32).eps
    expected = (mean.var(0, correction=0) + logvar.exp().mean(0)).sqrt()
    torch.testing.assert_close(index.latent_mean.double(), mean.mean(0), rtol=eps, atol=eps)
    torch.testing.assert_close(index.latent_std.double(), expected, rtol=8 * eps, atol=eps)


def test_goes_on_where_it_stopped(ends, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SHARD_CLIPS", 2)
    whole = extract(tmp_path / "whole", "test", 3, ends.encoders, ends.codec, workers=0)
    make, made = features._make_shard, []

    def fail_at_second(shard, *rest):
        if made:
            raise KeyboardInterrupt
        made.append(shard[0])
        return make(shard, *rest)

    part = tmp_path / "part"
    with monkeypatch.context() as patch:
        patch.setattr(features, "_make_shard", fail_at_second)
        with pytest.raises(KeyboardInterrupt):
            extract(part, "test", 3, ends.encoders, ends.codec, workers=0)
    written = made[0].stat().st_mtime_ns
    # The rest by two other processes, which must make the same.
    folder = extract(part, "test", 3, ends.encoders, ends.codec, workers=2)
    assert made[0].stat().st_mtime_ns == written
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in folder.iterdir())
    for name in names[:-1]:
        assert Shard(whole / name).metadata == Shard(folder / name).metadata
        ours, theirs = load_file(whole / name), load_file(folder / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert names[-1] == "index.json"
    assert (whole / names[-1]).read_text() == (folder / names[-1]).read_text()


def test_a_store_can_grow(ends, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SHARD_CLIPS", 2)
    extract(tmp_path, "train", 1, ends.encoders, ends.codec, workers=0)
    extract(tmp_path, "train", 3, ends.encoders, ends.codec, workers=0)
    assert len(FeatureStore(tmp_path)) == 3


def test_features_of_other_weights_are_not_mixed_in(ends, tmp_path):
    extract(tmp_path, "train", 1, ends.encoders, ends.codec, workers=0)
    index = json.loads((tmp_path / "train" / "index.json").read_text())
    torch.manual_seed(1)
    other = NanoCodec()
    with pytest.raises(InputError, match="other weights or another seed"):
        extract(tmp_path, "train", 1, ends.encoders, other, workers=0)
    with pytest.raises(InputError, match="other weights or another seed"):
        extract(tmp_path, "train", 1, ends.encoders, ends.codec, workers=0, seed=1)
    assert json.loads((tmp_path / "train" / "index.json").read_text()) == index


def test_video_frames_are_those_on_the_screen():
    frames = torch.arange(200).view(200, 1, 1, 1)
    picked = video_frames(frames, 25, 8).flatten().tolist()
    assert picked == [int(j / 8 * 25) for j in range(64)]
