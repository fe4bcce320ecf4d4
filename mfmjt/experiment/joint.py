"""The paper's third mechanism: training on video and text jointly, from scratch."""

from __future__ import annotations

from pathlib import Path

from mfmjt.experiment.base import Arm, Claim, Experiment, Row, Way
from mfmjt.experiment.measures import MEASURES, cell, value
from mfmjt.meanflow import Sampling
from mfmjt.plotting import COLORS, figure

__all__ = ["EXPERIMENT"]

TEXT = {"drop_video": 1.0, "drop_text": 0.0, "drop_all": 0.1}
HEARING = ("fused_blocks", "final_layer")
"""Parts that see the latent alone."""
CONDITIONS = ("both", "video", "text")


def _arms(quick: bool) -> tuple[Arm, ...]:
    ways = tuple(Way(Sampling(), conditions) for conditions in CONDITIONS)
    text = {"init_from": "@text alone", "flow_steps": 0}
    half = {"steps": 0.5}
    video = {"drop_video": 0.0, "drop_text": 1.0, "drop_all": 0.1}
    return (
        Arm("jointly", {}, ways),
        Arm("video alone", video, ways[1:2]),
        Arm("text alone", TEXT, ways[2:], shares=half),
        Arm("text, then video", text, ways, shares=half),
        Arm("text, then video, parts frozen", {**text, "frozen": HEARING}, ways, shares=half),
    )


def _draw(rows: list[Row], probes: list[Row], folder: Path) -> dict[str, str]:
    shown = [m for m in MEASURES if m.key in ("onset_f1", "class_accuracy", "frechet")]
    cells = list(dict.fromkeys((row["arm"], row["conditions"]) for row in rows))[::-1]
    with figure(folder / "joint.svg", (3.0 * len(shown) + 1.6, 0.26 * len(cells) + 1)) as drawn:
        for axis, of in zip(drawn.subplots(1, len(shown), sharey=True), shown, strict=True):
            for i, (arm, conditions) in enumerate(cells):
                own = value(cell(rows, {"arm": arm, "conditions": conditions}), of)
                color = COLORS[CONDITIONS.index(conditions)]
                axis.plot([own.low, own.high], [i, i], color=color)
                axis.plot([own.mean], [i], "o", color=color)
            axis.set_yticks(range(len(cells)), [f"{arm}: {given}" for arm, given in cells])
            axis.set_title(of.title)
            axis.grid(visible=True, axis="x", alpha=0.3)
    return {"joint.svg": "Figures at one step, by training and by what the sound is made from."}


def _at(arm: str, conditions: str) -> Row:
    return {"arm": arm, "conditions": conditions}


EXPERIMENT = Experiment(
    title="Joint: video and text together, or one after the other",
    question="The paper (arXiv 2509.06389) trains on videos with captions and on sounds with "
    "captions jointly, from scratch. Is that better than video alone, or than a network of text "
    "that is then trained with video, whole or in part?",
    method="All budgets are equal: a network is trained for all steps jointly, where 0.2 of the "
    "rows lose their video, or for all steps on video alone; or for one half with captions alone "
    "and for the other half jointly, all of its weights or without those of the audio-only blocks "
    "and the last layer. Each makes sound in one step, by CFG-scaled with w = 1.5, from video and "
    "caption, from video alone and from the caption alone.",
    limits="Sounds with captions alone are the same clips without their frames, so that joint "
    "training brings no further data here, which is what it does in the paper.",
    arms=_arms,
    claims=(
        *(
            Claim(
                "From video alone: trained jointly is better than on video alone",
                _at("jointly", "video"),
                _at("video alone", "video"),
                key,
            )
            for key in ("onset_f1", "class_accuracy", "frechet")
        ),
        *(
            Claim(
                "From both: trained jointly is better than text, then video",
                _at("jointly", "both"),
                _at("text, then video", "both"),
                key,
            )
            for key in ("onset_f1", "class_accuracy", "frechet")
        ),
        Claim(
            "From both: all weights are better than frozen parts",
            _at("text, then video", "both"),
            _at("text, then video, parts frozen", "both"),
            "frechet",
        ),
    ),
    draw=_draw,
)
