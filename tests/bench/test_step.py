"""The bench of training steps: what it counts, whom it lets pass, and what it is held to."""

from __future__ import annotations

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.networks import step
from bench.networks.step import (
    METHODS,
    ON_CPU,
    TARGETS,
    Method,
    Training,
)

CPU = torch.device("cpu")


def tiny() -> Training:
    return Training(("nano", 4, 16), CPU, torch.float32, tiny=True)


def test_counts_of_small_16k_are_within_their_bars():
    """A tangent in every tenth row, and in each, at the network's own lengths."""
    with FakeTensorMode():
        training = Training(("small_16k", 10, 250), CPU, torch.float32)
        flow = training.count(0.1, "flow")
        some, all_rows = (
            {name: value / flow[name] for name, value in training.count(ratio, "mfmjt").items()}
            for ratio in (0.1, 1.0)
        )
    assert 1 < some["flops"] <= TARGETS["FLOPs at 0.1, over flow"].limit < all_rows["flops"]
    assert some["saved_bytes"] <= TARGETS["saved bytes at 0.1, over flow"].limit
    assert all_rows["saved_bytes"] <= TARGETS["saved bytes at 1.0, over flow"].limit


def test_counts_without_memory_are_those_of_a_step():
    def count(column):
        training = tiny()
        names = ("flow", "mfmjt", "jvp", "jvp_no_grad")
        return {name: training.count(0.5, name)[column] for name in names}

    with FakeTensorMode():
        flops = count("flops")
    assert count("flops") == flops
    assert flops["flow"] < flops["mfmjt"] < flops["jvp"] < flops["jvp_no_grad"]
    saved = count("saved_bytes")
    assert saved["mfmjt"] < saved["jvp_no_grad"] < saved["jvp"]


def test_only_what_is_exact_passes():
    def without_rate(f, z, r, t, v, cond):
        return f(z, r, t, **cond), v

    def broken(f, z, r, t, v, cond):
        raise RuntimeError("no such step\nand more")

    torch.manual_seed(0)
    training = tiny()
    asked = {name: method for name, method in METHODS.items() if not method.compiled}
    asked |= {"rateless": Method(without_rate), "broken": Method(broken)}
    verdicts = {name: training.judge(method) for name, method in asked.items()}
    assert {name for name, row in verdicts.items() if row["status"] == "wrong"} == {"rateless"}
    reason = "RuntimeError: no such step"
    assert verdicts.pop("broken") == {"status": "unsupported", "reason": reason}
    errors = {name: row["gradient_error"] for name, row in verdicts.items()}
    assert errors["jvp"] == 0 < errors["mfmjt"] < errors["finite_difference"]
    assert all(p.grad is None for p in training.work.net.parameters())


def row(what: str = "timed", **fields: object) -> dict[str, object]:
    about = {"what": what, "device": "cpu", "network": "small_16k", "batch": 10, "length": 250}
    about |= {"provider": "mfmjt", "status": "ok", "over_mfmjt": 1.0}
    return about | fields


def test_targets_take_the_worst_of_what_they_are_for():
    rows = [
        row("counted", ratio=0.1, flops_over_flow=1.03, saved_over_flow=1.06),
        row("counted", ratio=0.1, flops_over_flow=9.0, saved_over_flow=9.0, length=63),
        row(ratio=0.1, over_flow=1.01),
        row(ratio=0.1, over_flow=1.09, batch=20),
        row(ratio=0.1, over_flow=9.0, network="nano"),
        row(ratio=1.0, over_mfmjt=1.5, provider="jvp"),
        row(ratio=1.0, over_mfmjt=1.2, provider="finite_difference"),
        row(ratio=1.0, over_mfmjt=1.1, provider="jvp_no_grad", status="wrong"),
        row(ratio=0.1, device="cuda", batch=256, over_flow=1.05, ms_p50=101.0),
    ]
    assert {name: target.held(rows) for name, target in TARGETS.items()} == {
        "FLOPs at 0.1, over flow": (1.03, True),
        "saved bytes at 0.1, over flow": (1.06, False),
        "saved bytes at 1.0, over flow": (None, None),
        "CPU wall at 0.1, over flow": (1.09, False),
        "CPU wall at 1.0, best exact PyTorch over mfmjt": (1.5, True),
        "GPU time at 0.1, over flow": (1.05, True),
        "GPU ms, small_16k at 0.1, batch 256": (101.0, True),
        "GPU of GEMM at 0.1, medium_44k": (None, None),
    }


def test_everything_runs_tiny(tmp_path, capsys):
    assert step.main(["--out", str(tmp_path), "--smoke"]) == 0
    lines = (tmp_path / "train_step.jsonl").read_text().splitlines()
    environment, *rows = map(json.loads, lines)
    assert environment["what"] == "environment"
    assert environment["gemm_tflops"] > 0
    eager = {name for name in ON_CPU if not METHODS[name].compiled}
    timed = [found for found in rows if found["what"] == "timed"]
    assert {(t["provider"], t["ratio"]) for t in timed} == {(p, r) for p in eager for r in (0.1, 1)}
    for found in timed:
        assert found["status"] == "ok"
        assert min(found[k] for k in ("ms_p50", "over_flow", "cpu_over_flow", "of_gemm")) > 0
        assert found["provider"] != "flow" or found["over_flow"] == found["cpu_over_flow"] == 1
    out = capsys.readouterr().out
    assert "ratio 0.1" in out
    assert all(f"not measured  {name}" in out for name in TARGETS)


def test_what_there_is_no_time_for_is_said(tmp_path, capsys):
    assert step.main(["--out", str(tmp_path), "--minutes", "0", "--network", "nano"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "train_step.jsonl").read_text().splitlines()]
    timed = [found for found in rows if found["what"] == "timed"]
    assert {found["status"] for found in timed} == {"skipped"}
    assert "out of time" in capsys.readouterr().out


def test_an_unknown_network_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        step.main(["--out", str(tmp_path), "--network", "huge"])
    assert "huge: of nano, small_16k" in capsys.readouterr().err
