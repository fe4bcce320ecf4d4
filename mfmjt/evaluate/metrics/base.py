"""What a metric is, and what it returns."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mfmjt.errors import InputError, reason
from mfmjt.evaluate.examples import Known
from mfmjt.evaluate.sounds import Sounds

__all__ = ["Figure", "Metric", "Score", "by_class", "choose_metrics", "load_metric"]


class Figure(NamedTuple):
    """One number of a report.

    Attributes:
        key: Its name in the report.
        title: Head of its column in the table; "" for no column.
        digits: Decimals in the table.
        real: The figure, or the number, that real audio gets in this column.
        codec: The figure that the codec alone gets in this column.
        better: `higher` or `lower`; "" where neither is, or it is not known.
    """

    key: str
    title: str = ""
    digits: int = 3
    real: str | float = ""
    codec: str = ""
    better: str = ""


@dataclass
class Score:
    """What a metric says.

    Attributes:
        figures: Its numbers by key; one that is left out is not applicable.
        interval: 95 % intervals of some of them.
        per_class: Some of them for each class by itself: key -> class -> number.
        per_clip: Some of them for each clip by itself: key -> (n,), of which the figure is the
            mean.
    """

    figures: dict[str, float]
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    per_clip: dict[str, np.ndarray] = field(default_factory=dict)


class Metric(NamedTuple):
    """What can be measured.

    Attributes:
        name: Short name, for choosing it and for progress.
        figures: Every figure that it can give.
        score: Judges sounds by the real ones and by what is known of both. None where what it
            needs is not known.
        needs: Networks in `LISTENERS` whose features it takes.
    """

    name: str
    figures: tuple[Figure, ...]
    score: Callable[[Sounds, Sounds, Known], Score | None]
    needs: tuple[str, ...] = ()


def load_metric(name: str) -> Metric:
    """Return the metric that `package.module:name` stands for.

    Raises:
        InputError: No such module, or no such metric in it.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever the module's own code raises
        raise InputError(
            f"metric {name}: {module!r} cannot be imported: {reason(error)}. Give "
            "package.module:name, and add the module's folder to PYTHONPATH."
        ) from error
    if not isinstance(found, Metric):
        raise InputError(
            f"metric {name}: {module} has no Metric {attribute!r}. Define one; see "
            "mfmjt.evaluate.metrics."
        )
    return found


def choose_metrics(names: Sequence[str | Metric], known: Sequence[Metric]) -> list[Metric]:
    """Return the metrics that are named, each once.

    Args:
        names: Names of metrics in `known`, families that these begin with, such as `fd`, and
            metrics of your own: `package.module:name`, or the metric itself.
        known: What there is to choose from.

    Raises:
        InputError: A name that none has; what `load_metric` raises.
    """
    found: dict[str, Metric] = {}
    for name in names:
        if isinstance(name, Metric):
            own = [name]
        elif ":" in name:
            own = [load_metric(name)]
        else:
            own = [m for m in known if m.name == name or m.name.startswith(f"{name}_")]
        if not own:
            raise InputError(
                f"There is no metric {name!r}. Choose of {', '.join(m.name for m in known)}, a "
                "family, such as fd, or package.module:name."
            )
        found |= {metric.name: metric for metric in own}
    return list(found.values())


def by_class(classes: Sequence[str], score: Callable[[np.ndarray], float]) -> dict[str, float]:
    """Score of the examples of each class, which are told to `score` by a mask (n,)."""
    names = np.array(classes)
    return {str(name): score(names == name) for name in dict.fromkeys(classes)}
