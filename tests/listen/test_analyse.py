"""Answers become shares, strengths and agreement; what no listener can have said is refused."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mfmjt.errors import InputError
from mfmjt.listen import analyse
from mfmjt.listen.analyse import FEWEST, bradley_terry, krippendorff


def key(folder: Path, kind: str, systems: tuple[str, ...], clips: int) -> tuple[Path, Any]:
    """Write a key as `build` does, numbers in a known order: clip c of system i is s<c>_<i>."""
    trials = {}
    numbers = range(len(systems))
    sets = [tuple(numbers)] if kind == "rating" else list(itertools.combinations(numbers, 2))
    for clip in range(clips):
        for own in sets:
            trials[f"q{len(trials)}"] = {
                "clip": f"clip{clip}",
                "systems": [systems[i] for i in own],
                "sounds": [f"s{clip}_{i}" for i in own],
            }
    whole = {"format": 1, "id": "abc", "kind": kind, "systems": list(systems), "trials": trials}
    path = folder / "page.key.json"
    path.write_text(json.dumps(whole))
    return path, trials


def answered(folder: Path, rater: str, answers: Any, **change: Any) -> Path:
    file = {"format": 1, "test": "abc", "rater": rater, "answers": answers} | change
    path = folder / f"{rater}.json"
    path.write_text(json.dumps(file))
    return path


def test_preference(tmp_path: Path) -> None:
    path, trials = key(tmp_path, "preference", ("good", "bad"), 10)
    # Eight clips for the first, one for the second, one without a difference.
    choices = [t["sounds"][0] for t in trials.values()]
    choices[3], choices[7] = trials["q3"]["sounds"][1], "tie"
    said = [{"trial": q, "choice": c} for q, c in zip(trials, choices, strict=True)]
    files = [answered(tmp_path, rater, said) for rater in ("one", "two")]
    result = analyse(files, path)
    (pair,) = result.pairs
    assert (pair["answers"], pair["share"]) == (20, 0.85)
    assert pair["low"] < 0.85 < pair["high"] <= 1
    # Two systems: the strengths are half the log odds, with half a win added for each.
    odds = math.log((17 + 0.5) / (3 + 0.5))
    assert result.scores["good"]["score"] == pytest.approx(odds / 2, abs=1e-9)
    assert result.scores["bad"]["score"] == pytest.approx(-odds / 2, abs=1e-9)
    assert result.agreement == 1
    assert "good" in result.table()


def test_rating(tmp_path: Path) -> None:
    path, trials = key(tmp_path, "rating", ("real", "ours", "theirs"), 8)
    files = []
    for rater, shift in (("one", 0), ("two", 6)):
        said = [
            {"trial": q, "ratings": dict(zip(t["sounds"], (90, 60 + shift, 30), strict=True))}
            for q, t in trials.items()
        ]
        files.append(answered(tmp_path, rater, said))
    result = analyse(files, path)
    means = {name: score["score"] for name, score in result.scores.items()}
    assert means == {"real": 90, "ours": 63, "theirs": 30}
    assert [pair["difference"] for pair in result.pairs] == [27, 60, 33]
    assert result.agreement is not None
    assert 0.9 < result.agreement < 1


def test_abx(tmp_path: Path) -> None:
    path, trials = key(tmp_path, "abx", ("a", "b"), 10)
    said = [
        {"trial": q, "x": t["sounds"][i % 2], "choice": t["sounds"][i % 2 if i else 1]}
        for i, (q, t) in enumerate(trials.items())
    ]
    (pair,) = analyse([answered(tmp_path, "one", said)], path).pairs
    assert pair["correct"] == 0.9
    assert pair["p"] == (10 + 1) / 2**10  # nine or ten right
    assert pair["low"] == pytest.approx(0.5958, abs=5e-5)  # Wilson's, for 9 of 10
    assert pair["high"] == pytest.approx(0.9821, abs=5e-5)


def test_bradley_terry_is_the_most_likely() -> None:
    rng = np.random.default_rng(0)
    wins = rng.integers(1, 9, (4, 4)).astype(float)
    np.fill_diagonal(wins, 0)
    found = bradley_terry(wins)
    regular = wins + 0.5 * (1 - np.eye(4))
    chance = 1 / (1 + np.exp(found[None, :] - found[:, None]))
    # At the maximum every system wins as often as the model expects.
    expected = ((regular + regular.T) * chance * (1 - np.eye(4))).sum(1)
    np.testing.assert_allclose(regular.sum(1), expected, rtol=1e-8)
    assert abs(found.sum()) < 1e-9


def test_krippendorff() -> None:
    def differ(x: object, y: object) -> float:
        return float(x != y)

    # By the definition: four values, two of them 1; of twelve ordered pairs eight differ.
    assert krippendorff([[1, 1], [2, 2], [3]], differ) == 1
    assert krippendorff([[1, 2], [2, 1]], differ) == pytest.approx(1 - 3 * 4 / 8)
    assert krippendorff([[1], [2]], differ) is None
    assert krippendorff([[1, 1]], differ) is None


def test_two_files_of_one_listener_count_once(tmp_path: Path) -> None:
    path, trials = key(tmp_path, "preference", ("a", "b"), 8)
    said = [{"trial": q, "choice": "tie"} for q in trials]
    whole = answered(tmp_path, "one", said)
    copy = tmp_path / "copy.json"
    copy.write_text(whole.read_text())
    result = analyse([whole, copy], path)
    assert result.answers == 8
    assert "longer one counts" in result.notes[0]


def test_too_few(tmp_path: Path) -> None:
    path, trials = key(tmp_path, "preference", ("a", "b"), FEWEST - 1)
    said = [{"trial": q, "choice": t["sounds"][0]} for q, t in trials.items()]
    with pytest.raises(InputError, match="Too few answers"):
        analyse([answered(tmp_path, "one", said)], path)
    with pytest.raises(InputError, match="no answers"):
        analyse([], path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": "xyz"}, "answers another page"),
        ({"format": 2}, "has format 2"),
        ({"answers": [{"trial": "q99", "choice": "tie"}]}, "no listener of this page"),
        ({"answers": [{"trial": "q0", "choice": "s9_9"}]}, "no listener of this page"),
        ({"answers": "all"}, "no listener of this page"),
    ],
)
def test_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path, _ = key(tmp_path, "preference", ("a", "b"), 8)
    with pytest.raises(InputError, match=message):
        analyse([answered(tmp_path, "one", change.pop("answers", []), **change)], path)


def test_not_json(tmp_path: Path) -> None:
    path, _ = key(tmp_path, "preference", ("a", "b"), 8)
    bad = tmp_path / "bad.json"
    bad.write_text("no")
    with pytest.raises(InputError, match="is no file of answers"):
        analyse([bad], path)
    with pytest.raises(InputError, match="is no key"):
        analyse([bad], bad)
