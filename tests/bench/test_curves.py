"""The comparison of learning curves: it runs, and tells another curve from the same."""

from __future__ import annotations

import json

import pytest

from bench.networks import curves
from bench.networks.curves import PROVIDERS, SEEDS, TARGETS, distances


def rows(shift: float, step: int = 10) -> list[dict[str, object]]:
    """Return references of 1.0, 1.1 and 1.2, and ours beside them, whose last step is moved."""
    return [
        {"provider": provider, "seed": seed, "step": at, "flow": value, "interval": 2 * value}
        for provider in PROVIDERS
        for seed in SEEDS
        for at in (step, 2 * step)
        for value in [1 + 0.1 * seed + (shift if provider == "mfmjt" and at > step else 0)]
    ]


def held(shift: float) -> tuple[list[float], list[bool]]:
    compared = distances(rows(shift))
    values, met = zip(*(target.held(compared) for target in TARGETS), strict=True)
    return list(values), list(met)


def test_a_curve_farther_away_than_seeds_are_apart_is_another():
    assert held(0.0) == ([0, 0], [True, True])
    assert held(0.1) == (pytest.approx([0.5, 0.5]), [True, True])
    assert held(0.3)[1] == [False, False]


def test_equal_seeds_allow_nothing():
    alike = [row | {"flow": 1.0, "interval": 1.0} for row in rows(0.0)]
    assert [row["over_spread"] for row in distances(alike)] == [0, 0]
    alike[0] |= {"flow": 1.5}
    assert [row["over_spread"] for row in distances(alike)] == [float("inf"), 0]


@pytest.mark.slow
def test_kernels_learn_what_the_references_learn(tmp_path):
    assert curves.main(["--out", str(tmp_path), "--smoke"]) == 0
    lines = (tmp_path / "curves.jsonl").read_text().splitlines()
    stamp, *found = map(json.loads, lines)
    assert stamp["what"] == "environment"
    trained = {(row["provider"], row["seed"]) for row in found if row["what"] == "curve"}
    assert trained == {(provider, seed) for provider in PROVIDERS for seed in SEEDS}
    assert [row["over_spread"] <= 1 for row in found if row["what"] == "distance"] == [True, True]
    # Both do learn, and not the very same bits, or nothing was compared.
    values = {p: [r["flow"] for r in found if r.get("provider") == p] for p in PROVIDERS}
    assert values["mfmjt"] != values["reference"]
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")
