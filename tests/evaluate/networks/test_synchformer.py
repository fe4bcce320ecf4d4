from __future__ import annotations

import re

import pytest
import torch

from mfmjt.encoders import Synchformer as Visual
from mfmjt.encoders import SynchformerConfig
from mfmjt.errors import InputError
from mfmjt.evaluate.networks import Synchformer
from tests.support.weights import about, normal, read

TERMS = 3072


@pytest.fixture(scope="module")
def public():
    state, tensors = read("evaluate", "synchformer_av")
    return Synchformer.from_state_dict(state), tensors


def test_agrees_with_the_public_network(public, near, near_spectrum) -> None:
    network, tensors = public
    waveform = tensors["in.waveform"] / 32768
    every = 5
    log_mel = network.log_mel(waveform)[:, : 2 * every : every]
    # Scaled nepers; the column that is filled up is the same in both.
    near_spectrum(log_mel, tensors["out.log_mel"], 1024, 1 / 9.1379948)
    with torch.inference_mode():
        audio = network.encode_audio(waveform)
        assert audio.shape == (1, 24, 6, 768)
        near(audio[:, ::4], tensors["out.audio"], TERMS)
        logits = network(normal("input.video", (1, 24, 8, 768), 1), audio)
    near(logits[:, 0], tensors["out.logits_first"], TERMS)
    near(logits[:, 1], tensors["out.logits_last"], TERMS)
    offsets = network.offsets(logits)
    torch.testing.assert_close(offsets.float().T, tensors["out.offsets"])
    assert float(offsets.mean()) == pytest.approx(float(tensors["out.desync"]))


def test_desync_of_several_clips_is_the_public_one(public, near) -> None:
    network, _ = public  # whose bridge has the weights that these vectors are of
    metadata, tensors = about("evaluate", "desync")
    given = {}
    for kind in ("video", "audio"):
        noise, mean = (
            normal(name, metadata["inputs"][name], metadata["seed"])
            for name in (f"input.{kind}", f"input.{kind}_mean")
        )
        given[kind] = noise + 2 * mean.repeat_interleave(7, dim=1)[:, : noise.shape[1]]
    with torch.inference_mode():
        logits = network(**given)
        near(logits[:, 0], tensors["out.logits_first"], TERMS)
        near(logits[:, 1], tensors["out.logits_last"], TERMS)
        assert float(network.offsets(logits).mean()) == pytest.approx(float(tensors["out.desync"]))
        # Of exactly 14 segments both windows are all there is.
        short = network(given["video"][:2, :14], given["audio"][:2, :14])
    near(short[:, 0], logits[:2, 0], TERMS)
    near(short[:, 1], logits[:2, 0], TERMS)


def test_offsets_are_the_distance_of_the_best_class_from_none() -> None:
    logits = torch.eye(21).roll(3, dims=1)
    grid = torch.linspace(-2, 2, 21, dtype=torch.float64)
    torch.testing.assert_close(Synchformer.offsets(logits), grid[logits.argmax(1)].abs())


def test_a_sound_is_cut_into_segments_that_overlap(public) -> None:
    network, _ = public
    waveform = torch.rand(2, 10_240 + 2 * 5_120 + 100) - 0.5
    whole = network.log_mel(waveform)
    assert whole.shape == (2, 3, 128, 66)
    part = network.log_mel(waveform[:, 5_120 : 5_120 + 10_240])
    torch.testing.assert_close(part[:, 0], whole[:, 1], rtol=0, atol=0)
    with pytest.raises(InputError, match=r"10,240 samples \(0\.64 s"):
        network.encode_audio(waveform[:, :10_239])


def test_features_of_other_shapes_are_refused(public) -> None:
    network, _ = public
    video, audio = torch.zeros(1, 24, 8, 768), torch.zeros(1, 24, 6, 768)
    for segments, sounds in ((13, 13), (24, 23)):
        with pytest.raises(InputError, match=f"{segments} segments of frames and {sounds} of"):
            network(video[:, :segments], audio[:, :sounds])
    with pytest.raises(InputError, match=re.escape("(1, 13, 8, 768) and (1, 14, 6, 768)")):
        network.compare(video[:, :13], audio[:, :14])
    with pytest.raises(InputError, match="no visual half"):
        network.encode_video(torch.zeros(1, 16, 3, 224, 224))


def test_video_is_cut_into_segments_that_overlap(hollow) -> None:
    network = Synchformer.from_state_dict(hollow("desync"))
    visual = Visual(SynchformerConfig(dim=12, depth=1, heads=3, size=32)).eval()
    network.visual = visual
    frames = torch.rand(1, 16 + 8 * 9 + 5, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        found = network.encode_video(frames)
        assert found.shape == (1, 10, 8, 12)
        own = visual(frames[:, None, 72:88])
    torch.testing.assert_close(found[:, 9:], own)
    with pytest.raises(InputError, match="at least 16"):
        network.encode_video(frames[:, :15])
    with pytest.raises(InputError, match="no audio half"):
        network.encode_audio(torch.zeros(1, 20_000))


def test_every_wrong_entry_is_named(hollow) -> None:
    state = {f"module.{name}": value for name, value in hollow("synchformer_av").items()}
    name = "afeat_extractor.ast.encoder.layer.3.attention.attention.key.weight"
    del state[f"module.{name}"]
    state["module.transformer.off_head.weight"] = torch.zeros(41, 768)
    state["module.transformer.blocks.3.ln1.weight"] = torch.zeros(768)
    state["module.vfeat_extractor.patch_embed_3d.proj.weight"] = torch.zeros(768, 3, 2, 16, 16)
    with pytest.raises(InputError) as caught:
        Synchformer.from_state_dict({"model": state})
    for told in (
        f"missing {name}",
        "transformer.off_head.weight has shape (41, 768), not (21, 768)",
        "unexpected transformer.blocks.3.ln1.weight",
    ):
        assert told in str(caught.value)
    incomplete = hollow("desync") | {"vfeat_extractor.patch_embed_3d.proj.weight": torch.zeros(1)}
    with pytest.raises(InputError, match=r"visual encoder.*missing cls_token"):
        Synchformer.from_state_dict(incomplete)
