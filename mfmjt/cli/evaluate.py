"""`mfmjt evaluate`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from mfmjt.cli import _common, _sets
from mfmjt.errors import InputError

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[
        str, typer.Option(help="A model that ships, a folder with one, or the file of a network.")
    ] = "nano",
    clips: Annotated[int, typer.Option(help="How many held-out clips.")] = 200,
    seed: Annotated[int, typer.Option(help="Decides which clips, and the noise.")] = 0,
    steps: _common.Steps = None,
    guidance: _common.Guidance = None,
    guidance_mode: _common.Mode = None,
    conditions: Annotated[str, typer.Option(help="both, video or text.")] = "both",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    data: _sets.Data = None,
    recordings: _sets.Recordings = None,
    unseen: _sets.Unseen = False,
    judge: _sets.Judge = None,
    metric: _sets.Metrics = None,
    weights: _sets.Weights = None,
    suite: Annotated[
        Path | None, typer.Option(help="Folder for the whole table, at 1, 2, 4 and 25 steps.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Flow-matching network of its size, for --suite's table.")
    ] = None,
    device: _common.Device = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the figures to this JSON file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Save spectrograms of real and made sound (.svg).")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the table.")
    ] = False,
    debug: _common.Debug = False,
) -> None:
    """Make sound for held-out clips and judge it.

    Onsets are compared with the known event times, and classes are judged by a classifier trained
    on real sound. Of clips of your own (--data), what has a known truth is judged.

    For example:
    - `mfmjt evaluate --clips 40 --seed 1 --steps 4 --json`

    - `mfmjt evaluate --model output/mine --conditions text --plot gallery.svg`

    - `mfmjt evaluate --metric fd_panns --weights weights`

    - `mfmjt evaluate --suite output/results --against flow.safetensors`

    - `mfmjt evaluate --model output/mine --recordings corpus --judge output/mine`
    """
    _sets.check(data, recordings, unseen, conditions)
    if against is not None and suite is None:
        raise InputError("--against is for the table of --suite. Give --suite FOLDER too.")
    if suite is not None and (steps is not None or output is not None or as_json):
        raise InputError("--suite chooses steps and writes files: leave out --steps, -o, --json.")
    with _common.defer_interrupts():
        from mfmjt.devices import choose_device
        from mfmjt.evaluate import plots, report, run
        from mfmjt.evaluate.classifier import load_classifier
        from mfmjt.evaluate.listening import Networks
        from mfmjt.evaluate.metrics import METRICS, PUBLISHED, choose_metrics
        from mfmjt.evaluate.sounds import generate
        from mfmjt.families import open_bundle
        from mfmjt.files import check_writable
        from mfmjt.plotting import check_matplotlib

    for path in filter(None, (suite, output, plot)):
        check_writable(path)
        if path is suite:
            path.mkdir(exist_ok=True)
    if plot is not None:
        check_matplotlib()
    metrics = tuple(dict.fromkeys((*METRICS, *choose_metrics(metric or (), PUBLISHED))))
    classifier = load_classifier(judge)
    bundle = open_bundle(model).to(choose_device(device))
    sampling = bundle.sampling.changed(steps, guidance, guidance_mode)
    with ExitStack() as stack:
        given = (clips, seed, split, conditions, data, recordings, unseen)
        examples, progress = _sets.examples(stack, bundle, classifier.config.classes, *given)
        options: dict[str, Any] = {"conditions": conditions, "progress": progress}
        networks = Networks(weights, device=bundle.device)
        judged: dict[str, Any] = {"metrics": metrics, "networks": networks, **options}
        judged["classifier"] = classifier
        if suite is None:
            name = Path(model).name
            reports = [run.evaluate(bundle, examples, sampling, model=name, **judged)]
        else:
            flow = None if against is None else open_bundle(model, against).to(bundle.device)
            reports = run.suite(bundle, flow, suite, examples, sampling, **judged)
            if plot is not None:
                plots.plot_steps(reports, suite / "steps.svg", metrics)
        if output is not None:
            report.write_report(reports[0], output)
        if plot is not None:
            shown = examples.first(max(plots.GALLERY) + 1)
            made = generate(bundle, shown, sampling, **options)
            plots.plot_gallery(shown, made, plot)
    typer.echo(reports[0].to_json() if as_json else report.table(reports, metrics).rstrip())
