from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mfmjt.encoders import NanoEncoders
from mfmjt.errors import InputError
from tests.support.bundles import TINY_ENCODERS as TINY

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def encoders() -> NanoEncoders:
    torch.manual_seed(0)
    return NanoEncoders(TINY).eval().requires_grad_(False)


def video(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator)


def as_float(frames: torch.Tensor) -> torch.Tensor:
    return frames.movedim(-1, -3).float() / 127.5 - 1


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    # Features have unit mean square; sums of up to 6 * 25 or 16 * 8 products in other groupings,
    # through nine layers.
    torch.testing.assert_close(a, b, rtol=0, atol=9 * 150 * EPS)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 20])
def test_one_feature_per_frame(encoders: NanoEncoders, count: int) -> None:
    frames = video(2, count, 64, 64)
    assert encoders.encode_frames(frames).shape == (2, count, 16)
    sync = encoders.encode_sync(frames)
    assert sync.shape == (2, -(-count // 8) * 8, 16)
    close(sync.square().mean(-1), torch.ones(sync.shape[:2]))


def test_segments_and_the_whole_clip_agree(encoders: NanoEncoders) -> None:
    frames = video(1, 40, 64, 64)
    whole = encoders.encode_sync(frames)
    segments = as_float(frames).unfold(1, 16, 8).movedim(-1, 2)
    by_segment = encoders.sync(segments)
    assert by_segment.shape == (1, 4, 8, 16)
    close(by_segment.flatten(1, 2), whole[:, 4:36])


def test_a_sync_feature_sees_four_frames_each_way(encoders: NanoEncoders) -> None:
    frames = video(1, 24, 64, 64)
    before = encoders.encode_sync(frames)
    frames[:, 12] = 255 - frames[:, 12]
    changed = (encoders.encode_sync(frames) - before).abs().amax(-1)[0]
    assert set(changed.nonzero().flatten().tolist()) == set(range(8, 17))


def test_a_still_clip_has_one_sync_feature(encoders: NanoEncoders) -> None:
    still = encoders.encode_sync(video(1, 1, 64, 64).expand(1, 16, 64, 64, 3))
    close(still, still[:, :1].expand_as(still))


def test_other_sizes_are_resized(encoders: NanoEncoders) -> None:
    small = video(1, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    for factor in (2, 3):
        large = small.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        features, expected = encoders.encode_frames(large), encoders.encode_frames(small)
        similar = torch.nn.functional.cosine_similarity(features, expected, dim=-1)
        other = torch.nn.functional.cosine_similarity(
            encoders.encode_frames(video(1, 3, 64, 64, seed=1)), expected, dim=-1
        )
        assert bool((similar > other).all())
    wide = video(1, 8, 90, 160)
    assert encoders.encode_sync(wide).shape == (1, 8, 16)
    segment = torch.nn.functional.interpolate(
        as_float(wide)[0], (64, 64), mode="bicubic", antialias=True
    ).clamp(-1, 1)
    twice = segment.repeat(2, 1, 1, 1)[None, None]
    close(encoders.sync(as_float(wide).repeat(1, 2, 1, 1, 1)[:, None]), encoders.sync(twice))


def test_text_shapes_and_what_changes_them(encoders: NanoEncoders) -> None:
    texts = ["", "a glass ball", "A GLASS BALL", "a ball glass", "a glass ball!"]
    features = encoders.encode_text(texts)
    assert features.shape == (5, 32, 16)
    assert torch.equal(features[1], features[2])
    for i, j in ((0, 1), (1, 3), (1, 4)):
        assert not torch.equal(features[i], features[j])


def test_a_text_does_not_depend_on_its_batch(encoders: NanoEncoders) -> None:
    texts = ["", "rain", "a much longer text about steps on the ground"]
    together = encoders.encode_text(texts)
    for text, row in zip(texts, together, strict=True):
        close(encoders.encode_text([text])[0], row)


def test_words_beyond_the_last_token_are_ignored(encoders: NanoEncoders) -> None:
    words = [f"word{i}" for i in range(40)]
    texts = [" ".join(words[:n]) for n in (30, 31, 32, 40)]
    features = encoders.encode_text(texts)
    assert not torch.equal(features[0], features[1])
    assert torch.equal(features[1], features[2])
    assert torch.equal(features[1], features[3])


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=200))
def test_any_string_is_a_text(encoders: NanoEncoders, text: str) -> None:
    assert bool(encoders.encode_text([text]).isfinite().all())


@pytest.mark.parametrize("text", ["🔔🥁 ding", "x" * 10_000, "word " * 10_000, "\ud800", "\n\t "])
def test_odd_strings(encoders: NanoEncoders, text: str) -> None:
    features = encoders.encode_text([text])
    assert features.shape == (1, 32, 16)
    assert bool(features.isfinite().all())


def test_hashing_is_the_same_everywhere() -> None:
    # CRC-32 of "word ball" and of its trigrams, from the published polynomial by hand.
    from mfmjt.encoders.nano import word_pieces

    def crc(data: bytes) -> int:
        value = 0xFFFFFFFF
        for byte in data:
            value ^= byte
            for _ in range(8):
                value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
        return value ^ 0xFFFFFFFF

    names = (b"word ball", b"gram #ba", b"gram bal", b"gram all", b"gram ll#")
    assert word_pieces("ball", 4096) == tuple(crc(name) % 4096 for name in names)


def test_gradient_reaches_every_weight() -> None:
    torch.manual_seed(0)
    encoders = NanoEncoders(TINY)
    target = torch.randn(16)
    loss = sum(
        (feature * target).sum()
        for feature in (
            encoders.encode_frames(video(2, 2, 64, 64)),
            encoders.encode_sync(video(2, 2, 64, 64)),
            encoders.encode_text(["a ball", "the bell"]),
        )
    )
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    for name, weight in encoders.named_parameters():
        assert weight.grad is not None, name
        assert float(weight.grad.abs().max()) > 0, name


def test_save_and_load(encoders: NanoEncoders, tmp_path: Path) -> None:
    path = tmp_path / "encoders.safetensors"
    encoders.save(path)
    loaded = NanoEncoders.load(path)
    assert loaded.config == TINY
    assert not loaded.training
    assert torch.equal(loaded.encode_text(["a bell"]), encoders.encode_text(["a bell"]))
    frames = video(1, 8, 64, 64)
    assert torch.equal(loaded.encode_sync(frames), encoders.encode_sync(frames))
    encoders.save(path, torch.float16)
    for name, value in NanoEncoders.load(path).state_dict().items():
        assert torch.equal(value, encoders.state_dict()[name].half().float())


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (torch.zeros(1, 8, 64, 64, 3), "float32"),
        (torch.zeros(8, 64, 64, 3, dtype=torch.uint8), "shape"),
        (torch.zeros(1, 8, 3, 64, 64, dtype=torch.uint8), "shape"),
        (torch.zeros(1, 0, 64, 64, 3, dtype=torch.uint8), "No frames"),
    ],
)
def test_refuses_bad_frames(encoders: NanoEncoders, frames: torch.Tensor, words: str) -> None:
    for encode in (encoders.encode_frames, encoders.encode_sync):
        with pytest.raises(InputError, match=words):
            encode(frames)


def test_refuses_bad_segments_and_texts(encoders: NanoEncoders) -> None:
    with pytest.raises(InputError, match="Segments of shape"):
        encoders.sync(torch.zeros(1, 1, 15, 3, 64, 64))
    for texts in ([], "a bell", [1]):
        with pytest.raises(InputError, match="list of strings"):
            encoders.encode_text(texts)  # type: ignore[arg-type]


def test_refuses_files_that_are_no_encoders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        NanoEncoders.load(tmp_path / "none.safetensors")
    path = tmp_path / "encoders.safetensors"
    path.write_bytes(b"junk")
    with pytest.raises(InputError, match="not a NanoEncoders"):
        NanoEncoders.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="not a NanoEncoders"):
        NanoEncoders.load(path)
