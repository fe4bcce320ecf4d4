from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mfmjt.errors import InputError
from mfmjt.evaluate.classifier import Classifier
from mfmjt.evaluate.examples import Examples
from mfmjt.evaluate.metrics import METRICS, bootstrap, derangement, load_metric
from mfmjt.evaluate.report import Report, table
from mfmjt.evaluate.run import evaluate
from mfmjt.evaluate.sounds import Made, Sounds
from mfmjt.families import Bundle
from mfmjt.meanflow import Sampling
from mfmjt.model import MFMJT

SCORE = {metric.name: metric.score for metric in METRICS}


class Mean(torch.nn.Module):
    """Answers every noise with the same latent, as one step of perfect flow matching does."""

    def __init__(self, network: MFMJT) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.dtype = self.weight.dtype
        self.config = network.config
        self.conditions, self.unnormalize = network.conditions, network.unnormalize

    def forward(self, z: torch.Tensor, r: object, t: object, cond: object) -> torch.Tensor:
        return z - 0.3


@pytest.fixture(scope="module")
def real(classifier: Classifier, clips: Examples) -> Sounds:
    return Sounds(clips.audio, clips.sample_rate, classifier)


def test_a_network_that_answers_with_a_mean_has_no_diversity(
    bundle: Bundle, classifier: Classifier, clips: Examples, report: Report, real: Sounds
) -> None:
    mean = Bundle(Mean(bundle.network), bundle.codec, bundle.encoders, Sampling())
    same = Made(mean, clips, classifier, sampling=Sampling(guidance=1.0))
    diversity = SCORE["diversity"](same, real, clips).figures["diversity"]
    # z - (z - 0.3) leaves the rounding of z.
    assert diversity < 1e3 * torch.finfo(torch.float32).eps
    assert report.figures["diversity"] > 1e3 * diversity


def test_real_sound_in_place_of_the_network_reaches_the_bounds(
    bundle: Bundle,
    classifier: Classifier,
    clips: Examples,
    real: Sounds,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "mfmjt.evaluate.sounds.generate", lambda bundle, clips, **options: clips.audio
    )
    best = Made(bundle, clips, classifier, sampling=Sampling())
    onsets = SCORE["onsets"](best, real, clips).figures
    assert onsets["onset_f1"] == onsets["onset_f1_real"] == 1
    assert onsets["onset_f1_shuffled"] == onsets["onset_f1_real_shuffled"] < 1
    classes = SCORE["classes"](best, real, clips).figures
    assert classes["class_accuracy"] == classes["class_accuracy_real"]
    scale = float(np.square(real.embedding).sum())
    frechet = SCORE["frechet"](best, real, clips).figures["frechet"]
    assert frechet <= scale * np.sqrt(np.finfo(np.float64).eps)


def test_without_a_truth_only_distances_are_judged(
    bundle: Bundle, classifier: Classifier, clips: Examples
) -> None:
    unknown = dataclasses.replace(clips, labels=None, events=None, like=None)
    report = evaluate(bundle, unknown, classifier=classifier)
    judged = {key for key, value in report.figures.items() if value is not None}
    assert judged == {"frechet", "text_frechet"}
    assert report.per_class == {}
    dumb = {k: v for k, v in unknown.features.items() if k != "text"}
    report = evaluate(bundle, dataclasses.replace(unknown, features=dumb), classifier=classifier)
    assert [key for key, value in report.figures.items() if value is not None] == ["frechet"]


OWN = """
from mfmjt.evaluate.metrics import Figure, Metric, Score

def score(made, real, examples):
    ratio = made.waves.std(dim=1) / real.waves.std(dim=1)
    return Score({"loudness": float(ratio.mean()), "worst": float(ratio.min())})

loudness = Metric("loudness", (Figure("loudness", "loudness", 1, 1.0), Figure("worst")), score)
"""


def test_a_metric_of_ones_own_is_one_file(
    bundle: Bundle,
    classifier: Classifier,
    clips: Examples,
    report: Report,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "loud.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    metrics = (*METRICS, load_metric("loud:loudness"))
    more = evaluate(bundle, clips, classifier=classifier, metrics=metrics, batch=2)
    monkeypatch.delitem(sys.modules, "loud")
    own = {key: more.figures.pop(key) for key in ("loudness", "worst")}
    assert 0 < own["worst"] < own["loudness"]
    assert (more.figures, more.interval) == (report.figures, report.interval)
    more.figures |= own
    head, _, row, real, *_ = table([more], metrics).splitlines()
    assert head.split(" | ")[-2] == "loudness"
    assert row.split(" | ")[-2] == f"{own['loudness']:.1f}"
    assert real.endswith("| 1.0 | |")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loudness", "package.module:name"),
        ("no.such:metric", "cannot be imported"),
        ("mfmjt.evaluate.metrics:loudness", "no Metric"),
        ("mfmjt.evaluate.metrics:derangement", "no Metric"),
    ],
)
def test_what_is_no_metric_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_metric(name)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_derangement_moves_everyone(count: int) -> None:
    for seed in range(20):
        order = derangement(count, np.random.default_rng(seed))
        assert sorted(order) == list(range(count))
        assert (order != np.arange(count)).all()


def test_one_clip_cannot_be_exchanged() -> None:
    with pytest.raises(InputError, match="exchanged"):
        derangement(1, np.random.default_rng(0))


def test_an_interval_covers_95_percent_of_what_resampling_gives() -> None:
    # The mean of n fair coins has standard deviation 1 / (2 sqrt(n)).
    coins = np.arange(400) % 2 == 0
    low, high = bootstrap(coins, lambda rows: rows.mean(axis=1), np.random.default_rng(0))
    assert (0.5 - low) == pytest.approx(1.96 * 0.025, rel=0.2)
    assert (high - 0.5) == pytest.approx(1.96 * 0.025, rel=0.2)
