from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from bench.networks import generate
from bench.networks.generate import TARGETS, GenerationPlan, once, time_plan
from bench.rows import GENERATE, Rows
from mfmjt.model import MFMJT

CPU = torch.device("cpu")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_runs_tiny_and_does_nothing_twice(tmp_path, capsys):
    command = ["--out", str(tmp_path), "--smoke"]
    assert generate.main(command) == 0
    found = rows(tmp_path / "generate.jsonl")
    assert {row["provider"] for row in found} == {"mfmjt", "eager", "mfmjt_eager", "eager_25"}
    assert {row["status"] for row in found} == {"ok"}
    assert all(row["relative_error"] > 0 for row in found if "mfmjt" in row["provider"])
    assert generate.main(command) == 0
    assert rows(tmp_path / "generate.jsonl") == found


def test_what_is_wrong_is_not_timed(monkeypatch, tmp_path):
    def off(self: MFMJT, r: float, t: float) -> object:
        class Frozen:
            def step(self, z: torch.Tensor, **_: object) -> torch.Tensor:
                return z

        return Frozen()

    monkeypatch.setattr(MFMJT, "frozen", off)
    found = Rows(tmp_path / "generate.jsonl", GENERATE[1])
    plan = GenerationPlan("nano", "latents", 1, ("mfmjt", "eager"))
    time_plan(found, plan, CPU, tiny=True, seconds=0.0)
    by_name = {row["provider"]: row for row in found.rows}
    assert by_name["mfmjt"]["status"] == "wrong"
    assert "relative error" in by_name["mfmjt"]["reason"]
    assert by_name["eager"]["status"] == "ok"


def test_what_raises_anything_is_a_row_and_the_others_are_timed(monkeypatch, tmp_path):
    """A compiler's errors are no RuntimeErrors."""

    def broken(*_: object, **__: object) -> object:
        raise TypeError("no code for this\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    found = Rows(tmp_path / "generate.jsonl", GENERATE[1])
    time_plan(
        found,
        GenerationPlan("nano", "latents", 1, ("compile", "mfmjt")),
        CPU,
        tiny=True,
        seconds=0.0,
    )
    by_name = {row["provider"]: row for row in found.rows}
    assert by_name["compile"]["status"] == "unsupported"
    assert by_name["compile"]["reason"] == "TypeError: no code for this"
    assert by_name["mfmjt"]["status"] == "ok"


def test_what_needs_media_is_refused_without_and_takes_nothing_down(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = Rows(tmp_path / "generate.jsonl", GENERATE[1])
    once(found, CPU, 1, ["end_to_end", "cold_start"])
    assert [row["status"] for row in found.rows] == ["unsupported"] * 2
    assert all("PyAV is not installed" in row["reason"] for row in found.rows)


def missed(rows: list[dict[str, object]]) -> dict[str, float | None]:
    held = {target.name: target.held(rows) for target in TARGETS}
    return {name: value for name, (value, met) in held.items() if met is False}


def test_targets_are_held_against_the_best_that_was_measured():
    step = {"what": "latents", "network": "small_16k", "batch": 1, "status": "ok"}
    slow = {**step, "device": "cpu", "provider": "mfmjt", "ms_p50": 500.0, "clips_per_s": 2.0}
    assert missed([slow]) == {"CPU, small_16k, latents, ms": 500.0}
    assert missed([slow, slow | {"ms_p50": 399.0}]) == {}
    assert missed([slow | {"provider": "eager"}]) == {}
    gpu = slow | {"device": "cuda", "ms_p50": 0.5}
    eager = gpu | {"provider": "eager", "ms_p50": 4.0, "over_mfmjt": 8.0}
    assert missed([gpu, eager]) == {"GPU, small_16k, latents, eager over mfmjt": 8.0}
    many = gpu | {"batch": 32, "clips_per_s": 2500.0}
    assert missed([gpu, many]) == {"GPU, small_16k, latents, clips a second": 2500.0}


def test_eager_is_put_over_ours(tmp_path):
    rows = Rows(tmp_path / "generate.jsonl", GENERATE[1])
    plan = GenerationPlan("nano", "latents", 1, ("mfmjt", "eager"))
    time_plan(rows, plan, CPU, tiny=True, seconds=0.0)
    ours, eager = rows.rows
    assert eager["over_mfmjt"] == pytest.approx(eager["ms_p50"] / ours["ms_p50"], rel=1e-3)
