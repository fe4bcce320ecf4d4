from __future__ import annotations

import math

import pytest
import torch

from mfmjt.errors import InputError
from mfmjt.meanflow import logit_normal, time_pairs, uniform

CPU = torch.device("cpu")
COUNT = 20_000


def test_logit_normal_has_its_moments():
    logits = logit_normal(-2.0, 2.0)(COUNT, CPU, torch.Generator().manual_seed(0)).logit()
    assert abs(float(logits.mean()) + 2) < 5 * 2 / math.sqrt(COUNT)
    assert abs(float(logits.std()) - 2) < 5 * 2 / math.sqrt(2 * COUNT)


def test_uniform_covers_the_interval():
    t = uniform()(COUNT, CPU, torch.Generator().manual_seed(0))
    assert abs(float(t.mean()) - 0.5) < 5 / math.sqrt(12 * COUNT)
    assert t.min() >= 0
    assert t.max() < 1


@pytest.mark.parametrize("intervals", [0, 1, 5, 8])
def test_pairs_are_ordered_and_the_first_ones_differ(intervals):
    r, t = time_pairs(8, intervals, uniform(), CPU, torch.Generator().manual_seed(0))
    assert r.shape == t.shape == (8,)
    assert (r[:intervals] < t[:intervals]).all()
    assert torch.equal(r[intervals:], t[intervals:])


def test_pairs_are_two_sorted_draws():
    r, t = time_pairs(COUNT, COUNT, uniform(), CPU, torch.Generator().manual_seed(0))
    # The smaller and the larger of two uniform draws have means 1/3 and 2/3, variance 1/18.
    assert abs(float(r.mean()) - 1 / 3) < 5 / math.sqrt(18 * COUNT)
    assert abs(float(t.mean()) - 2 / 3) < 5 / math.sqrt(18 * COUNT)


def test_a_negative_spread_is_refused():
    with pytest.raises(InputError, match="std is -1"):
        logit_normal(0.0, -1.0)
