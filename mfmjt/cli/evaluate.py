"""`mfmjt evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from mfmjt.cli._common import Debug, Device, defer_interrupts

if TYPE_CHECKING:
    from mfmjt.meanflow.guidance import GuidanceMode

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[str, typer.Option(help="A model that ships, or a folder with one.")] = "nano",
    clips: Annotated[int, typer.Option(help="How many held-out clips.")] = 200,
    seed: Annotated[int, typer.Option(help="Decides which clips, and the noise.")] = 0,
    steps: Annotated[int, typer.Option(help="Evaluations of the network.")] = 1,
    guidance: Annotated[float, typer.Option(help="Strength of guidance; 1 is none.")] = 1.5,
    guidance_mode: Annotated[str, typer.Option(help="cfg_scaled, cfg or none.")] = "cfg_scaled",
    conditions: Annotated[str, typer.Option(help="both, video or text.")] = "both",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    device: Device = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the figures to this JSON file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Save spectrograms of real and made sound (.svg).")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the table.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Make sound for held-out clips of the procedural set and judge it.

    Onsets are compared with the known event times, classes by a classifier trained on real sound.

    For example:

    - `mfmjt evaluate --clips 40`

    - `mfmjt evaluate --clips 40 --seed 1 --steps 4 --json`

    - `mfmjt evaluate --model output/mine --conditions text --plot gallery.svg`
    """
    with defer_interrupts():
        from mfmjt.devices import choose_device
        from mfmjt.evaluate import experiment
        from mfmjt.files import check_writable
        from mfmjt.meanflow.guidance import check_mode
        from mfmjt.progress import stage_bar

    for path in (output, plot):
        if path is not None:
            check_writable(path)
    check_mode(guidance_mode)
    mode = cast("GuidanceMode", guidance_mode)
    with stage_bar() as report:
        parts = experiment.load_parts(model, device=choose_device(device))
        examples = experiment.examples(parts.encoders, clips, seed, split, progress=report)
        result = experiment.evaluate(
            parts,
            clips=examples,
            seed=seed,
            steps=steps,
            guidance=guidance,
            mode=mode,
            split=split,
            conditions=conditions,
            model=Path(model).name,
            progress=report,
        )
        if output is not None:
            experiment.write_report(result, output)
        if plot is not None:
            from mfmjt.evaluate.plots import plot_gallery

            made = experiment.generate(
                parts,
                examples,
                steps=steps,
                guidance=guidance,
                mode=mode,
                conditions=conditions,
                seed=seed,
                progress=report,
            )
            plot_gallery(examples, made, plot)
    typer.echo(result.to_json() if as_json else experiment.table([result]).rstrip())
