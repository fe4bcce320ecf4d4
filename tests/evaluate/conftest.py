"""A small model that answers to its conditions, a small judge, and three clips."""

from __future__ import annotations

import pytest
import torch

from mfmjt.codec import NanoCodec
from mfmjt.data import foley
from mfmjt.encoders import NanoEncoders
from mfmjt.evaluate.classifier import Classifier, ClassifierConfig
from mfmjt.evaluate.examples import Examples, procedural
from mfmjt.evaluate.report import Report
from mfmjt.evaluate.run import evaluate
from mfmjt.families import Bundle
from mfmjt.model import MFMJT
from tests.support.bundles import CODEC

CLIPS = 3
DURATION = 1.5  # s: long enough for an event in each of the clips


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MFMJT.from_config("nano", hidden_dim=32, num_heads=1, depth=2, fused_depth=1)
        # A fresh network gives exactly zero; this one shall answer to its conditions.
        for parameter in network.parameters():
            if parameter.requires_grad and not bool(parameter.detach().any()):
                torch.nn.init.normal_(parameter, std=0.2)
        codec = NanoCodec(CODEC)
        encoders = NanoEncoders()
    return Bundle(network, codec, encoders).to("cpu")


@pytest.fixture(scope="session")
def classifier() -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ClassifierConfig(foley.CLASSES, bands=16, widths=(8, 8), embedding=4)
        return Classifier(config).eval()


@pytest.fixture(scope="session")
def clips(bundle: Bundle) -> Examples:
    return procedural(bundle.encoders, CLIPS, seed=1, duration=DURATION)


@pytest.fixture(scope="session")
def report(bundle: Bundle, classifier: Classifier, clips: Examples) -> Report:
    return evaluate(bundle, clips, classifier=classifier, batch=2)
