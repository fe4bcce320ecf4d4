from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mfmjt.codec import NanoCodec
from mfmjt.data import foley
from mfmjt.encoders import NanoEncoders
from mfmjt.errors import InputError
from mfmjt.evaluate.classifier import Classifier, ClassifierConfig
from mfmjt.evaluate.experiment import (
    Examples,
    Parts,
    Report,
    derangement,
    evaluate,
    examples,
    generate,
    read_reports,
    suite,
    table,
    write_report,
)
from mfmjt.model import MFMJT
from tests.support.bundles import CODEC

CLIPS = 3
DURATION = 1.5  # s: long enough for an event in each of the clips


@pytest.fixture(scope="module")
def parts() -> Parts:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MFMJT.from_config("nano", hidden_dim=32, num_heads=1, depth=2, fused_depth=1)
        # A fresh network gives exactly zero; this one shall answer to its conditions.
        for parameter in network.parameters():
            if parameter.requires_grad and not bool(parameter.detach().any()):
                torch.nn.init.normal_(parameter, std=0.2)
        codec = NanoCodec(CODEC)
        encoders = NanoEncoders()
    return Parts(network.eval(), codec.eval(), encoders.eval())


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ClassifierConfig(foley.CLASSES, bands=16, widths=(8, 8), embedding=4)
        return Classifier(config).eval()


@pytest.fixture(scope="module")
def clips(parts: Parts) -> Examples:
    return examples(parts.encoders, CLIPS, seed=1, duration=DURATION)


@pytest.fixture(scope="module")
def report(parts: Parts, classifier: Classifier, clips: Examples) -> Report:
    return evaluate(parts, classifier, clips=clips, seed=1, batch=2)


class Mean(torch.nn.Module):
    """Answers every noise with the same latent, as one step of perfect flow matching does."""

    def __init__(self, network: MFMJT) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.conditions, self.unnormalize = network.conditions, network.unnormalize

    def forward(self, z: torch.Tensor, r: object, t: object, cond: object) -> torch.Tensor:
        return z - 0.3


def test_a_network_that_answers_with_a_mean_has_no_diversity(
    parts: Parts, classifier: Classifier, clips: Examples, report: Report
) -> None:
    mean = dataclasses.replace(parts, network=Mean(parts.network))
    options = {"seed": 1, "guidance": 1.0, "text_only": False, "codec": False}
    same = evaluate(mean, classifier, clips=clips, **options)
    # z - (z - 0.3) leaves the rounding of z.
    assert same.diversity < 1e3 * torch.finfo(torch.float32).eps
    assert report.diversity > 1e3 * same.diversity


def test_the_first_clips_keep_their_features(clips: Examples) -> None:
    first = clips.first(2)
    assert first.indices == clips.indices[:2]
    assert torch.equal(first.sync, clips.sync[:2])
    assert len(clips.first(99)) == len(clips)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_derangement_moves_everyone(count: int) -> None:
    for seed in range(20):
        order = derangement(count, np.random.default_rng(seed))
        assert sorted(order) == list(range(count))
        assert (order != np.arange(count)).all()


def test_one_clip_cannot_be_exchanged() -> None:
    with pytest.raises(InputError, match="exchanged"):
        derangement(1, np.random.default_rng(0))


def test_examples_are_the_clips_of_the_test_split_from_the_seed_on(clips: Examples) -> None:
    assert clips.indices == [3, 4, 5]
    for row, index in enumerate(clips.indices):
        clip = foley.clip(index, "test", duration=DURATION, render=False)
        assert torch.equal(clips.audio[row], torch.from_numpy(clip.audio))
        assert np.array_equal(clips.events[row], clip.events)
        assert (clips.captions[row], clips.labels[row]) == (clip.caption, clip.label)
    assert len(clips) == CLIPS == len(clips.video) == len(clips.sync) == len(clips.text)


def test_noise_follows_seed_and_clip_whatever_the_batch(parts: Parts, clips: Examples) -> None:
    whole = generate(parts, clips, batch=3)
    single = generate(parts, clips, batch=1)
    assert whole.shape == clips.audio.shape
    error = torch.finfo(torch.float32).eps * whole.abs().max() * whole.shape[1]
    assert (whole - single).abs().max() <= error
    assert not torch.allclose(whole, generate(parts, clips, seed=1, batch=3))


def test_conditions_are_what_is_given(parts: Parts, clips: Examples) -> None:
    other = dataclasses.replace(clips, text=clips.text.flip(0))
    blind = dataclasses.replace(clips, video=clips.video.flip(0), sync=clips.sync.flip(0))

    def changed(examples: Examples, conditions: str) -> bool:
        options = {"conditions": conditions, "batch": 3}
        return not torch.equal(
            generate(parts, clips, **options), generate(parts, examples, **options)
        )

    assert changed(other, "both")
    assert changed(other, "text")
    assert not changed(other, "video")
    assert changed(blind, "both")
    assert changed(blind, "video")
    assert not changed(blind, "text")


