"""Each piece of the GPU's command, tiny and on the CPU: what it measures, and when it stops."""

from __future__ import annotations

import io
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.case import cases, operands
from bench.gpu import nano, piece
from bench.networks import generate, step
from bench.networks.generate import GenerationPlan
from bench.rows import KEY, STEP, read
from bench.run import truth_of
from mfmjt.testing import MODES, Truth

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a piece in this process, in the time that it is given."""
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    places = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--device", "cpu"]

    def run(name: str, seconds: float = 100.0, smoke: bool = True) -> dict[str, list[Any]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{seconds}\n"))
        small = ["--smoke"] if smoke else []
        assert piece.main([*name.split(), *places, "--ops", "swiglu", *small]) == 0
        return {path.stem: read(path) for path in (tmp_path / "out").glob("*.jsonl")}

    return run


def note(tmp_path: Path, name: str) -> dict[str, Any]:
    return json.loads((tmp_path / "work" / f"{name}.note").read_text())


def test_without_a_word_from_its_parent_a_piece_ends(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    given = ["--out", str(tmp_path), "--work", str(tmp_path), "--device", "cpu", "--ops", "swiglu"]
    assert piece.main(["check", "swiglu", *given]) == 0
    assert not list((tmp_path / "out").iterdir())


def test_an_op_and_the_network_are_checked_once(run):
    run("check swiglu")
    rows = run("check network")["check"]
    assert {row["op"] for row in rows} == {"swiglu", "network"}
    assert {row["dtype"] for row in rows} == {"float32", "float64", "bfloat16", "float16"}
    assert {row["kind"].split()[0] for row in rows} == {"value", "tangent", "gradient"}
    assert all(row["ok"] and row["error"] <= row["scale"] for row in rows)
    assert run("check swiglu")["check"] == rows


def test_odd_shapes_are_run_and_judged_by_the_exit_status(run, tmp_path):
    for op in ("adaln", "conv1d", "joint_attention", "snake"):
        assert "check" not in run(f"memcheck {op}")
        row = note(tmp_path, f"memcheck_{op}")["row"]
        assert (row["op"], row["kind"], row["ok"]) == (op, "memcheck", True)


def test_ours_is_timed_first_and_everything_once(run):
    run("environment")
    rows = run("kernels swiglu")["kernels"]
    assert {row["mode"] for row in rows} == set(MODES)
    assert {row["status"] for row in rows} == {"ok"}
    assert [row["provider"] for row in rows] == ["mfmjt", "eager"] * len(MODES)
    assert all(set(KEY) <= row.keys() and row["of_roofline"] > 0 for row in rows)
    assert run("kernels swiglu")["kernels"] == rows
    more = run("rest kernels")["kernels"]
    assert {row["dtype"] for row in more} == {"bfloat16", "float32"}


def test_a_step_is_timed_by_each_provider_against_flow_matching(run, tmp_path):
    rows = run("step")["train_step"]
    assert [(row["provider"], row["ratio"]) for row in rows] == [
        ("flow", 0.1),
        ("mfmjt", 0.1),
        ("mfmjt_rows", 0.1),
        ("flow_pytorch", 0.1),
        ("mfmjt", 1.0),
    ]
    assert all(row["status"] == "ok" and row["over_flow"] > 0 for row in rows)
    assert all(set(STEP[1]) <= row.keys() for row in rows)
    assert run("step")["train_step"] == rows


def test_one_step_generates_and_is_timed(run):
    rows = run("latency")["generate"]
    assert [row["provider"] for row in rows] == ["mfmjt", "eager", "mfmjt_eager"]
    assert all(row["status"] == "ok" and row["relative_error"] > 0 for row in rows)
    assert run("latency")["generate"] == rows


def test_nano_trains_on_clips_made_before(run, tmp_path):
    run("features")
    rows = run("train graph")["train"]
    *curve, last = rows
    assert [row["step"] for row in curve] == [1, 2, 3]
    assert all(row["interval"] > 0 for row in curve[1:])  # flow matching ended, MeanFlow began
    assert (last["run"], last["status"], last["steps"]) == ("graph", "ok", 3)
    assert run("train graph")["train"] == rows


def test_what_is_not_reached_is_said(run, tmp_path):
    run("environment")
    assert not run("kernels swiglu", seconds=8.0, smoke=False).get("kernels")
    assert note(tmp_path, "kernels_swiglu")["facts"]["not_reached"] >= 1
    assert not run("step", seconds=8.0, smoke=False).get("train_step")
    assert not run("latency", seconds=8.0, smoke=False).get("generate")
    assert note(tmp_path, "latency")["facts"]["first_not_reached"]["provider"] == "mfmjt"


def test_the_first_steps_are_those_with_a_bar():
    first, *others = step.plans("cuda")
    assert (first.network, first.batch, first.ratios) == ("small_16k", 256, (0.1,))
    assert first.providers[:2] == ("flow", "mfmjt")
    compiled = [name for plan in step.plans("cuda", "compiled") for name in plan.providers]
    rest = [name for p in (*others, *step.plans("cuda", "rest")) for name in p.providers]
    assert any(name.endswith("compiled") for name in compiled)
    assert not any(name.endswith("compiled") for name in rest)


def test_a_replay_may_differ_as_two_calls_do():
    assert "status" not in step.agreement(1.0, 1.0, 0.0, 1e-5)
    assert "status" not in step.agreement(1.0, 1.001, 1e-3, 3e-3)
    assert step.agreement(1.0, 1.0, 1e-3, 1e-2)["status"] == "wrong"
    assert "loss is 1.1" in step.agreement(1.0, 1.1, 0.0, 0.0)["reason"]
    assert step.agreement(1.0, float("nan"), 0.0, 0.0)["status"] == "wrong"


def test_no_time_is_spent_on_compiling_before_ours_and_eager_have_rows():
    first, *_ = generate.plans("cuda", "headline")
    assert first == GenerationPlan("small_16k", "latents", 1, ("mfmjt", "eager", "mfmjt_eager"))
    assert {p.providers for p in generate.plans("cuda", "compiled")} == {("compile",)}
    others = [name for p in generate.plans("cuda", "headline", "rest") for name in p.providers]
    assert "compile" not in others


def test_a_truth_that_does_not_fit_is_freed_before_the_next(monkeypatch):
    """A float32 truth is tried when nothing of the float64 one is alive any more."""
    (case,) = cases("swiglu", "tiny")
    given = operands(case, torch.float32, CPU)
    alive: list[Any] = []
    tried = []
    init = Truth.__init__

    def short_of_memory(self, *args, exact=torch.float64):
        tried.append(exact)
        if exact == torch.float64:
            large = torch.zeros(8)
            alive.append(weakref.ref(large))
            raise torch.OutOfMemoryError("of no use")
        assert alive[0]() is None
        init(self, *args, exact=exact)

    monkeypatch.setattr(Truth, "__init__", short_of_memory)
    truth_of(case, given)
    assert tried == [torch.float64, torch.float32]
    truth_of(case, given, large=1)
    assert tried[2:] == [torch.float32]


def test_clips_are_as_many_as_there_is_time_for():
    assert nano.clips(135.0, 6) == 1600
    assert nano.clips(0.0, 2) == 128
    assert nano.clips(1e6, 15) == nano.MOST


def test_a_vocoder_is_timed_in_the_dtype_that_is_asked_for():
    codec = generate._codec("small_16k", torch.bfloat16)
    parameters = [*codec.vae.decoder.parameters(), *codec.vocoder.parameters()]
    assert {p.dtype for p in parameters} == {torch.bfloat16}
