"""The paper's second open question: CFG-scaled for one-step networks of other kinds."""

from __future__ import annotations

from pathlib import Path

from mfmjt.experiment.base import FLOW, Arm, Claim, Experiment, Row, Way
from mfmjt.experiment.plots import lines
from mfmjt.meanflow import Sampling

__all__ = ["EXPERIMENT"]

SCALES = (1.0, 1.5, 2.0, 3.0, 4.5)
CONSISTENCY = {
    "target": "alpha_flow",
    "alpha": 0.1,
    "ratio": 1.0,
    "to_data": 1.0,
    "one_step": 0.0,
}
"""alpha-Flow's target with r = 0: z - t u(z, 0, t) is to be the same at t and at (1 - alpha) t."""
KINDS = ("MeanFlow", "alpha-Flow", "consistency", "flow matching", "rectified")


def _arms(quick: bool) -> tuple[Arm, ...]:
    scales = (1.0, 2.0, 4.5) if quick else SCALES

    def ways(flow: bool) -> tuple[Way, ...]:
        return tuple(
            Way(Sampling(1, w, mode, instantaneous=flow))
            for mode in ("cfg_scaled", "cfg")
            for w in scales
        )

    flow = Arm("flow matching", FLOW, ways(flow=True))
    rectified = {
        **FLOW,
        "init_from": f"@{flow.name}",
        "teacher": f"@{flow.name}",
        "reflow": 8,
    }
    return (
        Arm("MeanFlow", {}, ways(flow=False)),
        Arm("alpha-Flow", {"target": "alpha_flow", "alpha": 0.1}, ways(flow=False)),
        Arm("consistency", CONSISTENCY, ways(flow=False)),
        flow,
        Arm("rectified", rectified, ways(flow=True)),
    )


def _draw(rows: list[Row], probes: list[Row], folder: Path) -> dict[str, str]:
    drawn = {}
    for mode, title in (("cfg", "CFG"), ("cfg_scaled", "CFG-scaled")):
        name = f"elsewhere_{mode}.svg"
        lines(folder / name, rows, "guidance", "arm", "w", {"mode": mode})
        drawn[name] = f"Figures at one step against w, {title}."
    return drawn


def _at(arm: str, mode: str, w: float) -> Row:
    return {"arm": arm, "mode": mode, "guidance": w}


EXPERIMENT = Experiment(
    title="Elsewhere: CFG-scaled for other one-step networks",
    question="The paper (arXiv 2509.06389) scales the unconditional velocity of a MeanFlow "
    "network, and leaves open whether the same helps other kinds of one-step networks.",
    method="The same network is trained as MeanFlow, as alpha-Flow (alpha = 0.1), as a "
    "consistency model (alpha-Flow's target with r = 0 in every row), by flow matching, and as a "
    "rectified flow, which begins as the flow-matching network and is trained for as many steps "
    "again on pairs of noise and what that network makes of it in 8 steps. Each makes sound in "
    "one step over w from 1 to 4.5 by CFG and by CFG-scaled.",
    limits="The rectified flow has twice the training of the others. The consistency model has no "
    "schedule of its step, and the velocity's parametrization instead of its own. One step of flow "
    "matching predicts the mean of all sounds that fit, whatever the guidance.",
    arms=_arms,
    claims=tuple(
        Claim(
            f"{kind}, w = {w:g}: CFG-scaled is better than CFG",
            _at(kind, "cfg_scaled", w),
            _at(kind, "cfg", w),
            key,
        )
        for key in ("frechet", "inception")
        for kind in KINDS
        for w in (2.0, 4.5)
    ),
    draw=_draw,
)
