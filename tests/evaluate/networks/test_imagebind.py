from __future__ import annotations

import pytest
import torch

from mfmjt.errors import InputError
from mfmjt.evaluate.networks import ImageBind
from tests.support.weights import normal, read

TERMS = 1176  # numbers of a patch of frames, the longest sum


@pytest.fixture(scope="module")
def public():
    state, tensors = read("evaluate", "imagebind_small")
    return ImageBind.from_state_dict(state), tensors


def test_agrees_with_the_public_network(public, near, near_spectrum) -> None:
    network, tensors = public
    waveform = tensors["in.waveform"][None] / 32768
    log_mel = network.log_mel(waveform)
    # The FFT is of differences of neighbors, each of which is rounded: four times the variance.
    near_spectrum(log_mel[0, :, :, ::8], tensors["out.log_mel"], 4 * 512, 1 / 9.138)
    frames = normal("input.vision", (1, 3, 3, 2, 224, 224), 1)
    with torch.inference_mode():
        near(network.audio_clips(waveform)[0], tensors["out.audio_clips"], TERMS)
        near(network.encode_audio(waveform), tensors["out.audio"], TERMS)
        near(network.video_clips(frames)[0], tensors["out.vision_clips"], TERMS)
        near(network.encode_video(frames), tensors["out.vision"], TERMS)


def test_clips_are_at_the_beginning_in_the_middle_and_at_the_end(public) -> None:
    network, _ = public
    waveform = torch.rand(2, 2, 5 * 16000) - 0.5
    found = network.log_mel(waveform)
    assert found.shape == (2, 3, 128, 204)
    for i, start in enumerate((0, 24_000, 48_000)):
        own = network.log_mel(waveform[:, :, start : start + 32_000])
        assert torch.equal(own[:, 1], found[:, i])
    # The first channel is heard, but the mean is that of all.
    other = waveform.clone()
    other[:, 1] = waveform[:, 1].flip(1)
    same = network.log_mel(other[:, :, :32_000])[:, 0]
    torch.testing.assert_close(same, network.log_mel(waveform[:, :, :32_000])[:, 0])
    mono = network.log_mel(waveform[:, 0])
    torch.testing.assert_close(mono, network.log_mel(waveform[:, :1]), rtol=0, atol=0)


def test_a_short_sound_ends_in_zeros_of_the_logarithm(public) -> None:
    network, _ = public
    found = network.log_mel(torch.rand(1, 1600) - 0.5)
    zero = torch.tensor(4.268 / 9.138)
    torch.testing.assert_close(found[..., 8:], zero.expand(1, 3, 128, 196))
    assert bool((found[..., :8] < zero).any())
    for shape, told in (
        ((1, 399), "400 samples"),
        ((1, 0, 500), r"\(1, 0, 500\)"),
        ((500,), "500"),
    ):
        with pytest.raises(InputError, match=told):
            network.log_mel(torch.zeros(shape))


def test_clips_do_not_see_one_another(public, near) -> None:
    network, _ = public
    frames = torch.rand(1, 2, 3, 2, 224, 224)
    with torch.inference_mode():
        near(network.video_clips(frames)[:, 1:], network.video_clips(frames[:, 1:]), TERMS)
    with pytest.raises(InputError, match=r"\(1, 2, 3, 2, 224, 200\)"):
        network.video_clips(frames[..., :200])


def test_every_wrong_entry_is_named(hollow) -> None:
    others = {f"modality_trunks.{kind}.x": torch.zeros(1) for kind in ("text", "depth", "imu")}
    state = hollow("imagebind_small") | others
    assert ImageBind.from_state_dict({"model": state}).sample_rate == 16000
    del state["modality_trunks.audio.blocks.2.attn.bias_v"]
    state["modality_heads.vision.2.weight"] = torch.zeros(32, 160)
    state["modality_trunks.audio.pre_transformer_layer.0.weight"] = torch.zeros(128)
    with pytest.raises(InputError) as caught:
        ImageBind.from_state_dict(state)
    for told in (
        "missing modality_trunks.audio.blocks.2.attn.bias_v",
        "modality_heads.vision.2.weight has shape (32, 160), not (64, 160)",
        "unexpected modality_trunks.audio.pre_transformer_layer.0.weight",
    ):
        assert told in str(caught.value)
