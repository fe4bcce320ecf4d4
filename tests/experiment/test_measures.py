from __future__ import annotations

import numpy as np
import pytest

from mfmjt.errors import InputError
from mfmjt.experiment.base import Row
from mfmjt.experiment.measures import MEASURES, cell, compared, describe, value

BY_KEY = {measure.key: measure for measure in MEASURES}


def rows(arm: str, shares: tuple[float, ...], frechet: tuple[float, ...]) -> list[Row]:
    """Rows of three seeds, with shares of 40 clips that are right."""
    found = []
    for seed, (share, distance) in enumerate(zip(shares, frechet, strict=True)):
        right = (np.arange(40) < 40 * share).astype(int).tolist()
        clips = {"right": right, "onsets": [[1, 2, 2]] * 40, "cosine": [share] * 40}
        row = {"arm": arm, "seed": seed, "class_accuracy": share, "frechet": distance}
        found.append(row | {"onset_f1": 0.5, "cosine": share, "clips": clips})
    return found


GOOD = rows("good", (0.9, 0.9, 0.85), (10.0, 11.0, 12.0))
BAD = rows("bad", (0.4, 0.45, 0.4), (20.0, 21.5, 22.0))


def test_a_value_is_the_mean_within_its_interval() -> None:
    found = value(GOOD, BY_KEY["class_accuracy"])
    assert found.mean == pytest.approx(2.65 / 3)
    assert 0.7 < found.low < found.mean < found.high <= 1
    assert value(GOOD, BY_KEY["onset_f1"]) == pytest.approx((0.5, 0.5, 0.5))
    # Mean 11, standard deviation 1, three seeds: 11 ± 4.303 / √3.
    assert value(GOOD, BY_KEY["frechet"]) == pytest.approx((11, 8.5157, 13.4843), abs=1e-4)


@pytest.mark.parametrize("key", ["class_accuracy", "frechet", "cosine"])
def test_claims_hold_do_not_or_are_undecided(key: str) -> None:
    of = BY_KEY[key]
    assert describe(of, compared(GOOD, BAD, of)) == "holds"
    assert describe(of, compared(BAD, GOOD, of)) == "does not hold"
    same = compared(GOOD, GOOD, of)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert describe(of, same) == "undecided"


def test_a_cell_has_one_row_of_each_of_three_seeds() -> None:
    assert cell([*BAD, *reversed(GOOD)], {"arm": "good"}) == GOOD
    with pytest.raises(InputError, match="2 seeds: an interval needs at least 3"):
        cell(GOOD[:2], {"arm": "good"})
    with pytest.raises(InputError, match="several rows of one seed"):
        cell([*GOOD, *GOOD], {"arm": "good"})
