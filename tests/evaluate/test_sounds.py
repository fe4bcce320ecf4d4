from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mfmjt.errors import InputError, RunError
from mfmjt.evaluate.classifier import Classifier
from mfmjt.evaluate.examples import Examples
from mfmjt.evaluate.onsets import HOP
from mfmjt.evaluate.sounds import Made, Sounds, generate
from mfmjt.families import Bundle
from mfmjt.meanflow import Sampling
from mfmjt.model import MFMJT


def test_noise_follows_seed_and_clip_whatever_the_batch(bundle: Bundle, clips: Examples) -> None:
    whole = generate(bundle, clips, batch=3)
    single = generate(bundle, clips, batch=1)
    assert whole.shape == clips.audio.shape
    error = torch.finfo(torch.float32).eps * whole.abs().max() * whole.shape[1]
    assert (whole - single).abs().max() <= error
    assert not torch.allclose(whole, generate(bundle, clips, seed=2, batch=3))


def test_conditions_are_what_is_given(bundle: Bundle, clips: Examples) -> None:
    def flipped(*names: str) -> Examples:
        features = {k: v.flip(0) if k in names else v for k, v in clips.features.items()}
        return dataclasses.replace(clips, features=features)

    def changed(examples: Examples, conditions: str) -> bool:
        options = {"conditions": conditions, "batch": 3}
        return not torch.equal(
            generate(bundle, clips, **options), generate(bundle, examples, **options)
        )

    other, blind = flipped("text"), flipped("video", "sync")
    assert changed(other, "both")
    assert changed(other, "text")
    assert not changed(other, "video")
    assert changed(blind, "both")
    assert changed(blind, "video")
    assert not changed(blind, "text")


def test_a_masked_example_does_not_look_at_its_video(bundle: Bundle, clips: Examples) -> None:
    mask = torch.tensor([True, False, True])
    features = clips.features | {"video_mask": mask}
    blind = features | {
        k: v * mask[:, None, None] for k, v in features.items() if k in ("video", "sync")
    }
    masked, blank = (
        generate(bundle, dataclasses.replace(clips, features=given)) for given in (features, blind)
    )
    assert torch.equal(masked, blank)
    seen = generate(bundle, clips)
    assert torch.equal(seen[[0, 2]], masked[[0, 2]])
    assert not torch.equal(seen[1], masked[1])


def test_guidance_steps_and_the_instantaneous_velocity_change_the_sound(
    bundle: Bundle, clips: Examples
) -> None:
    plain = generate(bundle, clips, Sampling(guidance=1.0))
    for other in (
        Sampling(guidance=3.0),
        Sampling(2, guidance=1.0),
        Sampling(guidance=1.0, instantaneous=True),
    ):
        assert not torch.equal(plain, generate(bundle, clips, other))


def test_misuse_is_refused(bundle: Bundle, clips: Examples) -> None:
    with pytest.raises(InputError, match="Unknown conditions"):
        generate(bundle, clips, conditions="smell")


def test_a_network_that_makes_nan_is_refused(bundle: Bundle, clips: Examples) -> None:
    broken = MFMJT(bundle.network.config)
    torch.nn.init.constant_(broken.final_layer.conv.bias, torch.nan)
    damaged = Bundle(broken, bundle.codec, bundle.encoders).to("cpu")
    with pytest.raises(RunError, match="not finite"):
        generate(damaged, clips)


def test_sounds_of_another_rate_are_heard_alike(classifier: Classifier, clips: Examples) -> None:
    from soxr import resample

    fast = torch.from_numpy(np.stack([resample(w.numpy(), 16000, 44100) for w in clips.audio]))
    ours, theirs = Sounds(fast, 44100, classifier), Sounds(clips.audio, 16000, classifier)
    assert np.array_equal(ours.predicted, theirs.predicted)
    for ours_, theirs_ in zip(ours.onsets, theirs.onsets, strict=True):
        np.testing.assert_allclose(ours_, theirs_, rtol=0, atol=HOP)


def test_each_sound_is_made_once(bundle: Bundle, classifier: Classifier, clips: Examples) -> None:
    seen = []
    made = Made(
        bundle,
        clips,
        classifier,
        sampling=Sampling(),
        conditions="text",
        progress=lambda stage, done: seen.append((stage, done)),
    )
    assert made.from_text is made
    assert seen == [("generate", 1.0)]
    assert made.again is made.again
    assert len(seen) == 2
    assert not torch.equal(made.again.waves, made.waves)
    assert made.through_codec.waves.shape == made.others.waves.shape == clips.audio.shape
