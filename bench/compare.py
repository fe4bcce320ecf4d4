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

from pathlib import Path
from typing import Any

from pandas import DataFrame

from bench import parser
from bench.providers import OURS, REFERENCE
from bench.report import CASE, frame, generation, load

__all__ = ["changes", "main"]

LEAST = 0.05

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Run `python -m bench compare`; return 1 where something became slower."""
    command = parser("compare", __doc__)
    command.add_argument("a", type=Path, help="folder of the earlier results")
    command.add_argument("b", type=Path, help="folder of the later results")
    command.add_argument("--provider", default=OURS, help=f"whose times [{OURS}]")
    given = command.parse_args(argv)
    before, after = (load(folder) + generation(folder) for folder in (given.a, given.b))
    found = changes(before, after, given.provider)
    for change in found.itertuples():
        if change.lost:
            print(f"LOST    {change.what}: {change.lost}")
        elif change.worse or change.better:
            word = "SLOWER" if change.worse else "faster"
            percent = f"{100 * change.change:+.1f} % (noise {100 * change.noise:.1f} %)"
            print(f"{word}  {change.what}: {percent}")
    worse, alike = found["worse"].sum(), (~(found["worse"] | found["better"])).sum()
    print(f"{len(found)} compared: {worse} worse, {alike} alike.")
    return int(worse > 0)


def changes(before: list[Row], after: list[Row], provider: str = OURS) -> DataFrame:
    """Compare every case that ran before and was tried again, the worst first.

    Returns:
        A row for each case: `what`, its name; `change`, the relative change of the ratio to eager,
        where positive is slower; `noise`, up to which it is none; `lost`, why there is no time any
        more, or empty; `worse` and `better`, whether it changed beyond noise.
    """

    def of(rows: list[Row], name: str, suffix: str, ran: bool = True) -> DataFrame:
        table = frame(rows)
        table = table[(table["name"] == name) & ((table["status"] == "ok") | (not ran))]
        table = table.set_index(CASE)[["status", "reason", "time", "noise"]]
        return table.add_suffix(suffix)

    new = of(after, provider, "_new", ran=False)
    eager = of(before, REFERENCE, "_eager").join(of(after, REFERENCE, "_new_eager"), how="inner")
    pairs = of(before, provider, "").join(new, how="inner").join(eager)
    lost = pairs["status_new"] != "ok"
    ratio = pairs["time_new"] / pairs["time"]
    ratio /= (pairs["time_new_eager"] / pairs["time_eager"]).fillna(1.0)
    noises = pairs[[column for column in pairs if column.startswith("noise")]]
    change = (ratio - 1).where(~lost, float("inf"))
    noise = (noises**2).sum(axis=1) ** 0.5
    least = noise.clip(lower=LEAST)
    found = DataFrame(
        {
            "what": [" ".join(key) for key in pairs.index],
            "change": change.to_numpy(),
            "noise": noise.to_numpy(),
            "lost": [
                f"{status}: {reason}" if status != "ok" else ""
                for status, reason in zip(pairs["status_new"], pairs["reason_new"], strict=True)
            ],
            "worse": (lost | (change > least)).to_numpy(),
            "better": (~lost & (1 / ratio - 1 > least)).to_numpy(),
        }
    )
    return found.sort_values(["change", "what"], ascending=[False, True])
