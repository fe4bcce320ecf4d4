from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mfmjt import meanflow
from mfmjt.errors import InputError, RunError
from mfmjt.model import MFMJT
from mfmjt.train import trainer
from mfmjt.train.optim import schedule
from mfmjt.train.tasks.network import NETWORK, train_network
from tests.train.states import curve, load_state, records, same_state


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_learning_rate_rises_and_falls(kind):
    steps, warmup = 100, 10
    factors = [schedule(s, s / steps, warmup, kind) for s in range(steps)]
    assert factors[0] <= 1 / warmup
    assert factors[: warmup - 1] == sorted(factors[: warmup - 1])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert max(factors) <= 1
    end = schedule(steps, 1.0, warmup, kind)
    assert end == (1 if kind == "constant" else 0)


def test_killed_training_resumes_bit_for_bit(recipe, tmp_path):
    steps = 24  # enough that it is killed before its end
    whole = recipe(out=str(tmp_path / "whole"), steps=steps)
    assert train_network(whole).finished
    part = recipe(out=str(tmp_path / "part"), steps=steps)
    settings = tmp_path / "recipe.json"
    settings.write_text(json.dumps({"network": asdict(part)}))
    process = subprocess.Popen(
        [sys.executable, "-m", "mfmjt.train", "network", str(settings)],
        stderr=subprocess.PIPE,
    )
    state = Path(part.out) / trainer.CHECKPOINTS / "latest"
    while not state.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert state.exists(), errors.decode()
    step = load_state(part.out)[1]["step"]
    assert step < steps, "it ended before it could be killed"
    result = train_network(part)
    assert (result.step, result.finished) == (steps, True)
    assert curve(part.out) == curve(whole.out)
    assert same_state(part.out, whole.out)
    networks = [load_file(Path(c.out) / NETWORK) for c in (part, whole)]
    assert all(torch.equal(networks[0][k], networks[1][k]) for k in networks[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(recipe, number):
    config = recipe(steps=10_000, checkpoint_every=10_000)
    log = Path(config.out) / "log.jsonl"

    def send():
        while not log.exists() or '"kind": "train"' not in log.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    before = signal.getsignal(number)
    result = train_network(config)
    thread.join()
    assert signal.getsignal(number) is before
    assert not result.finished
    assert result.file.exists()
    assert result.step >= 1
    assert load_state(config.out)[1]["step"] == result.step
    assert [step for step, *_ in curve(config.out)] == list(range(1, result.step + 1))


def spoil(monkeypatch, steps):
    """Make the loss of some steps not finite, through the real objective."""
    real, calls = meanflow.loss_and_errors, []

    def loss(net, x, *args, **kwargs):
        calls.append(None)
        return real(net, x * (math.nan if len(calls) - 1 in steps else 1), *args, **kwargs)

    monkeypatch.setattr(meanflow, "loss_and_errors", loss)


def test_steps_that_are_not_finite_are_skipped(recipe, monkeypatch, tmp_path):
    spoil(monkeypatch, {0})
    config = recipe(out=str(tmp_path / "a"), steps=2, ema=(0.0,))
    result = train_network(config)
    assert (result.step, result.skipped) == (2, 1)
    tensors, state = load_state(config.out)
    # One optimizer step was made, and nothing of the other is left anywhere.
    assert state["updates"] == 1
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert [r["skipped"] for r in records(config.out, "train")] == [1, 1]


def test_a_run_that_stays_not_finite_is_given_up(recipe, monkeypatch):
    monkeypatch.setattr(trainer, "PATIENCE", 3)
    spoil(monkeypatch, set(range(100)))
    with pytest.raises(RunError, match="has not been finite for 3 steps"):
        train_network(recipe())


def test_training_learns_and_writes_everything(recipe, store):
    config = recipe(
        steps=30, lr=3e-3, batch=8, validate_every=10, preview_every=30, preview_clips=1,
        log_every=5, schedule="linear", ema=(0.5, 0.9), tensorboard=True, flow_steps=15,
    )  # fmt: skip
    result = train_network(config)
    out = Path(config.out)
    validation = records(config.out, "validation")
    assert [r["step"] for r in validation] == [10, 20, 30]
    # A fresh network says zero, so its error is that of v = e - x, about 2 a number.
    assert validation[-1]["flow"] < validation[0]["flow"] < 2
    training = records(config.out, "train")
    assert "interval" not in training[0]
    assert training[-1]["interval"] > 0
    names = {path.name for path in (out / "previews").iterdir()}
    assert {"clip0_step0000030.wav", "clip0_real.wav", "step0000030.png"} <= names
    assert list((out / "tensorboard").iterdir())
    net = MFMJT.load(result.file)
    tensors, _ = load_state(config.out)
    name = "final_layer.conv.weight"
    assert torch.equal(net.state_dict()[name], tensors[f"ema0.{name}"].half().float())
    index = json.loads((store / "train" / "index.json").read_text())
    half = torch.finfo(torch.float16).eps
    torch.testing.assert_close(
        net.latent_std.flatten(), torch.tensor(index["latent_std"]), rtol=half, atol=half
    )


def test_finished_training_only_exports(recipe):
    config = recipe(steps=1)
    first = train_network(config)
    first.file.unlink()
    again = train_network(config)
    assert (again.step, again.finished) == (1, True)
    assert again.file.exists()


def test_it_starts_from_a_network(recipe, tmp_path):
    first = train_network(recipe(out=str(tmp_path / "flow"), steps=2, ratio=0.0))
    config = recipe(out=str(tmp_path / "mean"), steps=1, lr=0.0, init_from=str(first.file))
    train_network(config)
    tensors, _ = load_state(config.out)
    start = MFMJT.load(first.file).state_dict()
    assert torch.equal(tensors["net.sync_pos_emb"], start["sync_pos_emb"])
    with pytest.raises(InputError, match="another network"):
        train_network(recipe(out=str(tmp_path / "x"), init_from=str(first.file), overrides={}))


def test_a_time_limit_ends_the_run(recipe):
    result = train_network(recipe(steps=10**9, max_minutes=1e-6))
    assert result.finished
    assert result.step < 10**9


def test_slices_make_the_same_run(recipe, tmp_path):
    whole, part = (recipe(out=str(tmp_path / name), steps=3) for name in ("whole", "part"))
    train_network(whole)
    first = train_network(part, stop_after=0.0)
    assert (first.step, first.finished) == (0, False)
    assert train_network(part).finished
    assert same_state(part.out, whole.out)


def test_wrong_runs_say_what_to_do(recipe):
    config = recipe(steps=1)
    train_network(config)
    with pytest.raises(InputError, match="was trained with overrides"):
        train_network(recipe(overrides={}))
    with pytest.raises(InputError, match="Cannot read features"):
        train_network(recipe(store="nowhere"))
    with pytest.raises(InputError, match="Try device=cpu"):
        train_network(recipe(device="cuda:63"))
