"""Metrics of the sound at validations."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mfmjt.errors import InputError
from mfmjt.evaluate.examples import stored
from mfmjt.evaluate.metrics import METRICS, choose_metrics
from mfmjt.evaluate.run import evaluate
from mfmjt.families import Bundle
from mfmjt.features.procedural import write_store
from mfmjt.features.store import FeatureStore
from mfmjt.meanflow import Sampling
from mfmjt.model import MFMJT
from mfmjt.model.lora import LoRA
from mfmjt.train.parallel import Processes
from mfmjt.train.recipe import NetworkTraining, load_config
from mfmjt.train.tasks.network import NetworkTask, train_network
from tests.support.peers import load_peft
from tests.train.conftest import TINY
from tests.train.states import load_state, records, undo

NAMES = ("onsets", "classes", "frechet")
CLIPS = 5  # of which at least two are impacts


@pytest.fixture(scope="module")
def heard(ends, tmp_path_factory) -> Path:
    """A store with enough validation clips to shuffle."""
    clips = {"train": 2, "validation": CLIPS + 1}
    return write_store(tmp_path_factory.mktemp("heard"), clips, ends.codec, ends.encoders, 0)


@pytest.fixture
def listening(recipe, heard):
    """listening(**changes) is a training that measures sound after every second step."""

    def make(**changes) -> NetworkTraining:
        settings = {
            "store": str(heard),
            "steps": 4,
            "lr": 1e-2,
            "ema": (0.5,),
            "validate_every": 2,
            "metrics": NAMES,
            "metric_clips": CLIPS,
        }
        return recipe(**settings | changes)

    return make


def measured(
    config: NetworkTraining, ends, net: MFMJT, sampling: Sampling | None = None
) -> dict[str, float]:
    """What `mfmjt.evaluate` says of a network on the same clips."""
    bundle = Bundle(net, ends.codec, ends.encoders).to("cpu")
    store = FeatureStore(config.store, "validation")
    store.latent_mean, store.latent_std = net.latent_mean.flatten(), net.latent_std.flatten()
    store.encode_text(ends.encoders)
    examples = stored(store, bundle, config.metric_clips, 0, "validation")
    chosen = choose_metrics(config.metrics, METRICS)
    report = evaluate(bundle, examples, sampling, metrics=chosen)
    return {key: value for key, value in report.figures.items() if value is not None}


def network(out: str, prefix: str) -> MFMJT:
    """A network of a state's weights: `net.`, or the averages `ema0.` where there are such."""
    tensors, _ = load_state(out)
    net = MFMJT.from_config("nano", **TINY)
    kept = {k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")}
    kept |= {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    net.load_state_dict(kept)
    return net


def test_the_log_has_what_evaluate_says_of_the_averaged_weights(listening, ends, tmp_path, capsys):
    config = listening()
    train_network(config)
    validations = records(config.out, "validation")
    assert [record["step"] for record in validations] == [2, 4]
    last = validations[-1]
    truth = measured(config, ends, network(config.out, "ema0."))
    assert {"onset_f1", "class_accuracy", "frechet"} <= truth.keys()
    assert {key: last[key] for key in truth} == truth
    assert last["frechet"] != validations[0]["frechet"]
    assert last["frechet"] != measured(config, ends, network(config.out, "net."))["frechet"]
    told = capsys.readouterr().err
    assert f"frechet {last['frechet']:.4g}" in told

    # Killed after step 2 and started again, it says the same.
    undo(config.out, 2)
    train_network(config)
    assert records(config.out, "validation") == validations

    # And the losses are those of a training that measures nothing.
    without = replace(config, out=str(tmp_path / "without"), metrics=())
    train_network(without)
    ours, theirs = records(config.out), records(without.out)
    assert [{key: r[key] for key in s} for r, s in zip(ours, theirs, strict=True)] == theirs


def test_a_network_of_flow_matching_is_heard_in_25_steps(listening, ends):
    config = listening(ratio=0.0, steps=2, metrics=("frechet",))
    train_network(config)
    truth = measured(config, ends, network(config.out, "ema0."), Sampling(25, instantaneous=True))
    (record,) = records(config.out, "validation")
    assert record["frechet"] == truth["frechet"]


def test_adapters_are_heard_merged(listening, ends, tmp_path):
    load_peft()
    MFMJT.from_config("nano", **TINY).save(tmp_path / "start.safetensors")
    config = listening(
        init_from=str(tmp_path / "start.safetensors"), model="auto", overrides={},
        lora=LoRA(rank=2), metrics=("frechet",),
    )  # fmt: skip
    with Processes() as processes:
        task = NetworkTask(config, processes)
        plain = task._plain()
        assert task.listening is not None
        assert task.listening.measure(plain)["frechet"] == measured(config, ends, plain)["frechet"]
    assert not any("lora" in name for name, _ in plain.named_parameters())


def test_shards_are_put_together_for_the_first_process(listening, ends, ranks):
    config = listening(steps=2, batch=8, full_every=0, parallel="fsdp", metrics=("frechet",))
    ranks.train(2, config)
    (record,) = records(config.out, "validation")
    truth = measured(config, ends, network(config.out, "ema0."))
    assert record["frechet"] == truth["frechet"]


def test_sound_that_is_not_finite_is_no_number(listening):
    with Processes() as processes:
        task = NetworkTask(listening(), processes)
    net = task._plain()
    with torch.no_grad():
        net.final_layer.conv.weight.fill_(math.nan)
    found = task.listening.measure(net)
    assert {"onset_f1", "class_accuracy", "frechet"} <= found.keys()
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metrics": ("loudness",)}, "There is no metric 'loudness'. Choose of onsets"),
        ({"metrics": ("no.such:metric",)}, "cannot be imported"),
        ({"codec": None}, "codec=null"),
        ({"validate_every": 0}, "validate_every=0"),
        ({"metrics": ("fd_vggish",)}, "metrics=fd_vggish: .* is missing .*metric_weights="),
        ({"metric_weights": "nowhere"}, "There is no folder nowhere"),
        ({"metrics": ("diversity",)}, "metrics=diversity: .* does not hold what it needs"),
        ({"metric_clips": 1}, "at least 2 clips"),
        ({"encoders": None}, "have no features, and encoders=null"),
    ],
)
def test_what_cannot_be_measured_is_said_before_the_first_step(listening, changes, says):
    with pytest.raises(InputError, match=says):
        train_network(listening(**changes))


def test_names_are_given_with_commas():
    config = load_config(NetworkTraining, "nano", "network", ["metrics=onsets, classes"])
    assert config.metrics == ("onsets", "classes")
    assert load_config(NetworkTraining, "nano", "network", ["metrics="]).metrics == ()
    config = load_config(NetworkTraining, "nano", "network", ["metrics=fd,kad_panns"])
    names = [metric.name for metric in config.chosen_metrics()]
    assert names == ["fd_vggish", "fd_panns", "fd_passt", "fd_yamnet", "kad_panns"]
