from __future__ import annotations

import pytest
import torch

from mfmjt.evaluate.examples import procedural
from mfmjt.experiment.length import looping, made
from mfmjt.families import open_bundle


def test_what_repeats_itself_loops() -> None:
    rate, bar = 10.0, torch.randn(3, 15, 4)
    loop = torch.cat([bar] * 6, dim=1)
    # Equal latents have a cosine of 1, to the rounding of float32.
    assert looping(loop, rate) == pytest.approx(1, abs=1e-6)
    # Independent ones of 4 channels: the mean of at least 45 cosines of variance 1/4 has a standard
    # deviation of 0.075, and the largest of 35 such means is below 5 of them.
    assert looping(torch.randn(3, 90, 4), rate) < 5 * 0.075


def test_long_sounds_in_one_pass_and_in_windows() -> None:
    bundle = open_bundle("nano").to("cpu")
    examples = procedural(bundle.encoders, 2, duration=10.0, batch=1)
    whole, latents = made(bundle, examples, None)
    assert latents.shape[1] == bundle.lengths(10.0).latents
    parts, windows = made(bundle, examples, 4)
    assert whole.shape == parts.shape
    assert windows.shape[1] > latents.shape[1]  # they overlap
    again, _ = made(bundle, examples, 10)
    assert torch.equal(again, whole)  # one window is one pass