def test_guidance_steps_and_the_instantaneous_velocity_change_the_sound(
    parts: Parts, clips: Examples
) -> None:
    plain = generate(parts, clips, guidance=1.0)
    assert not torch.equal(plain, generate(parts, clips, guidance=3.0))
    assert not torch.equal(plain, generate(parts, clips, guidance=1.0, steps=2))
    assert not torch.equal(plain, generate(parts, clips, guidance=1.0, instantaneous=True))


def test_a_report_holds_every_figure_and_is_json(report: Report) -> None:
    values = json.loads(report.to_json())
    assert set(values) == {f.name for f in dataclasses.fields(Report)}
    shares = [name for name in values if "f1" in name or "accuracy" in name or "kept" in name]
    assert len(shares) >= 10
    for name in (*shares, "onset_precision", "onset_recall"):
        assert 0 <= values[name] <= 1
    for name in ("frechet", "frechet_real", "frechet_codec", "text_frechet"):
        assert values[name] >= 0
    for name, (low, high) in values["interval"].items():
        assert low <= values[name] <= high
    assert values["clips"] == CLIPS
    assert values["impact_clips"] == CLIPS
    assert set(values["per_class"]) == {"ball_rubber", "drum", "footsteps"}
    stages = {"render", "encode", "generate", "decode", "judge", "codec"}
    assert set(values["seconds_per_clip"]) == stages
    assert {"date", "torch", "device", "threads"} <= set(values["environment"])


def test_the_real_audio_scores_as_the_detector_does(report: Report) -> None:
    assert report.onset_f1_real == 1
    assert report.onset_f1_real_shuffled < 1


def test_equal_arguments_give_equal_figures(
    parts: Parts, classifier: Classifier, clips: Examples, report: Report
) -> None:
    again = evaluate(parts, classifier, clips=clips, seed=1, batch=2)
    for name in ("onset_f1", "onset_f1_shuffled", "class_accuracy", "frechet", "interval"):
        assert getattr(again, name) == getattr(report, name)


def test_real_sound_in_place_of_the_network_reaches_the_bounds(
    parts: Parts, classifier: Classifier, clips: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mfmjt.evaluate.experiment.generate", lambda parts, clips, **options: clips.audio
    )
    best = evaluate(parts, classifier, clips=clips, seed=1, codec=False)
    assert best.onset_f1 == best.onset_f1_real == 1
    assert best.onset_f1_shuffled == best.onset_f1_real_shuffled
    assert best.class_accuracy == best.class_accuracy_real
    scale = float(classifier.judge(clips.audio)[1].double().square().sum())
    assert best.frechet <= scale * np.sqrt(np.finfo(np.float64).eps)
    assert best.codec_onset_f1_20ms is None


def test_a_network_that_makes_nan_is_refused(
    parts: Parts, classifier: Classifier, clips: Examples
) -> None:
    broken = MFMJT(parts.network.config)
    torch.nn.init.constant_(broken.final_layer.conv.bias, torch.nan)
    damaged = Parts(broken.eval(), parts.codec, parts.encoders)
    with pytest.raises(InputError, match="NaN"):
        evaluate(damaged, classifier, clips=clips)


def test_misuse_is_refused(parts: Parts, clips: Examples) -> None:
    with pytest.raises(InputError, match="at least 2 clips"):
        examples(parts.encoders, 1)
    with pytest.raises(InputError, match="Unknown conditions"):
        generate(parts, clips, conditions="smell")


def test_the_suite_writes_reports_and_a_table(
    parts: Parts, classifier: Classifier, tmp_path: Path
) -> None:
    seen = []
    reports = suite(
        parts, parts, tmp_path / "results", classifier, clips=2, steps=(1, 2),
        progress=lambda stage, done: seen.append((stage, done)),
    )  # fmt: skip
    assert [(r.model, r.steps, r.instantaneous) for r in reports] == [
        ("MeanFlow", 1, False),
        ("MeanFlow", 2, False),
        ("flow matching", 1, True),
        ("flow matching", 2, True),
    ]
    assert read_reports(tmp_path / "results") == reports
    written = (tmp_path / "results" / "table.md").read_text()
    assert written == table(reports)
    widths = {line.count("|") for line in written.splitlines()}
    assert len(widths) == 1
    assert ("generate", 1.0) in seen


def test_reports_survive_the_file(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "evaluate_meanflow_1.json")
    assert read_reports(tmp_path) == [report]
    with pytest.raises(InputError, match="No evaluate"):
        read_reports(tmp_path / "absent")


def test_the_command_prints_one_line_about_a_missing_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mfmjt.evaluate", str(tmp_path), "--model", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("Error: ")
    assert run.stderr.count("\n") == 1
