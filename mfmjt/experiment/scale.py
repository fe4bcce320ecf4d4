"""The paper's first open question: the best share of rows with r < t, by the amount of data."""

from __future__ import annotations

from pathlib import Path

from mfmjt.experiment.base import Arm, Claim, Experiment, Row, ways_at
from mfmjt.experiment.plots import lines

__all__ = ["EXPERIMENT"]

PERCENT = (10, 30, 60)
PARTS = (16, 4, 1)


def _name(part: int, percent: int) -> str:
    return f"1/{part} of the clips, {percent} %" if part > 1 else f"all clips, {percent} %"


def _arms(quick: bool) -> tuple[Arm, ...]:
    return tuple(
        Arm(
            _name(part, percent),
            {"ratio": percent / 100, "flow_steps": 0},
            ways_at((1,)),
            {"percent": percent, "part": part},
            {"clips": 1 / part} if part > 1 else {},
        )
        for part in PARTS
        for percent in PERCENT
    )


def _draw(rows: list[Row], probes: list[Row], folder: Path) -> dict[str, str]:
    told = [{**row, "data": f"1/{row['part']}"} for row in rows]
    lines(folder / "scale.svg", told, "percent", "data", "rows with r < t, %")
    return {"scale.svg": "Figures at one step against the share of rows with r < t, by data."}


EXPERIMENT = Experiment(
    title="Scale: the best ratio by the amount of data",
    question="The paper (arXiv 2509.06389) finds 10 % of rows with r < t best on some thousand "
    "hours, and asks how the best share depends on the amount of data.",
    method="One network is trained for each share, 10, 30 and 60 %, on all clips, on a quarter and "
    "on a sixteenth of them, always for as many steps. All make sound in one step by CFG-scaled "
    "with w = 1.5. Latents are normalized as those of all clips.",
    limits="The other half of the question, the latent's frame rate, is not varied: each rate "
    "needs a codec of its own. Few clips are seen more often, so that the amount of data and "
    "overfitting are one thing here.",
    arms=_arms,
    claims=tuple(
        Claim(
            f"With {'all clips' if part == 1 else f'1/{part} of the clips'}, 10 % is better than "
            "60 %",
            {"arm": _name(part, 10)},
            {"arm": _name(part, 60)},
            key,
        )
        for key in ("cosine", "onset_f1", "frechet")
        for part in PARTS
    ),
    draw=_draw,
)
