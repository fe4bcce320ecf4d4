from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mfmjt.codec import NanoCodec
from mfmjt.errors import InputError
from tests.support.bundles import TINY_CODEC as TINY

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def codec() -> NanoCodec:
    torch.manual_seed(0)
    return NanoCodec(TINY).eval()


def noise(*shape: int) -> torch.Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("samples", [1, 511, 512, 513, 16000])
def test_every_length_goes_there_and_back(codec: NanoCodec, samples: int) -> None:
    frames = -(-samples // 512)
    mean, logvar = codec.encode(noise(2, samples))
    assert mean.shape == logvar.shape == (2, frames, 4)
    sound = codec.decode(mean)
    assert sound.shape == (2, frames * 512)
    assert bool(sound.isfinite().all())


def test_padding_is_silence(codec: NanoCodec) -> None:
    sound = noise(1, 700)
    padded = torch.nn.functional.pad(sound, (0, 1024 - 700))
    assert torch.equal(codec.encode(sound)[0], codec.encode(padded)[0])


def test_decoding_is_deterministic(codec: NanoCodec) -> None:
    latent = noise(1, 9, 4)
    torch.manual_seed(1)
    first = codec.decode(latent)
    torch.manual_seed(2)
    assert torch.equal(first, codec.decode(latent))
    # Another object with the same weights has the same fixed noise.
    twin = NanoCodec(TINY).eval()
    twin.load_state_dict(codec.state_dict())
    assert torch.equal(first, twin.decode(latent))


def test_overlap_add_inverts_the_short_time_spectrum(codec: NanoCodec) -> None:
    sound = noise(2, 128 * 12).double()
    padded = torch.nn.functional.pad(sound, (192, 192))
    window = codec.window.double()
    frames = padded.unfold(-1, 512, 128) * window
    double = NanoCodec(TINY).double()
    restored = double._inverse(torch.fft.rfft(frames))
    error = 512 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(restored, sound, rtol=error, atol=error)


def test_clock_turns_every_bin_by_its_own_frequency(codec: NanoCodec) -> None:
    # A sine in the middle of bin k, seen through frames 128 samples apart, stands still once the
    # clock is taken out.
    time = torch.arange(512 * 4, dtype=torch.float64)
    for k in (3, 10, 101):
        tone = torch.sin(2 * torch.pi * k / 512 * time)
        frames = torch.fft.rfft(tone.unfold(-1, 512, 128) * codec.window.double())[:4, k]
        still = frames / codec.clock[:4, k]
        error = torch.full_like(still, EPS * 512 * float(frames.abs().max())).abs()
        assert bool(((still - still[0]).abs() <= error.real).all())


@torch.no_grad()
def test_batch_rows_do_not_mix(codec: NanoCodec) -> None:
    sound = noise(3, 4096)
    together = codec.decode(codec.encode(sound)[0])
    for i in range(3):
        alone = codec.decode(codec.encode(sound[i : i + 1])[0])
        scale = float(together.abs().max())
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=512 * EPS * scale)


def test_gradient_reaches_every_weight() -> None:
    torch.manual_seed(0)
    codec = NanoCodec(TINY)
    mean, logvar = codec.encode(noise(1, 4096))
    (codec.decode(mean).square().sum() + logvar.sum()).backward()
    for name, weight in codec.named_parameters():
        assert weight.grad is not None, name
        assert float(weight.grad.abs().max()) > 0, name


def test_save_and_load(codec: NanoCodec, tmp_path: Path) -> None:
    path = tmp_path / "codec.safetensors"
    codec.save(path)
    loaded = NanoCodec.load(path)
    assert loaded.config == TINY
    assert not loaded.training
    assert torch.equal(loaded.decode(noise(1, 5, 4)), codec.decode(noise(1, 5, 4)))
    codec.save(path, torch.float16)
    half = NanoCodec.load(path)
    for name, value in half.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, codec.state_dict()[name].half().float())


@pytest.mark.parametrize(
    ("waveform", "words"),
    [
        (torch.zeros(16000), "shape"),
        (torch.zeros(1, 1, 16000), "shape"),
        (torch.zeros(1, 16000, dtype=torch.int16), "int16"),
        (torch.zeros(1, 0), "empty"),
        (torch.zeros(0, 16000), "empty"),
        (torch.full((1, 600), float("nan")), "NaN"),
        (torch.full((1, 600), float("inf")), "infinity"),
    ],
)
def test_refuses_bad_sound(codec: NanoCodec, waveform: torch.Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        codec.encode(waveform)


@pytest.mark.parametrize("shape", [(1, 0, 4), (1, 9, 5), (9, 4)])
def test_refuses_bad_latents(codec: NanoCodec, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="Latents of shape"):
        codec.decode(torch.zeros(shape))


def test_refuses_files_that_are_no_codec(codec: NanoCodec, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        NanoCodec.load(tmp_path / "none.safetensors")
    path = tmp_path / "codec.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="not a NanoCodec"):
        NanoCodec.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="not a NanoCodec"):
        NanoCodec.load(path)
    save_file(codec.state_dict(), path, {"config": '{"latent_dim": 4}'})
    with pytest.raises(InputError, match="not a NanoCodec"):
        NanoCodec.load(path)
