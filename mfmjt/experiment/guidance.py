"""CFG against CFG-scaled, and what the two velocities that they combine do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mfmjt.experiment.base import Arm, Claim, Experiment, Row, Trained, Way
from mfmjt.experiment.plots import lines
from mfmjt.meanflow import Sampling, guide
from mfmjt.meanflow.guidance import GuidanceMode
from mfmjt.plotting import COLORS, figure

__all__ = ["EXPERIMENT", "vectors"]

MODES: tuple[GuidanceMode, ...] = ("cfg_scaled", "cfg")
SCALES = (1.0, 1.5, 2.0, 3.0, 4.5, 6.0, 8.0)
STEPS = (1, 25)
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
STRENGTH = 4.5
"""w of the guided steps whose length is measured."""
PANELS = {
    "angle": "angle of u_c and u_0, degrees",
    "ratio": "length of u_c over u_0",
    "scale": "scale s",
    "overshoot_cfg": f"overshoot, CFG, w = {STRENGTH}",
    "overshoot_cfg_scaled": f"overshoot, CFG-scaled, w = {STRENGTH}",
}


def _arms(quick: bool) -> tuple[Arm, ...]:
    scales = (1.0, 2.0, 4.5, 8.0) if quick else SCALES
    ways = (Way(Sampling(n, w, mode)) for n in STEPS for mode in MODES for w in scales)
    return (Arm("MeanFlow", {}, tuple(ways)),)


def vectors(u_c: Tensor, u_0: Tensor, w: float = STRENGTH) -> dict[str, Tensor]:
    """Return what two velocities (B, ...) do, (B,) each.

    `angle` in degrees between them; `ratio` of their lengths; `scale`, s of CFG-scaled; and
    `overshoot` of each mode: how much longer the guided velocity is than u_c, relative to it.
    """
    c, null = u_c.flatten(1).double(), u_0.flatten(1).double()
    dot, long, short = (c * null).sum(1), c.norm(dim=1), null.norm(dim=1)
    guided = {mode: guide(u_c, u_0, w, mode).flatten(1).double().norm(dim=1) for mode in MODES}
    return {
        "angle": torch.rad2deg(torch.arccos((dot / (long * short)).clamp(-1, 1))),
        "ratio": long / short,
        "scale": dot / short.square(),
        **{f"overshoot_{mode}": length / long - 1 for mode, length in guided.items()},
    }


@torch.no_grad()
def _probe(trained: Trained) -> Iterator[Row]:
    """Yield the vectors of each class: of the one step from noise, and of velocities at r = t."""
    bundle, examples = trained.bundle, trained.examples
    network, device = bundle.network, bundle.device
    length = bundle.lengths(examples.duration).latents
    features = {key: rows.to(device) for key, rows in examples.features.items()}
    cond, null = bundle.conditions(features, length, Sampling())
    generator = torch.Generator().manual_seed(0)
    waves = examples.audio.to(device)
    x = torch.cat([bundle.codec.encode(rows)[0] for rows in waves.split(8)])[:, :length]
    x = network.normalize(x)
    noise = torch.randn(x.shape, generator=generator).to(device)
    one = torch.ones(len(x), device=device)
    for r, t in ((0.0, 1.0), *((t, t) for t in TIMES)):
        z = (1 - t) * x + t * noise
        u_c, u_0 = (network(z, r * one, t * one, cond=given) for given in (cond, null))
        found = vectors(u_c, u_0)
        for name in sorted(set(examples.classes)):
            own = torch.tensor([one == name for one in examples.classes])
            means = {key: round(float(value[own].mean()), 4) for key, value in found.items()}
            yield {"r": r, "t": t, "class": name, **means}


def _draw(rows: list[Row], probes: list[Row], folder: Path) -> dict[str, str]:
    drawn = {}
    for steps in STEPS:
        name = f"guidance_{steps}.svg"
        lines(folder / name, rows, "guidance", "mode", "w", {"steps": steps})
        drawn[name] = f"Figures against the scale w, {steps} step{'s' * (steps > 1)}."
    _draw_noise(probes, folder / "guidance_noise.svg")
    drawn["guidance_noise.svg"] = (
        "What the velocities at r = t do at each noise level, each seed a line; the point is that "
        "of the one step from noise, r = 0 and t = 1."
    )
    _draw_classes(probes, folder / "guidance_classes.svg")
    drawn["guidance_classes.svg"] = "The same of the one step from noise, by class: mean of seeds."
    return drawn


def _draw_noise(probes: list[Row], path: Path) -> None:
    with figure(path, (2.6 * len(PANELS), 2.8)) as drawn:
        for axis, (key, title) in zip(drawn.subplots(1, len(PANELS)), PANELS.items(), strict=True):
            for seed in sorted({row["seed"] for row in probes}):
                own = [row for row in probes if row["seed"] == seed]
                means = [_mean(own, key, t, t) for t in TIMES]
                axis.plot(TIMES, means, "-", color=COLORS[0], alpha=0.7)
                axis.plot([1.0], [_mean(own, key, 0.0, 1.0)], "o", color=COLORS[1])
            axis.set_title(title)
            axis.set_xlabel("t (1 is noise)")
            axis.grid(visible=True, alpha=0.3)


def _draw_classes(probes: list[Row], path: Path) -> None:
    step = [row for row in probes if row["r"] == 0.0]
    names = sorted({row["class"] for row in step})
    with figure(path, (2.6 * len(PANELS), 0.22 * len(names) + 1)) as drawn:
        axes = drawn.subplots(1, len(PANELS), sharey=True)
        for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
            own = [[row[key] for row in step if row["class"] == name] for name in names]
            axis.barh(
                [name.replace("_", " ") for name in names],
                [float(np.mean(values)) for values in own],
                color=COLORS[0],
            )
            axis.set_title(title)
            axis.grid(visible=True, axis="x", alpha=0.3)


def _mean(probes: list[Row], key: str, r: float, t: float) -> float:
    found = [row[key] for row in probes if (row["r"], row["t"]) == (r, t)]
    return float(np.mean(found)) if found else math.nan


def _told(probes: list[Row]) -> str:
    lines = ["### The vectors", ""]
    lines += [f"| r | t | {' | '.join(PANELS.values())} |", "|---" * (2 + len(PANELS)) + "|"]
    for r, t in sorted({(row["r"], row["t"]) for row in probes}):
        means = " | ".join(f"{_mean(probes, key, r, t):.3f}" for key in PANELS)
        lines.append(f"| {r:g} | {t:g} | {means} |")
    lines += ["", "Means over seeds, classes and clips."]
    return "\n".join(lines)


def _at(mode: str, w: float, steps: int = 1) -> Row:
    return {"mode": mode, "guidance": w, "steps": steps}


EXPERIMENT = Experiment(
    title="Guidance: CFG against CFG-scaled",
    question="CFG-scaled multiplies the unconditional velocity by s = <u_c, u_0> / |u_0|², as "
    "CFG-Zero* does (arXiv 2503.18886). The paper (arXiv 2509.06389) reports that its inception "
    "score at one step is at least that of standard CFG for every w > 1 and falls more slowly with "
    "w, and that larger w helps where there are many steps. Does it, and why?",
    method="One MeanFlow network makes sound with both modes over w from 1 to 8, at one step and "
    "at 25. For the same network the two velocities are compared: their angle, the ratio of their "
    "lengths, s, and the overshoot, by how much a guided velocity is longer than u_c.",
    limits="The network has learned both velocities in a small world, where conditions decide "
    "most of the sound. The vectors are measured on latents of real sound with noise, not along "
    "the path that a guided sampler takes.",
    arms=_arms,
    claims=(
        *(
            Claim(
                f"At one step and w = {w:g}, CFG-scaled has a higher IS than CFG",
                _at("cfg_scaled", w),
                _at("cfg", w),
                "inception",
            )
            for w in (2.0, 4.5, 8.0)
        ),
        *(
            Claim(
                f"At one step and w = {w:g}, CFG-scaled is nearer to real sound than CFG",
                _at("cfg_scaled", w),
                _at("cfg", w),
                "frechet",
            )
            for w in (2.0, 4.5, 8.0)
        ),
        Claim(
            "At 25 steps, CFG-scaled has a higher IS with w = 4.5 than without guidance",
            _at("cfg_scaled", 4.5, 25),
            _at("cfg_scaled", 1.0, 25),
            "inception",
        ),
        Claim(
            "At one step, CFG-scaled has a lower IS with w = 4.5 than without guidance",
            _at("cfg_scaled", 1.0),
            _at("cfg_scaled", 4.5),
            "inception",
        ),
    ),
    draw=_draw,
    probe=_probe,
    told=_told,
)
