"""How good the generated sound is: a report on a network, and the table of two.

Every figure stands beside what the same judge says of the real audio, so that the judge's own error
shows.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mfmjt.evaluate.classifier import Classifier, load_classifier
from mfmjt.evaluate.examples import Examples, silent
from mfmjt.evaluate.listening import Networks
from mfmjt.evaluate.metrics import METRICS, Metric
from mfmjt.evaluate.report import Report, environment, table, write_report
from mfmjt.evaluate.sounds import Made
from mfmjt.families import Bundle
from mfmjt.files import atomic_path
from mfmjt.meanflow import Sampling
from mfmjt.progress import Progress

__all__ = ["evaluate", "suite"]


def evaluate(
    bundle: Bundle,
    examples: Examples,
    sampling: Sampling | None = None,
    classifier: Classifier | None = None,
    *,
    metrics: Sequence[Metric] = METRICS,
    networks: Networks | None = None,
    conditions: str = "both",
    batch: int = 20,
    model: str = "nano",
    progress: Progress = silent,
) -> Report:
    """Generate sound for examples and judge it.

    Args:
        bundle: Network, codec and encoders that belong together.
        examples: What to make sound for, and what is known of it.
        sampling: Steps and guidance; by default what the network is made for.
        classifier: Judge of class and embedding; the shipped one by default.
        metrics: What to measure. One whose truth the examples lack leaves its figures out.
        networks: Judges with published weights, for the metrics that need them.
        conditions: `both`, `video` or `text`.
        batch: Sounds made at once.
        model: What to call the network in the report.
        progress: Called as (stage, fraction done).

    Returns:
        The report.

    Raises:
        InputError: Unknown conditions, too few clips, or weights that a metric needs are missing.
        RunError: The network makes samples that are not finite.
    """
    made = Made(
        bundle,
        examples,
        classifier or load_classifier(),
        sampling=sampling,
        conditions=conditions,
        batch=batch,
        progress=progress,
        networks=networks,
    )
    real = made.like(examples.audio, examples.sample_rate)
    classes = examples.classes
    report = Report(
        model,
        len(examples),
        examples.split,
        examples.seed,
        **dataclasses.asdict(made.sampling),
        conditions=conditions,
        figures=dict.fromkeys(f.key for metric in (*METRICS, *metrics) for f in metric.figures),
        per_class={name: {"clips": float(classes.count(name))} for name in sorted(set(classes))},
        environment=environment(bundle.device),
    )
    for done, metric in enumerate(metrics):
        progress(metric.name, done / len(metrics))
        score = metric.score(made, real, examples)
        if score is not None:
            report.figures |= score.figures
            report.interval |= score.interval
            for key, by_class in score.per_class.items():
                for name, value in by_class.items():
                    report.per_class[name][key] = value
    report.seconds_per_clip = {k: v / len(examples) for k, v in made.seconds.items()}
    return report


def suite(
    mean_flow: Bundle,
    flow_matching: Bundle | None,
    out: str | os.PathLike[str],
    examples: Examples,
    sampling: Sampling | None = None,
    *,
    steps: Sequence[int] = (1, 2, 4, 25),
    metrics: Sequence[Metric] = METRICS,
    **options: Any,
) -> list[Report]:
    """Make the table: MeanFlow and flow matching at some numbers of steps on equal clips and noise.

    Writes evaluate_{meanflow,flow}_{steps}.json and table.md into `out` as it goes.

    Args:
        mean_flow: The MeanFlow network with its codec and encoders.
        flow_matching: The network of the same size and budget trained without MeanFlow, if any;
            codec and encoders must be the same.
        out: Folder, made if missing.
        examples: What both make sound for.
        sampling: Guidance; its steps are not looked at.
        steps: Numbers of steps to try.
        metrics: What to measure.
        options: Further arguments of `evaluate`.

    Returns:
        The reports in the order of the table.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    sampling = sampling or mean_flow.sampling
    reports: list[Report] = []
    networks = [("MeanFlow", "meanflow", mean_flow)]
    if flow_matching is not None:
        networks.append(("flow matching", "flow", flow_matching))
    for name, stem, bundle in networks:
        for count in steps:
            report = evaluate(
                bundle,
                examples,
                dataclasses.replace(sampling, steps=count, instantaneous=stem == "flow"),
                # The codec alone is the same in every row.
                metrics=[m for m in metrics if not (reports and m.name == "codec")],
                model=name,
                **options,
            )
            write_report(report, out / f"evaluate_{stem}_{count}.json")
            reports.append(report)
            with atomic_path(out / "table.md") as temporary:
                temporary.write_text(table(reports, metrics))
    return reports
