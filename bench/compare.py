"""Compare two folders of results and say what became slower, beyond noise.

What is compared is the time of our ops, and of generation, over that of eager PyTorch in the same
comparison, which took turns with them: a machine that was slower throughout is no regression.
Slower is a ratio that grew by more than five per cent and by more than the noise of the times in it
(half the distance of their 20th and 80th percentiles). A case that ran and no longer does is a
regression too.

Examples:
  python -m bench compare bench/results/zen4_2_cores /tmp/new
  python -m bench compare A B --provider compile      how the compiler fared
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from bench import parser
from bench.plots import name_of
from bench.providers import OURS, REFERENCE
from bench.report import generation, load, metric

__all__ = ["Change", "changes", "main"]

LEAST = 0.05

Row = dict[str, Any]


class Change(NamedTuple):
    """How a case fared.

    Attributes:
        what: The case.
        change: Relative change of the ratio to eager; positive is slower.
        noise: Up to which it is none.
        lost: Why there is no time any more, or empty.
    """

    what: str
    change: float
    noise: float
    lost: str = ""

    @property
    def worse(self) -> bool:
        """It is a regression."""
        return bool(self.lost) or self.change > max(LEAST, self.noise)

    @property
    def better(self) -> bool:
        """It is faster, likewise beyond noise."""
        return not self.lost and 1 / (1 + self.change) - 1 > max(LEAST, self.noise)


def main(argv: list[str] | None = None) -> int:
    """Run `python -m bench compare`; return 1 where something became slower."""
    command = parser("compare", __doc__)
    command.add_argument("a", type=Path, help="folder of the earlier results")
    command.add_argument("b", type=Path, help="folder of the later results")
    command.add_argument("--provider", default=OURS, help=f"whose times [{OURS}]")
    given = command.parse_args(argv)
    before, after = (load(folder) + generation(folder) for folder in (given.a, given.b))
    found = changes(before, after, given.provider)
    worse = [c for c in found if c.worse]
    for change in sorted(found, key=lambda c: -c.change):
        if change.lost:
            print(f"LOST    {change.what}: {change.lost}")
        elif change.worse or change.better:
            word = "SLOWER" if change.worse else "faster"
            percent = f"{100 * change.change:+.1f} % (noise {100 * change.noise:.1f} %)"
            print(f"{word}  {change.what}: {percent}")
    alike = sum(not (c.worse or c.better) for c in found)
    print(f"{len(found)} compared: {len(worse)} worse, {alike} alike.")
    return 1 if worse else 0


def changes(before: list[Row], after: list[Row], provider: str = OURS) -> list[Change]:
    """Compare every case that ran before and was tried again."""
    old, new = _by_case(before), _by_case(after)
    found = []
    for key in old.keys() & new.keys():
        a, b = old[key].get(provider), new[key].get(provider)
        if a is None or a["status"] != "ok" or b is None:
            continue
        what = " ".join(key)
        if b["status"] != "ok":
            found.append(Change(what, math.inf, 0.0, f"{b['status']}: {b['reason']}"))
            continue
        pairs = [(a, b)]
        references = old[key].get(REFERENCE), new[key].get(REFERENCE)
        if all(row is not None and row["status"] == "ok" for row in references):
            pairs.append(references)  # type: ignore[arg-type]
        ratios = [second[metric(second)] / first[metric(first)] for first, second in pairs]
        change = ratios[0] / (ratios[1] if len(ratios) == 2 else 1.0) - 1
        noise = math.sqrt(sum(_noise(row) ** 2 for pair in pairs for row in pair))
        found.append(Change(what, change, noise))
    return sorted(found, key=lambda c: c.what)


def _by_case(rows: list[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row["op"], row["case"], row["dtype"], row["mode"])
        cases.setdefault(key, {})[name_of(row)] = row
    return cases


def _noise(row: Row) -> float:
    """Half the distance of the 20th and the 80th percentile, relative to the median."""
    stem = metric(row).removesuffix("p50")
    return float((row[f"{stem}p80"] - row[f"{stem}p20"]) / 2 / row[f"{stem}p50"])
