"""What an experiment is: networks that are trained, ways to sample each, and what is compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mfmjt.evaluate.examples import Examples
from mfmjt.families import Bundle
from mfmjt.meanflow import Sampling
from mfmjt.train.recipe import NetworkTraining
from mfmjt.train.trainer import TrainingResult

__all__ = ["FLOW", "Arm", "Claim", "Experiment", "Row", "Trained", "Way", "ways_at"]

Row = dict[str, Any]
"""One line of a file of rows: what was sampled how, its figures and those of its clips."""

FLOW = {"ratio": 0.0, "flow_steps": 0, "one_step": 0.0, "p": 0.0, "time_std": 1.0}
"""Settings of plain flow matching."""


@dataclass(frozen=True)
class Way:
    """How a trained network makes sound.

    Attributes:
        sampling: Steps and guidance.
        conditions: `both`, `video` or `text`.
    """

    sampling: Sampling
    conditions: str = "both"

    @property
    def about(self) -> Row:
        """Return what identifies this way in a row."""
        own = dataclasses.asdict(self.sampling)
        del own["instantaneous"]  # follows from what the network learned
        return own | {"conditions": self.conditions}


def ways_at(steps: Sequence[int], flow: bool = False, guidance: float = 1.5) -> tuple[Way, ...]:
    """Return the ways at some numbers of steps; `flow` evaluates at r = t."""
    return tuple(Way(Sampling(n, guidance, instantaneous=flow)) for n in steps)


@dataclass(frozen=True)
class Arm:
    """A network that is trained once for each seed.

    Attributes:
        name: What it is called.
        settings: Settings of its training that differ from the recipe's. A text `@NAME` is the file
            of the network NAME, an arm of the same experiment, trained with the same seed.
        ways: How it is sampled.
        at: Numbers that place it on an axis, which its rows repeat.
        shares: Settings that are a part of the recipe's: `steps`, or `clips` of the store's.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    ways: tuple[Way, ...] = ()
    at: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the names of the arms whose networks this one is trained with."""
        named = (value for value in self.settings.values() if isinstance(value, str))
        return tuple(value[1:] for value in named if value.startswith("@"))


class Claim(NamedTuple):
    """One cell is better than another, as a paper says or as one would expect.

    Attributes:
        says: The claim, a sentence.
        better: Values of a row that pick the cell, such as `{"arm": "MeanFlow", "steps": 1}`.
        worse: Those of the other cell.
        measure: Key of the figure that decides.
    """

    says: str
    better: Mapping[str, Any]
    worse: Mapping[str, Any]
    measure: str


class Trained(NamedTuple):
    """A trained network, for the figures that only one experiment has.

    Attributes:
        bundle: The network with codec and encoders.
        examples: What it is judged on.
        config: How it was trained.
        quick: Whether the grid is the quick one.
    """

    bundle: Bundle
    examples: Examples
    config: NetworkTraining
    quick: bool


@dataclass(frozen=True)
class Experiment:
    """One question, and how it is answered.

    Attributes:
        title: Of the page.
        question: A paragraph.
        method: A paragraph.
        limits: What the result does not show.
        arms: arms(quick) are the networks.
        claims: What is compared.
        draw: draw(rows, folder) writes plots and returns their file names with a caption each.
        probe: Yields further rows of a trained network, which go to `probes.jsonl`.
        told: told(probes) is Markdown about these.
        train: Trains a network in another way than `mfmjt.train.tasks.network` does.
    """

    title: str
    question: str
    method: str
    limits: str
    arms: Callable[[bool], tuple[Arm, ...]]
    claims: tuple[Claim, ...] = ()
    draw: Callable[[list[Row], list[Row], Path], dict[str, str]] = lambda rows, probes, folder: {}
    probe: Callable[[Trained], Iterator[Row]] | None = None
    told: Callable[[list[Row]], str] = lambda probes: ""
    train: Callable[[NetworkTraining], TrainingResult] | None = None
