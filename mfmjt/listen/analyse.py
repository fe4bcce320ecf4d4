"""What the answers of a listening test say, with intervals over clips."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mfmjt.errors import InputError, reason, some
from mfmjt.listen.build import FORMAT

__all__ = ["FEWEST", "Analysis", "analyse", "bradley_terry", "krippendorff"]

FEWEST = 6
"""Answers that each comparison needs: five that all agree have p = 2 / 2^5 > 0.05 by the sign test.
"""
RESAMPLES = 1000
Rows = list[tuple[str, str, dict[str, Any]]]
"""(listener, question, answer)."""


@dataclass
class Analysis:
    """The result.

    Attributes:
        kind: Of the test.
        raters: Listeners whose answers count.
        answers: Answers that count.
        clips: Clips with an answer.
        pairs: For each pair of systems: `first`, `second`, `answers`; `share`, that the first is
            preferred in, a tie counting half, with `low` and `high`; for abx `correct`, `low`,
            `high` and `p`, the probability of as many by guessing; for ratings `difference`.
        scores: For each system a score with `low` and `high`: the Bradley-Terry strength in nats
            less the mean of all, or the mean rating.
        agreement: Krippendorff's alpha over questions that two or more answered, 1 for full
            agreement and 0 for chance; None where there are none.
        notes: What was left out.
    """

    kind: str
    raters: int
    answers: int
    clips: int
    pairs: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    agreement: float | None = None
    notes: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Return it as Markdown."""
        lines = [f"{self.answers} answers of {self.raters} listeners on {self.clips} clips."]
        if self.scores:
            what = "strength, nats" if self.kind == "preference" else "mean rating"
            lines += ["", f"| system | {what} | 95 % interval |", "|---|---|---|"]
            for name, score in sorted(self.scores.items(), key=lambda item: -item[1]["score"]):
                lines.append(f"| {name} | {score['score']:.2f} | {_interval(score)} |")
        key, what = {
            "preference": ("share", "first preferred"),
            "rating": ("difference", "first less second"),
            "abx": ("correct", "told apart"),
        }[self.kind]
        more = [" p |", "---|"] if self.kind == "abx" else ["", ""]
        lines += ["", f"| first | second | answers | {what} | 95 % interval |{more[0]}"]
        lines += [f"|---|---|---|---|---|{more[1]}"]
        for pair in self.pairs:
            tail = f" {pair['p']:.2g} |" if self.kind == "abx" else ""
            lines.append(
                f"| {pair['first']} | {pair['second']} | {pair['answers']} | {pair[key]:.3f} | "
                f"{_interval(pair)} |{tail}"
            )
        told = "not known: no question has two answers"
        if self.agreement is not None:
            told = f"{self.agreement:.2f}"
        lines += ["", f"Agreement of listeners (Krippendorff's alpha): {told}.", *self.notes]
        return "\n".join(lines) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write every figure as JSON."""
        from mfmjt.files import atomic_path

        with atomic_path(Path(path)) as part:
            part.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", "utf-8")


def analyse(
    answers: Iterable[str | os.PathLike[str]], key: str | os.PathLike[str], *, seed: int = 0
) -> Analysis:
    """Read the answers of a listening test.

    Intervals are percentiles of a bootstrap over clips, since it is other clips that one wants to
    know about; those of abx are Wilson's, over answers.

    Args:
        answers: Files that listeners sent; two of one listener count once, the longer one.
        key: The key that was written beside the page.
        seed: Of the bootstrap.

    Raises:
        InputError: A file that is no answers, or those of another page; too few answers.
    """
    known = _read(Path(key), "key of a listening test", ("id", "kind", "systems", "trials"))
    kind, trials = known["kind"], known["trials"]
    by_rater, notes = _collect([Path(path) for path in answers], known)
    rows: Rows = []
    for rater, given in by_rater.items():
        rows += [(rater, each["trial"], each) for each in given]
    result = Analysis(
        kind,
        len(by_rater),
        len(rows),
        len({trials[q]["clip"] for _, q, _ in rows}),
        notes=notes,
    )
    if kind == "preference":
        _preference(result, rows, known, np.random.default_rng(seed))
    elif kind == "rating":
        _rating(result, rows, known, np.random.default_rng(seed))
    else:
        _abx(result, rows, known)
    return result


def _read(path: Path, what: str, fields: Sequence[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is no {what}: {reason(error)}. Give the JSON file as it was saved."
        ) from error
    if not isinstance(value, dict) or any(name not in value for name in fields):
        raise InputError(f"{path} is no {what}. Give the JSON file as it was saved.")
    if value.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {value.get('format')!r}, and this version reads {FORMAT}. "
            "Use the version that made the page."
        )
    return value


def _collect(
    paths: list[Path], known: dict[str, Any]
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Return the answers of each listener, and what was left out."""
    if not paths:
        raise InputError("There are no answers. Give the files that listeners sent.")
    found: dict[str, list[dict[str, Any]]] = {}
    notes = []
    sounds = _sounds_of(known)
    for path in paths:
        file = _read(path, "file of answers", ("test", "rater", "answers"))
        if file["test"] != known["id"]:
            raise InputError(
                f"{path} answers another page, {file['test']}; this key is of {known['id']}. "
                "Give the key beside that page, or leave the file out."
            )
        if not isinstance(file["answers"], list) or not all(
            _fits(answer, known, sounds) for answer in file["answers"]
        ):
            raise InputError(
                f"{path} holds an answer that no listener of this page can have given. "
                "Leave the file out."
            )
        rater = str(file["rater"])
        if rater in found:
            notes.append(f"{path.name} is by a listener of another file: the longer one counts.")
        if len(file["answers"]) > len(found.get(rater, ())):
            found[rater] = file["answers"]
    return found, notes


