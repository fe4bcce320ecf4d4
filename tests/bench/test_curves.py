"""The comparison of learning curves: it runs, and tells another curve from the same."""

from __future__ import annotations

import json
import sys

import pytest

from bench.model import bench_curves
from bench.model.bench_curves import PROVIDERS, SEEDS, judged


def rows(shift: float, step: int = 10) -> list[dict[str, object]]:
    """References of 1.0, 1.1 and 1.2, and ours beside them; the last step of ours is moved."""
    return [
        {"provider": provider, "seed": seed, "step": at, "flow": value, "interval": 2 * value}
        for provider in PROVIDERS
        for seed in SEEDS
        for at in (step, 2 * step)
        for value in [1 + 0.1 * seed + (shift if provider == "mfmjt" and at > step else 0)]
    ]


def test_a_curve_farther_away_than_seeds_are_apart_is_another():
    same, near, far = judged(rows(0.0)), judged(rows(0.1)), judged(rows(0.3))
    assert [bar["value"] for bar in same] == [0, 0]
    assert all(bar["met"] for bar in same + near)
    assert [bar["value"] for bar in near] == pytest.approx([0.5, 0.5])
    assert not any(bar["met"] for bar in far)


def test_equal_seeds_allow_nothing():
    alike = [row | {"flow": 1.0, "interval": 1.0} for row in rows(0.0)]
    assert all(bar["met"] for bar in judged(alike))
    alike[0] |= {"flow": 1.5}
    assert [bar["met"] for bar in judged(alike)] == [False, True]


@pytest.mark.slow
def test_kernels_learn_what_the_references_learn(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["bench_curves", "--out", str(tmp_path), "--smoke"])
    assert bench_curves.main() == 0
    lines = (tmp_path / "curves.jsonl").read_text().splitlines()
    stamp, *found = map(json.loads, lines)
    assert stamp["what"] == "environment"
    curves = {(row["provider"], row["seed"]) for row in found if row["what"] == "curve"}
    assert curves == {(provider, seed) for provider in PROVIDERS for seed in SEEDS}
    assert [row["met"] for row in found if row["what"] == "bar"] == [True, True]
    # Both do learn, and not the very same bits, or nothing was compared.
    values = {p: [r["flow"] for r in found if r.get("provider") == p] for p in PROVIDERS}
    assert values["mfmjt"] != values["reference"]
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")
