"""Features by MMAudio's codecs and encoders, in small sizes: what its network is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mfmjt.codec import VAE, BigVGAN, MMAudioCodec
from mfmjt.data.preview import write_clip
from mfmjt.encoders import CLIP, MMAudioEncoders, Synchformer
from mfmjt.encoders.tokenizer import Tokenizer
from mfmjt.errors import InputError
from mfmjt.extract.clips import Cut
from mfmjt.extract.run import Settings, extract
from mfmjt.extract.tables import read_table
from mfmjt.families import Bundle, open_bundle
from mfmjt.features.format import Part
from mfmjt.features.store import FeatureStore
from mfmjt.media import VideoStream, read_audio
from tests.extract.conftest import bundle_of, write_table
from tests.oracle import allowance, error
from tests.support.published import CLIP_CONFIG, SYNC_CONFIG, VAES, VOCODERS
from tests.support.stores import listed

SECONDS = 1.2


@pytest.fixture(scope="module", params=["16k", "44k"])
def mmaudio(request, merges) -> Bundle:
    torch.manual_seed(0)
    mode = request.param
    encoders = MMAudioEncoders(
        CLIP(CLIP_CONFIG), Synchformer(SYNC_CONFIG), Tokenizer(merges),
        (CLIP_CONFIG.image_size, SYNC_CONFIG.size),
    )  # fmt: skip
    codec = MMAudioCodec(mode, VAE(VAES[mode]), BigVGAN(VOCODERS[mode]))
    return bundle_of(f"small_{mode}", codec, encoders)


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """1.44 s at 25 frames a second, with noise for sound."""
    noise = np.random.default_rng(0)
    frames = noise.integers(0, 255, (36, 48, 64, 3), np.uint8)
    path = tmp_path_factory.mktemp("video") / "x.mp4"
    write_clip(path, frames, 0.1 * noise.standard_normal(23_040).astype(np.float32))
    return path


def test_features_are_what_the_network_is_trained_on(mmaudio, video, tmp_path):
    table = write_table(tmp_path / "t.csv", ("id", "caption"), [("x", "a dog barks")])
    settings = Settings(Cut(SECONDS, SECONDS), dtype="float32", workers=1)
    extract(read_table(table, media=video.parent), tmp_path / "out", mmaudio, settings)
    found = Part(tmp_path / "out" / "train" / "00000000.safetensors").tensors

    encoders, rate = mmaudio.encoders, mmaudio.codec.sample_rate
    whole: tuple[list, list] = ([], [])
    for block in VideoStream(video, (8, 25), fit=(torch.from_numpy,) * 2, pick="next"):
        for kept, pieces in zip(whole, block, strict=True):
            kept += pieces
    seen, synced = (torch.cat(pieces)[None] for pieces in whole)
    sound = torch.from_numpy(read_audio(video, rate, SECONDS))[None]
    with torch.inference_mode():
        mean, logvar = mmaudio.codec.encode(sound * (0.95 / sound.abs().max()))
        expected = {
            "mean": mean,
            "logvar": logvar,
            "video": encoders.encode_frames(seen[:, :9]),  # int(1.2 * 8)
            "sync": encoders.encode_sync(synced[:, :30]),
        }
        text = encoders.encode_text(["", "a dog barks"])
    hop = {16_000: 512, 44_100: 1024}[rate]
    assert found["mean"].shape[1] == -(-round(SECONDS * rate) // hop)
    for key, value in expected.items():
        assert found[key].shape == value.shape, key
        # Pictures are scaled one by one there and in groups here, sound in two steps of rounding.
        assert error(found[key], value) <= allowance(value, torch.float32, 4 * 256 * 12), key
    store = FeatureStore(tmp_path / "out")
    assert store.grid is None or store.grid * found["sync"].shape[1] == 8 * store.latent_length
    assert torch.equal(store.rows(torch.zeros(1).long())["text"], text[1:])
    assert torch.equal(store.null_text, text[0])


def test_the_bytes_of_a_store_stay(mmaudio, raw_media, tmp_path, digests):
    rate = mmaudio.codec.sample_rate
    settings = Settings(Cut(SECONDS, SECONDS))
    extract(read_table(raw_media / f"{rate}.csv"), tmp_path / "out", mmaudio, settings)
    digests.check(f"{rate} Hz", *listed(tmp_path / "out"))


def test_folders_without_codec_and_encoders_say_what_to_do(tmp_path):
    with pytest.raises(InputError, match="neither"):
        open_bundle(tmp_path, False)
    with pytest.raises(InputError, match="leave out the codec"):
        open_bundle("nano", False, "16k")
    with pytest.raises(InputError, match=r"best_netG\.pt"):
        open_bundle(tmp_path, False, "16k")


def test_encoders_are_told_apart_by_their_weights(mmaudio):
    parts = mmaudio.codec, mmaudio.encoders
    before = Bundle(mmaudio.network, *parts).identity()
    with torch.no_grad():
        weight = next(mmaudio.encoders.clip.parameters())
        weight += 1
        changed = Bundle(mmaudio.network, *parts).identity()
        weight -= 1
    assert changed != before