def _sounds_of(known: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return the system behind each number, for each question."""
    return {
        name: dict(zip(trial["sounds"], trial["systems"], strict=True))
        for name, trial in known["trials"].items()
    }


def _fits(answer: Any, known: dict[str, Any], sounds: dict[str, dict[str, str]]) -> bool:
    if not isinstance(answer, dict) or answer.get("trial") not in sounds:
        return False
    own = sounds[answer["trial"]]
    if known["kind"] == "rating":
        ratings = answer.get("ratings")
        return (
            isinstance(ratings, dict)
            and ratings.keys() == own.keys()
            and all(isinstance(v, (int, float)) and 0 <= v <= 100 for v in ratings.values())
        )
    if known["kind"] == "abx":
        return answer.get("choice") in own and answer.get("x") in own
    return answer.get("choice") in (*own, "tie")


def _preference(
    result: Analysis, rows: Rows, known: dict[str, Any], rng: np.random.Generator
) -> None:
    systems, trials, sounds = known["systems"], known["trials"], _sounds_of(known)
    number = {name: i for i, name in enumerate(systems)}
    # Wins of each over each, for every clip: a bootstrap over clips sums some of these.
    wins: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((len(systems), len(systems))))
    said: dict[str, list[str]] = defaultdict(list)
    for _, question, answer in rows:
        trial = trials[question]
        i, j = (number[name] for name in trial["systems"])
        said[question].append(answer["choice"])
        if answer["choice"] == "tie":
            wins[trial["clip"]][i, j] += 0.5
            wins[trial["clip"]][j, i] += 0.5
        else:
            winner = number[sounds[question][answer["choice"]]]
            wins[trial["clip"]][winner, j if winner == i else i] += 1
    each = np.stack(list(wins.values())) if wins else np.zeros((1, len(systems), len(systems)))
    total = each.sum(0)
    _enough(
        {
            (a, b): total[number[a], number[b]] + total[number[b], number[a]]
            for a, b in itertools.combinations(systems, 2)
        }
    )
    drawn = _resampled(each, rng)
    for a, b in itertools.combinations(systems, 2):
        i, j = number[a], number[b]
        shares = drawn[:, i, j] / np.maximum(drawn[:, i, j] + drawn[:, j, i], 1e-9)
        count = total[i, j] + total[j, i]
        low, high = np.quantile(shares, (0.025, 0.975))
        result.pairs.append(
            {"first": a, "second": b, "answers": round(float(count))}
            | {"share": float(total[i, j] / count), "low": float(low), "high": float(high)}
        )
    strengths = np.stack([bradley_terry(sums) for sums in drawn])
    result.scores = _scores(systems, bradley_terry(total), strengths)
    result.agreement = krippendorff(list(said.values()), lambda x, y: float(x != y))


def _rating(result: Analysis, rows: Rows, known: dict[str, Any], rng: np.random.Generator) -> None:
    systems, trials, sounds = known["systems"], known["trials"], _sounds_of(known)
    given: dict[str, list[dict[str, float]]] = defaultdict(list)
    said: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _, question, answer in rows:
        system = sounds[question]
        ratings = {system[number]: float(value) for number, value in answer["ratings"].items()}
        given[trials[question]["clip"]].append(ratings)
        for name, value in ratings.items():
            said[question, name].append(value)
    _enough({tuple(systems): float(len(rows))})
    # The mean over a clip's listeners, for each system.
    each = np.stack(
        [[np.mean([r[name] for r in ratings]) for name in systems] for ratings in given.values()]
    )
    drawn = _resampled(each, rng) / len(each)
    result.scores = _scores(systems, each.mean(0), drawn)
    for (i, a), (j, b) in itertools.combinations(enumerate(systems), 2):
        low, high = np.quantile(drawn[:, i] - drawn[:, j], (0.025, 0.975))
        difference = float((each[:, i] - each[:, j]).mean())
        result.pairs.append(
            {"first": a, "second": b, "answers": len(rows), "difference": difference}
            | {"low": float(low), "high": float(high)}
        )
    result.agreement = krippendorff(list(said.values()), lambda x, y: (x - y) ** 2)


def _abx(result: Analysis, rows: Rows, known: dict[str, Any]) -> None:
    systems, trials = known["systems"], known["trials"]
    right: dict[tuple[str, ...], list[bool]] = {
        pair: [] for pair in itertools.combinations(systems, 2)
    }
    said: dict[str, list[bool]] = defaultdict(list)
    for _, question, answer in rows:
        correct = answer["choice"] == answer["x"]
        pair = tuple(sorted(trials[question]["systems"], key=systems.index))
        right[pair].append(correct)
        said[question].append(correct)
    _enough({pair: float(len(given)) for pair, given in right.items()})
    for (a, b), given in right.items():
        low, high = _wilson(sum(given), len(given))
        result.pairs.append(
            {"first": a, "second": b, "answers": len(given), "correct": sum(given) / len(given)}
            | {"low": low, "high": high, "p": _by_guessing(sum(given), len(given))}
        )
    result.agreement = krippendorff(list(said.values()), lambda x, y: float(x != y))


def _scores(
    systems: list[str], values: np.ndarray, drawn: np.ndarray
) -> dict[str, dict[str, float]]:
    """Return the value of each system, with the interval of its resampled ones (RESAMPLES, n)."""
    lows, highs = np.quantile(drawn, (0.025, 0.975), axis=0)
    return {
        name: {"score": float(score), "low": float(low), "high": float(high)}
        for name, score, low, high in zip(systems, values, lows, highs, strict=True)
    }


def _enough(counts: dict[tuple[str, ...], float]) -> None:
    few = {names: count for names, count in counts.items() if count < FEWEST}
    if few:
        told = some((f"{' and '.join(names)}: {count:.0f}" for names, count in few.items()), most=3)
        raise InputError(
            f"Too few answers ({told}): below {FEWEST} even full agreement is no evidence. "
            "Collect more."
        )


def _resampled(each: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return sums over resampled rows (RESAMPLES, ...)."""
    rows = rng.integers(0, len(each), (RESAMPLES, len(each)))
    return np.stack([each[chosen].sum(0) for chosen in rows])


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Return the strengths of a Bradley-Terry model, in nats, less their mean.

    P(i beats j) = 1 / (1 + exp(s_j - s_i)) (Bradley & Terry, 1952), by the iteration of Hunter
    (2004, "MM algorithms for generalized Bradley-Terry models"). Half a win of each over each is
    added, so that one who never lost has a finite strength.

    Args:
        wins: How often i beat j (n, n), a tie counting half for both.
    """
    count = len(wins)
    wins = wins + 0.5 * (1 - np.eye(count))
    games, total = wins + wins.T, wins.sum(1)
    power = np.ones(count)
    for _ in range(10_000):
        shared = games / (power[:, None] + power[None, :])
        new = total / shared.sum(1)
        new /= math.exp(np.log(new).mean())
        if np.abs(np.log(new / power)).max() < 1e-10:
            break
        power = new
    strengths: np.ndarray = np.log(new)
    return strengths


def krippendorff(units: list[list[Any]], distance: Callable[[Any, Any], float]) -> float | None:
    """Return Krippendorff's alpha (2011, "Computing Krippendorff's alpha-reliability").

    1 - D_observed / D_expected, where D is the mean distance of two answers to one question and of
    any two answers.

    Args:
        units: Answers to each question; those with one are left out.
        distance: Of two answers: 1 where they differ for names, the squared difference for numbers.

    Returns:
        Alpha; None if no question has two answers, or all answers are the same.
    """
    shared = [unit for unit in units if len(unit) > 1]
    values = [value for unit in shared for value in unit]
    if not shared:
        return None
    observed = sum(
        sum(distance(x, y) for x, y in itertools.permutations(unit, 2)) / (len(unit) - 1)
        for unit in shared
    )
    expected = sum(distance(x, y) for x, y in itertools.permutations(values, 2))
    if expected == 0:
        return None
    return 1 - (len(values) - 1) * observed / expected


def _by_guessing(right: int, count: int) -> float:
    """Return the probability of at least so many right answers by guessing."""
    return sum(math.comb(count, k) for k in range(right, count + 1)) / 2**count


def _wilson(right: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval (1927) of a share."""
    z = 1.959964
    middle = (right + z * z / 2) / (count + z * z)
    spread = z / (count + z * z) * math.sqrt(right * (count - right) / count + z * z / 4)
    return middle - spread, middle + spread


def _interval(values: dict[str, Any]) -> str:
    return f"{values['low']:.3f} to {values['high']:.3f}"
