"""The share of rows with r < t: the paper's second ablation."""

from __future__ import annotations

from pathlib import Path

from mfmjt.experiment.base import FLOW, Arm, Claim, Experiment, Row, ways_at
from mfmjt.experiment.plots import lines

__all__ = ["EXPERIMENT"]

PERCENT = (0, 10, 30, 60, 100)


def _arm(percent: int) -> Arm:
    settings = FLOW if percent == 0 else {"ratio": percent / 100, "flow_steps": 0}
    return Arm(f"{percent} %", settings, ways_at((1,), flow=percent == 0), {"percent": percent})


def _draw(rows: list[Row], probes: list[Row], folder: Path) -> dict[str, str]:
    lines(folder / "ratio.svg", rows, "percent", "steps", "rows with r < t, %")
    return {"ratio.svg": "Figures at one step against the share of rows with r < t."}


EXPERIMENT = Experiment(
    title="Ratio: how many rows have r < t",
    question="The paper (arXiv 2509.06389) trains with r < t in 10 % of the rows and reports that "
    "10, 30 and 60 % are worse in this order, in alignment (IB) and timing (DeSync) at one step. "
    "MeanFlow's own paper (arXiv 2505.13447) takes 25 % for images. Does it hold here?",
    method="One network is trained for each share, 0, 10, 30, 60 and 100 %, from the first step "
    "on, and makes sound in one step by CFG-scaled with w = 1.5. With 0 % it is plain flow "
    "matching, evaluated at r = t. Cosine stands for alignment, onset F1 for timing.",
    limits="The budget is one number of steps, not one of core-minutes: rows with r < t cost more. "
    "The best share may depend on how long is trained, and on the amount of data, which the "
    "experiment `scale` varies.",
    arms=lambda quick: tuple(map(_arm, PERCENT)),
    claims=tuple(
        Claim(f"{less} % is better than {more} %", {"arm": f"{less} %"}, {"arm": f"{more} %"}, key)
        for key in ("cosine", "onset_f1", "frechet")
        for less, more in ((10, 30), (30, 60), (10, 60), (10, 100), (10, 0))
    ),
    draw=_draw,
)
