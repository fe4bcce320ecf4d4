"""The exact derivative against what the year's releases put in its place."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfmjt.experiment.base import FLOW, Arm, Claim, Experiment, Row, Trained, ways_at
from mfmjt.features.store import FeatureStore
from mfmjt.model import MFMJT
from mfmjt.plotting import COLORS, figure
from mfmjt.train.parallel import Processes
from mfmjt.train.recipe import NetworkTraining
from mfmjt.train.tasks.network import NetworkTask
from mfmjt.train.tasks.step import Step, draw
from mfmjt.train.trainer import TrainingResult, train

__all__ = ["EXPERIMENT", "Compared", "gradient"]

EXACT: dict[str, Any] = {
    "target": "mean_velocity",
    "target_options": {},
    "teacher": None,
    "balance": False,
}
ANYFLOW = {
    "target": "finite_difference",
    "target_options": {"h": 5e-3},
    "ratio": 0.5,
    "to_data": 0.5,
    "one_step": 0.0,
    "balance": True,
    "p": 0.0,
}
BATCHES = 4
"""Batches that a compared gradient is the mean of."""
TIMED = 5
LOOKS = 4
"""Comparisons of gradients during a training."""


def _arms(quick: bool) -> tuple[Arm, ...]:
    every = {"validate_every": (80 if quick else 600) // LOOKS}
    steps = (1, 4)
    flow = Arm("flow matching", FLOW, ways_at(steps, flow=True))
    scaled = {"overrides.time_scale": 1000.0}

    def difference(h: float, **more: Any) -> dict[str, Any]:
        return {"target": "finite_difference", "target_options": {"h": h}, **more}

    settings: dict[str, dict[str, Any]] = {
        "exact": {},
        **{f"difference, h = {h:g}": difference(h) for h in (1e-4, 1e-3, 5e-3, 2e-2)},
        "exact, 1000 t": scaled,
        **{f"difference, h = {h:g}, 1000 t": difference(h, **scaled) for h in (1e-4, 5e-3, 2e-2)},
        "alpha-Flow": {"target": "alpha_flow", "alpha": 0.1},
        "improved MeanFlow": {"target": "improved_mean_velocity"},
        "control variate": {"target": "control_variate"},
        "teacher velocity": {"teacher": f"@{flow.name}"},
        "teacher rollout": {
            "target": "teacher_rollout",
            "target_options": {"steps": 2},
            "teacher": f"@{flow.name}",
        },
        "AnyFlow's mix": ANYFLOW,
    }
    return (flow, *(Arm(n, {**s, **every}, ways_at(steps)) for n, s in settings.items()))


def gradient(step: Step, features: dict[str, Tensor], draws: Any, rows: int) -> Tensor:
    """Return the gradient of a loss by all weights that are trained, one vector in float64."""
    weights = [p for p in step.net.parameters() if p.requires_grad]
    loss, _ = step(features, draws, rows)
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat(
        [
            (g if g is not None else torch.zeros_like(w)).flatten()
            for g, w in zip(found, weights, strict=True)
        ]
    ).double()


def _batch(config: NetworkTraining, store: FeatureStore, seed: int) -> tuple[Any, Any, int]:
    """Draw a batch of rows that all have r < t."""
    rows = config.batch
    generator = torch.Generator().manual_seed(seed)
    free = dataclasses.replace(config, one_step=0.0, to_data=0.0)
    draws = draw(free, store, rows, config.window or None, rows, generator)
    return store.rows(draws.clips, draws.starts, draws.latent_noise), draws, rows


class Compared(NetworkTask):
    """A training whose validations compare its gradient with that of MeanFlow at its weights."""

    def validate(self) -> dict[str, float]:
        """Return `cosine` and `length` of the gradient to the exact one, and `noise`.

        All rows have r < t, with times as drawn, and both losses weigh them as MeanFlow's does, so
        that the targets alone differ. `noise` is the cosine of two exact gradients of other rows.
        """
        plain = dataclasses.replace(self.config, p=1.0, balance=False)
        exact = dataclasses.replace(plain, **EXACT)
        own_step = Step(self.network, plain, self._teacher())
        exact_step = Step(self.network, exact)
        sums: list[Tensor] = []
        with torch.enable_grad():
            for step, first in ((own_step, 0), (exact_step, 0), (exact_step, BATCHES)):
                batches = (_batch(plain, self.store, first + i) for i in range(BATCHES))
                sums.append(sum((gradient(step, *b) for b in batches), torch.zeros(())))
        own, same, other = sums
        return {
            "cosine": float(torch.cosine_similarity(own, same, dim=0)),
            "length": float(own.norm() / same.norm()),
            "noise": float(torch.cosine_similarity(same, other, dim=0)),
        }


def _train(config: NetworkTraining) -> TrainingResult:
    def make(processes: Processes) -> NetworkTask:
        return (Compared if config.validate_every else NetworkTask)(config, processes)

    return train(config, make)


def _probe(trained: Trained) -> Iterator[Row]:
    """Yield the comparisons of the training's log, and the cost of a step beside flow matching."""
    config = trained.config
    for line in (Path(config.out) / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row.get("kind") == "validation":
            yield {key: round(row[key], 4) for key in ("step", "cosine", "length", "noise")}
    if config.validate_every:
        own, plain = _cost(config)
        yield {"seconds": own, "plain_seconds": plain}


def _cost(config: NetworkTraining) -> tuple[float, float]:
    """Return seconds of a step's passes and of one of flow matching: medians, taken in turn."""
    net = MFMJT.load(Path(config.out) / "network.safetensors").train()
    teacher = MFMJT.load(config.teacher).eval() if config.teacher else None
    store = FeatureStore(config.store, "train")
    flow = dataclasses.replace(config, **EXACT, ratio=0.0)
    found: dict[int, list[float]] = {0: [], 1: []}
    for n in range(TIMED):
        for which, (own, lead) in enumerate(((config, teacher), (flow, None))):
            intervals = round(own.ratio * own.batch)
            generator = torch.Generator().manual_seed(n)
            draws = draw(own, store, own.batch, own.window or None, intervals, generator)
            features = store.rows(draws.clips, draws.starts, draws.latent_noise)
            step = Step(net, own, lead)
            began = time.process_time()
            gradient(step, features, draws, intervals)
            found[which].append(time.process_time() - began)
    own_s, plain_s = (float(np.median(found[which])) for which in (0, 1))
    return own_s, plain_s


def _draw(rows: list[Row], probes: list[Row], folder: Path) -> dict[str, str]:
    looks = [row for row in probes if "step" in row]
    names = list(dict.fromkeys(row["arm"] for row in looks))
    with figure(folder / "objectives.svg", (9.0, 4.2)) as drawn:
        axis = drawn.subplots()
        for i, name in enumerate(names):
            own = [row for row in looks if row["arm"] == name]
            at = sorted({row["step"] for row in own})
            means = [np.mean([r["cosine"] for r in own if r["step"] == s]) for s in at]
            style = ("-", "--", ":", "-.")[i // len(COLORS)]
            axis.plot(at, means, f"o{style}", color=COLORS[i % len(COLORS)], label=name)
        at = sorted({row["step"] for row in looks})
        floor = [np.mean([r["noise"] for r in looks if r["step"] == s]) for s in at]
        axis.plot(at, floor, color="black", linewidth=1, label="exact, of other rows")
        axis.set_xlabel("step of the training")
        axis.set_ylabel("cosine to the exact gradient")
        axis.grid(visible=True, alpha=0.3)
        drawn.legend(loc="outside right center")
    return {
        "objectives.svg": "Cosine of each objective's gradient to that of the exact derivative, at "
        "the weights of its own training and on the same rows."
    }


def _told(probes: list[Row]) -> str:
    lines = [
        "### Gradients and cost",
        "",
        "| objective | cosine to exact, last | length, last | step, over flow matching's |",
        "|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["arm"] for row in probes):
        own = [row for row in probes if row["arm"] == name]
        last = max(row["step"] for row in own if "step" in row)
        looks = [row for row in own if row.get("step") == last]
        costs = [row["seconds"] / row["plain_seconds"] for row in own if "seconds" in row]
        cosine, length = ([row[key] for row in looks] for key in ("cosine", "length"))
        lines.append(
            f"| {name} | {np.mean(cosine):.3f} ({min(cosine):.3f} to {max(cosine):.3f}) | "
            f"{np.mean(length):.2f} | {np.mean(costs):.2f} |"
        )
    lines += ["", "Means over seeds; in brackets the smallest and the largest."]
    return "\n".join(lines)


def _better(name: str, than: str, key: str, says: str) -> Claim:
    return Claim(says, {"arm": name, "steps": 1}, {"arm": than, "steps": 1}, key)


EXPERIMENT = Experiment(
    title="Objectives: the exact derivative and its replacements",
    question="The few-step releases of the last year replaced MeanFlow's derivative by finite "
    "differences (AnyFlow) or by rollouts of a teacher (dots.tts), because forward mode does not "
    "go together with their attention kernels. Is that an approximation of MeanFlow, or another "
    "objective? With sinusoids of 1000 t a difference over h = 0.005 spans 0.8 periods of the "
    "fastest one, so that it may be a smoothed objective instead.",
    method="The same network is trained on the same rows for as many steps with each objective; "
    "of finite differences with four h, and with times embedded as t and as 1000 t. During each "
    "training its gradient is compared with the exact one at the same weights, on the same "
    f"{BATCHES} batches in which all rows have r < t. The teacher is the flow-matching network of "
    "the same budget. All sounds are made by CFG-scaled with w = 1.5. A step's cost is CPU time of "
    "its forward and backward passes, taken in turn with that of flow matching.",
    limits="A teacher's own training is not in the cost. alpha stays 0.1 where the paper lowers "
    "it, and improved MeanFlow has no second head here. Precision is float32: what rounding does "
    "to differences in bfloat16 is not measured.",
    arms=_arms,
    claims=tuple(
        _better(name, than, key, says)
        for key in ("onset_f1", "class_accuracy", "frechet")
        for name, than, says in (
            ("exact", "difference, h = 0.0001", "Exact is better than a difference, h = 0.0001"),
            ("exact", "difference, h = 0.005", "Exact is better than a difference, h = 0.005"),
            (
                "exact, 1000 t",
                "difference, h = 0.005, 1000 t",
                "With 1000 t, exact is better than a difference, h = 0.005",
            ),
            ("exact", "exact, 1000 t", "Exact with t is better than with 1000 t"),
            ("exact", "AnyFlow's mix", "Exact is better than AnyFlow's mix"),
            ("exact", "teacher rollout", "Exact is better than a teacher's rollout"),
            ("exact", "alpha-Flow", "Exact is better than alpha-Flow"),
            ("exact", "improved MeanFlow", "Exact is better than improved MeanFlow"),
            ("control variate", "exact", "A control variate is better than exact"),
            ("teacher velocity", "exact", "A teacher's velocity is better than exact"),
        )
    ),
    draw=_draw,
    probe=_probe,
    told=_told,
    train=_train,
)
