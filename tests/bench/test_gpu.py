from __future__ import annotations

import json
import sys

import pytest
import torch

from bench import __main__, cases, gpu
from mfmjt.model import MFMJT


def bench(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", "gpu", *arguments])
    return __main__.main()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_everything_runs_tiny_and_goes_on(monkeypatch, tmp_path):
    arguments = ("--out", str(tmp_path), "--device", "cpu", "--smoke")
    assert bench(monkeypatch, *arguments) == 0
    checks = rows(tmp_path / "check.jsonl")
    ops = {case.op for case in cases.op_cases(cases.SMOKE[0])}
    assert {row["op"] for row in checks} == ops | {"network"}
    assert all(row["ok"] for row in checks)
    timings = rows(tmp_path / "time.jsonl")
    assert {row["what"] for row in timings} == ops | {"network"}
    assert not [row for row in timings if "error" in row]
    assert json.loads((tmp_path / "environment.json").read_text())["device"] == "cpu"
    assert MFMJT.load(tmp_path / "network.safetensors").config.hidden_dim == 16
    steps = [row["step"] for row in rows(tmp_path / "train.jsonl")]
    # Again: what is timed and trained already is not done again.
    assert bench(monkeypatch, *arguments) == 0
    assert rows(tmp_path / "time.jsonl") == timings
    assert max(row["step"] for row in rows(tmp_path / "train.jsonl")) == max(steps)


def test_a_wrong_result_is_found():
    truth = [torch.tensor([1.0, 2.0])]
    near = [torch.tensor([1.0, 2.0]) * (1 + torch.finfo(torch.float32).eps)]
    far = [torch.tensor([1.0, 2.001])]
    assert gpu._judge(truth, near, near, torch.float32, 1)["ok"]
    assert not gpu._judge(truth, far, near, torch.float32, 1)["ok"]
    assert not gpu._judge(truth, [torch.full((2,), torch.nan)], near, torch.float32, 1)["ok"]
    assert not gpu._judge(truth, None, near, torch.float32, 1)["ok"]


def test_cases_name_every_op():
    from mfmjt import kernels

    public = set(kernels.__all__) - {"reference"}
    assert {case.op for case in cases.op_cases(cases.SMOKE[0])} == public


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    assert bench(monkeypatch, "--out", str(tmp_path / "out")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No CUDA GPU" in line
    assert not (tmp_path / "out").exists()
