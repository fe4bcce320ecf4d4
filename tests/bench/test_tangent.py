"""What a tangent costs the whole network, by what can be counted, and how exact it is."""

from __future__ import annotations

import pytest
import torch

from bench.networks import tangent
from bench.networks.given import Workload
from bench.networks.tangent import TARGETS


@pytest.fixture(scope="module")
def counted():
    """Return rows of small_16k at its own lengths, by (what, provider)."""
    return {(row["what"], row["provider"]): row for row in tangent.counted("small_16k")}


def test_flops_of_a_dual_forward(counted):
    """Twice a forward's, where PyTorch's formulas do a third product for every weight."""
    ours, reference = counted["flops", "ours"], counted["flops", "reference"]
    assert ours["forward"] == reference["forward"]
    assert ours["ratio"] <= TARGETS["flops"].limit
    assert round(reference["ratio"], 2) == 2.87


def test_memory_of_a_step_with_tangents_in_every_row(counted):
    """That of plain training, where PyTorch keeps the tangents and what made them."""
    ours, reference = counted["saved", "ours"], counted["saved", "reference"]
    assert ours["ratio"] <= TARGETS["saved"].limit
    assert reference["ratio"] >= 3
    assert ours["plain"] < reference["plain"]


def test_rate_in_bfloat16():
    """As exact as PyTorch's, which sums in float32, and in its direction."""
    case = Workload.make("nano", batch=2, depth=4, fused_depth=2, length=77)
    rows = list(tangent.judged(case))
    assert {row["dtype"] for row in rows} == {"bfloat16 autocast", "bfloat16 weights"}
    for row in rows:
        assert 0 < row["error"] < torch.inf
        assert row["provider"] == "reference" or row["ratio"] <= TARGETS["du_dt"].limit
        assert row["cosine"] >= TARGETS["cosine"].limit


def test_times_have_both_ratios():
    case = Workload.make("nano", batch=1, depth=2, fused_depth=1, length=17)
    rows = {row["provider"]: row for row in tangent.timed(case, seconds=0)}
    assert rows.keys() == {"ours", "reference"}
    for row in rows.values():
        assert row["forward"]["n"] == row["dual"]["n"] > 0
        assert row["ratio"] > 0
        assert row["cpu_ratio"] > 0
