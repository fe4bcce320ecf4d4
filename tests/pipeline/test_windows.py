"""Seams: where windows lie, what noise they get, and how latents and waveforms are joined."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfmjt.codec import BigVGANConfig, NanoCodec, NanoCodecConfig
from mfmjt.codec.bigvgan import BIGVGAN_CONFIGS, BigVGAN
from mfmjt.codec.vae import VAE, VAEConfig
from mfmjt.pipeline.windows import (
    CHUNK,
    CONTEXT,
    FADE,
    OVERLAP,
    STRETCH,
    Joiner,
    Noise,
    expected,
    plan,
)
from tests.oracle import allowance, error
from tests.support.published import vae_shapes, vocoder_shapes
from tests.support.weights import draw_all

durations = st.floats(0.01, 500, allow_nan=False)


def of(length, duration):
    return list(plan(length, lambda reach: duration if duration <= reach else None))


@given(length=st.integers(2, 12), duration=durations)
def test_windows_cover_all_and_overlap(length, duration):
    windows = of(length, duration)
    assert [w.last for w in windows] == [False] * (len(windows) - 1) + [True]
    assert windows[0].start == 0
    assert math.isclose(windows[-1].end, duration)
    for before, after in pairwise(windows):
        assert before.duration == length
        assert before.start + OVERLAP <= after.start <= before.end - OVERLAP
    if len(windows) > 1:
        # The last one is as long as the others but for less than the second it begins on.
        assert length - 1 < windows[-1].duration <= STRETCH * length
    else:
        assert windows[0].duration == duration <= STRETCH * length
    assert len(windows) == expected(length, duration)


@given(length=st.integers(2, 12), duration=durations)
def test_the_duration_is_not_needed_before_the_end(length, duration):
    asked = []

    def total(reach):
        asked.append(reach)
        return duration if duration <= reach else None

    for window in plan(length, total):
        assert asked[-1] <= window.start + STRETCH * length + length
    assert asked == sorted(asked)


def test_the_first_noise_is_that_of_the_seed_alone():
    drawn = torch.randn(77, 20, generator=torch.Generator().manual_seed(5))
    assert torch.equal(Noise(4, 2, 20)(0, 77)[1], drawn)


@settings(max_examples=20)
@given(starts=st.lists(st.integers(0, 700), min_size=1, max_size=5))
def test_noise_belongs_to_positions(starts):
    whole = Noise(3, 2, 4)
    first = whole(0, 30)
    everything = torch.cat((first, whole(30, 1000)), dim=1)
    again = Noise(3, 2, 4)
    assert torch.equal(again(0, 30), first)
    for start in sorted(starts):
        assert torch.equal(again(start, 250), everything[:, start : start + 250])


def test_noise_is_normal_and_its_rows_are_independent():
    first, second = Noise(0, 2, 8)(0, 4000)
    for values in (first, second, torch.cat([Noise(s, 1, 8)(0, 9)[0] for s in range(400)])):
        count = values.numel()
        assert abs(float(values.mean())) < 4 / math.sqrt(count)
        assert abs(float(values.var()) - 1) < 4 * math.sqrt(2 / count)
    noise = Noise(0, 1, 1000)
    noise(0, 1)
    rows = noise(1, 256 + 256)[0]
    for one, other in ((rows[0], rows[256]), (first.flatten()[:1000], second.flatten()[:1000])):
        assert abs(float(torch.corrcoef(torch.stack((one, other)))[0, 1])) < 4 / math.sqrt(1000)


def joined(windows, fade=0, decode=lambda latent: latent, hop=1):
    joiner = Joiner(decode, hop, fade)
    for start, latents in windows:
        joiner.add(start, latents)
    return joiner.finish()


def pieces(latent, size):
    """Windows one after the other, which do not overlap."""
    return [(at, latent[:, at : at + size]) for at in range(0, latent.shape[1], size)]


@pytest.mark.parametrize("fade", [1, 5, 31, 100])
def test_windows_that_agree_are_joined_without_a_trace(fade):
    whole = torch.randn(2, 700, 3, dtype=torch.float64)
    places = ((0, 250), (219, 469), (438, 688), (450, 700))
    result = joined([(a, whole[:, a:b]) for a, b in places], fade)
    assert error(result, whole) <= allowance(whole, torch.float64, 2)


def test_a_fade_goes_from_one_window_to_the_next_in_the_middle():
    zeros, ones = torch.zeros(1, 40, 1), torch.ones(1, 40, 1)
    result = joined([(0, zeros), (20, ones)], 10).flatten()
    assert result.shape == (60,)
    assert not bool(result[:25].any())
    assert bool((result[35:] == 1).all())
    fade = result[24:36]
    assert bool((fade.diff() > 0).all())
    assert error(fade + fade.flip(0), torch.ones(12)) <= allowance(fade, torch.float32, 2)


def test_what_fits_into_one_chunk_is_decoded_as_it_is():
    calls = []

    def decode(latent):
        calls.append(latent.shape[1])
        return latent[..., 0]

    for length in (1, CHUNK, CHUNK + 2 * CONTEXT + FADE):
        latent = torch.randn(1, length, 3)
        made = joined(pieces(latent, 100), decode=decode)
        assert torch.equal(made, latent[..., 0])
    assert calls == [1, CHUNK, CHUNK + 2 * CONTEXT + FADE]


@torch.inference_mode()
def test_nano_in_chunks_is_nano_as_a_whole():
    # All of the depth, which decides how far the decoder sees; little of the width.
    codec = NanoCodec(NanoCodecConfig(encoder_dim=8, decoder_dims=(16, 12, 8))).eval()
    codec.head.bias[3 * 257 :] = 0  # its noise is heard, so its phase must fit
    latent = torch.randn(1, 2 * CHUNK + 300, 20)
    whole = codec.decode(latent)
    chunked = joined(pieces(latent, 37), decode=codec.decode, hop=codec.hop)
    assert error(chunked, whole) <= allowance(whole, torch.float32, 512)
    shifted = torch.cat((whole[:, : CHUNK * codec.hop], codec.decode(latent[:, CHUNK - 1 :])), 1)
    assert error(shifted[:, : whole.shape[1]], whole) > allowance(whole, torch.float32, 512)


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["16k", "44k"])
def test_mmaudio_in_chunks_differs_by_its_attention_alone(mode):
    # The published depths and rates, which decide how far the convolutions see; little width.
    sizes = VAEConfig({"16k": 80, "44k": 128}[mode], 20, 4)
    vae = VAE.from_mmaudio(draw_all(vae_shapes(sizes)), sizes)
    published = BIGVGAN_CONFIGS[mode]
    narrow = BigVGANConfig(
        published.bands, 64, published.rates, published.kernels, published.tanh, published.bias
    )
    vocoder = BigVGAN.from_state_dict(draw_all(vocoder_shapes(narrow)), narrow)
    vae.decoder.mid.attn_1.proj_out.weight.zero_()

    def decode(latent):
        return vocoder(vae.decode(latent.transpose(1, 2)))[:, 0]

    hop = 2 * vocoder.hop
    latent = torch.randn(1, 100, 20)
    whole = decode(latent)
    middle = decode(latent[:, 10:]), decode(latent[:, :-10])
    inner = slice(CONTEXT * hop, -CONTEXT * hop)
    for part, same in zip(middle, (whole[:, 10 * hop :], whole[:, : -10 * hop]), strict=True):
        assert error(part[:, inner], same[:, inner]) <= allowance(whole, torch.float32, 11 * 64)
    # Much less context would not do.
    near = slice(4 * hop, -CONTEXT * hop)
    assert error(middle[0][:, near], whole[:, 10 * hop :][:, near]) > allowance(
        whole, torch.float32, 11 * 64
    )
