"""`python -m bench gpu` and `cpu`, on tiny cases."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bench import __main__, cases, cpu
from bench.harness import KEY
from mfmjt.model import MFMJT


def bench(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    return __main__.main()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_everything_runs_tiny_and_goes_on(monkeypatch, tmp_path):
    arguments = ("gpu", "--out", tmp_path, "--device", "cpu", "--smoke", "--ops", "swiglu")
    assert bench(monkeypatch, *arguments) == 0
    checks = rows(tmp_path / "check.jsonl")
    assert {row["op"] for row in checks} == {"swiglu", "network"}
    assert {row["dtype"] for row in checks} == {"float32", "float64", "bfloat16", "float16"}
    assert {row["kind"].split()[0] for row in checks} == {"value", "tangent", "gradient"}
    assert all(row["ok"] for row in checks)
    timings = rows(tmp_path / "kernels.jsonl")
    assert {row["op"] for row in timings} == {"swiglu"}
    assert {row["mode"] for row in timings} == set(cases.MODES)
    assert {row["status"] for row in timings} == {"ok"}
    assert all(set(KEY) <= row.keys() for row in timings)
    steps = [row for row in rows(tmp_path / "train_step.jsonl") if row["what"] == "timed"]
    assert {(row["status"], row["ratio"]) for row in steps if row["provider"] == "mfmjt"} == {
        ("ok", 0.1),
        ("ok", 1.0),
    }
    made = rows(tmp_path / "generate.jsonl")
    assert {row["status"] for row in made} == {"ok"}
    stamp = json.loads((tmp_path / "environment.json").read_text())
    assert stamp["device"] == "cpu"
    assert stamp["ceilings"]["copy_gbps"] > 0
    assert MFMJT.load(tmp_path / "network.safetensors").config.hidden_dim == 16
    trained = [row["step"] for row in rows(tmp_path / "train.jsonl")]
    # Again: what is timed and trained already is not done again.
    assert bench(monkeypatch, *arguments) == 0
    assert rows(tmp_path / "kernels.jsonl") == timings
    assert rows(tmp_path / "generate.jsonl") == made
    assert [row for row in rows(tmp_path / "train_step.jsonl") if row["what"] == "timed"] == steps
    assert max(row["step"] for row in rows(tmp_path / "train.jsonl")) == max(trained)


def test_a_cpu_is_measured_under_both_allocators(monkeypatch, tmp_path, capsys):
    command = ("cpu", "--out", tmp_path, "--tiny", "--seconds", 0, "--threads", 1)
    assert bench(monkeypatch, *command, "--ops", "swiglu") == 0
    found = rows(tmp_path / "kernels.jsonl")
    pairs = {(row["provider"], row["malloc"]) for row in found}
    assert pairs == {(p, m) for p in cpu.IN_RAISED for m in ("default", "raised")}
    assert {row["dtype"] for row in found} == set(cpu.DTYPES)
    assert all(row["threads"] == 1 and row["status"] == "ok" for row in found)
    out = capsys.readouterr().out
    assert "[8/8, " in out
    assert "ms of CPU; eager x" in out
    assert bench(monkeypatch, *command, "--ops", "swiglu") == 0
    assert rows(tmp_path / "kernels.jsonl") == found


def test_an_unknown_op_is_an_error(monkeypatch, tmp_path, capsys):
    assert bench(monkeypatch, "cpu", "--out", tmp_path, "--ops", "relu") == 2
    assert "no benchmark of relu" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    assert bench(monkeypatch, "gpu", "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No CUDA GPU" in line
    assert not (tmp_path / "out").exists()
