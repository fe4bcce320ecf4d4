"""Quality against steps and real-time factor: the curve that the paper asks for."""

from __future__ import annotations

from pathlib import Path

from mfmjt.experiment.base import FLOW, Arm, Claim, Experiment, Row, ways_at
from mfmjt.experiment.plots import lines

__all__ = ["EXPERIMENT"]

STEPS = (1, 2, 4, 8, 25)


def _arms(quick: bool) -> tuple[Arm, ...]:
    steps = (1, 4, 25) if quick else STEPS
    return (
        Arm("MeanFlow", {}, ways_at(steps)),
        Arm("flow matching", FLOW, ways_at(steps, flow=True)),
    )


def _draw(rows: list[Row], probes: list[Row], folder: Path) -> dict[str, str]:
    lines(folder / "steps.svg", rows, "steps", "arm", "steps", log=True)
    return {"steps.svg": "Figures against steps; bands are 95 % intervals."}


def _at(arm: str, steps: int) -> Row:
    return {"arm": arm, "steps": steps}


EXPERIMENT = Experiment(
    title="Steps: quality against real-time factor",
    question="How much quality does one step cost, and what does each further step buy? The paper "
    "(arXiv 2509.06389) gives figures at 1 and at 25 steps; the curve between them is missing, and "
    "so is that of plain flow matching with the same network and budget.",
    method="One network is trained by MeanFlow and one by flow matching, on the same clips, for "
    "as many steps. Both make sound in equal steps from 1 to 0, by CFG-scaled with w = 1.5. The "
    "flow-matching network is evaluated at r = t, which is Euler's method.",
    limits="A step is the same work for both networks, so RTF is that of the sampler, not of the "
    "training. One guidance scale is used at all numbers of steps, although more steps take more "
    "guidance; the page on guidance has that. No encoder is timed.",
    arms=_arms,
    claims=(
        Claim(
            "MeanFlow at one step recognizes more classes than flow matching at one step",
            _at("MeanFlow", 1),
            _at("flow matching", 1),
            "class_accuracy",
        ),
        Claim(
            "MeanFlow at one step is nearer to real sound than flow matching at one step",
            _at("MeanFlow", 1),
            _at("flow matching", 1),
            "frechet",
        ),
        Claim(
            "MeanFlow at 25 steps is nearer to real sound than at one step",
            _at("MeanFlow", 25),
            _at("MeanFlow", 1),
            "frechet",
        ),
        Claim(
            "MeanFlow at 25 steps has better timing than at one step",
            _at("MeanFlow", 25),
            _at("MeanFlow", 1),
            "onset_f1",
        ),
        Claim(
            "Flow matching at 25 steps is nearer to real sound than MeanFlow at one step",
            _at("flow matching", 25),
            _at("MeanFlow", 1),
            "frechet",
        ),
        Claim(
            "One step of MeanFlow is faster than 25",
            _at("MeanFlow", 1),
            _at("MeanFlow", 25),
            "rtf",
        ),
    ),
    draw=_draw,
)
