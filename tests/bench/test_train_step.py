"""The bench of training steps: what it counts, whom it lets pass, and what it is held to."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.model import bench_train_step
from bench.model.bench_train_step import BARS, bars
from bench.model.steps import ON_CPU, PROVIDERS, Plan, Provider, Work, counted, judged

CPU = torch.device("cpu")
TINY = Plan("nano", 4, 16)


def test_counts_of_small_16k_are_within_their_bars():
    """A tangent in every tenth row, and in each, at the network's own lengths."""
    with FakeTensorMode():
        work = Work(Plan("small_16k", 10, 250), CPU, torch.float32)
        flops, saved = counted(work, 0.1, "flow")
        some, all_rows = (counted(work, ratio, "mfmjt") for ratio in (0.1, 1.0))
    assert 1 < some[0] / flops <= BARS["FLOPs at 0.1, over flow"][1] < all_rows[0] / flops
    assert some[1] / saved <= BARS["saved bytes at 0.1, over flow"][1]
    assert all_rows[1] / saved <= BARS["saved bytes at 1.0, over flow"][1]


def test_counts_without_memory_are_those_of_a_step():
    def count():
        work = Work(TINY, CPU, torch.float32, tiny=True)
        return {name: counted(work, 0.5, name) for name in ("flow", "mfmjt", "jvp", "jvp_no_grad")}

    with FakeTensorMode():
        flops = {name: found[0] for name, found in count().items()}
    found = count()
    assert {name: its[0] for name, its in found.items()} == flops
    assert flops["flow"] < flops["mfmjt"] < flops["jvp"] < flops["jvp_no_grad"]
    assert found["mfmjt"][1] < found["jvp_no_grad"][1] < found["jvp"][1]


def test_only_what_is_exact_passes():
    def without_rate(f, z, r, t, v, cond):
        return f(z, r, t, **cond), v

    def broken(f, z, r, t, v, cond):
        raise RuntimeError("no such step\nand more")

    torch.manual_seed(0)
    work = Work(TINY, CPU, torch.float32, tiny=True)
    asked = {name: p for name, p in PROVIDERS.items() if not p.compiled}
    asked |= {"rateless": Provider(without_rate), "broken": Provider(broken)}
    found = judged(work, asked)
    assert {name for name, verdict in found.items() if verdict.status == "wrong"} == {"rateless"}
    assert found["broken"] == ("unsupported", "RuntimeError: no such step", None)
    assert found["jvp"].error == 0 < found["mfmjt"].error < found["finite_difference"].error
    assert all(p.grad is None for p in work.case.net.parameters())


def row(what: str = "timed", **fields: object) -> dict[str, object]:
    about = {"what": what, "device": "cpu", "network": "small_16k", "batch": 10, "length": 250}
    about |= {"provider": "mfmjt", "status": "ok", "over_mfmjt": 1.0}
    return about | fields


def test_bars_take_the_worst_of_what_they_are_for():
    found = bars(
        [
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
    )
    assert {bar["bar"]: (bar["value"], bar["met"]) for bar in found} == {
        "FLOPs at 0.1, over flow": (1.03, True),
        "saved bytes at 0.1, over flow": (1.06, False),
        "saved bytes at 1.0, over flow": (None, None),
        "CPU wall at 0.1, over flow": (1.09, False),
        "CPU wall at 1.0, best exact PyTorch over mfmjt": (1.5, True),
        "GPU time at 0.1, over flow": (1.05, True),
        "GPU ms, small_16k at 0.1, batch 256": (101.0, True),
        "GPU of GEMM at 0.1, medium_44k": (None, None),
    }


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_train_step", *map(str, arguments)])
    return bench_train_step.main()


def test_everything_runs_tiny(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, "--out", tmp_path, "--smoke") == 0
    lines = (tmp_path / "train_step.jsonl").read_text().splitlines()
    environment, *rows = map(json.loads, lines)
    assert environment["what"] == "environment"
    assert environment["gemm_tflops"] > 0
    eager = {name for name in ON_CPU if not PROVIDERS[name].compiled}
    timed = [found for found in rows if found["what"] == "timed"]
    assert {(t["provider"], t["ratio"]) for t in timed} == {(p, r) for p in eager for r in (0.1, 1)}
    for found in timed:
        assert found["status"] == "ok"
        assert min(found[k] for k in ("ms_p50", "over_flow", "cpu_over_flow", "of_gemm")) > 0
        assert found["provider"] != "flow" or found["over_flow"] == found["cpu_over_flow"] == 1
    assert sum(found["what"] == "counted" for found in rows) == len(timed)
    assert [found["bar"] for found in rows if found["what"] == "bar"] == list(BARS)
    out = capsys.readouterr().out
    assert "ratio 0.1" in out
    assert "not measured" in out


def test_what_there_is_no_time_for_is_said(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, "--out", tmp_path, "--minutes", 0, "--network", "nano") == 0
    rows = [json.loads(line) for line in (tmp_path / "train_step.jsonl").read_text().splitlines()]
    timed = [found for found in rows if found["what"] == "timed"]
    assert {found["status"] for found in timed} == {"skipped"}
    assert "out of time" in capsys.readouterr().out


def test_an_unknown_network_is_an_error(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "--out", tmp_path, "--network", "huge")
    assert "huge: of nano, small_16k" in capsys.readouterr().err
