"""`mfmjt score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mfmjt.cli._common import Debug, Device, defer_interrupts
from mfmjt.errors import InputError

__all__ = ["score"]

STAGE_TITLES = {
    "find": "Finding clips and weights",
    "listen": "Listening",
    "watch": "Watching",
    "measure": "Measuring",
}


def score(
    generated: Annotated[
        Path, typer.Argument(help="Folder of the sounds, or a table with a row for each.")
    ],
    reference: Annotated[
        Path | None, typer.Option(help="Folder or table of the real sounds, of the same names.")
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="Table with the columns id (or name) and caption.")
    ] = None,
    videos: Annotated[Path | None, typer.Option(help="Folder of the videos, by name.")] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Names or families, such as fd,kl,is_panns. Default: all there can be."),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Metric of your own: package.module:name. Repeatable.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Folder of the published weights; docs/score.md lists them.")
    ] = None,
    check: Annotated[
        str, typer.Option(help="digest: published weights alone. name: any file so called.")
    ] = "digest",
    protocol: Annotated[
        str, typer.Option(help="default, or av-benchmark for that tool's choices.")
    ] = "default",
    seconds: Annotated[
        float | None,
        typer.Option(help="Judged of each clip. Default: the commonest length, at most 10."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of the features. Default: ~/.cache/mfmjt/score.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that compute. Default: one for each CPU, 8 at most."),
    ] = None,
    device: Device = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for a page to read and to listen to.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write every figure to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Score sounds of any system against real ones, with the field's numbers.

    Files are paired by their names. What cannot be scored is listed and counted, never replaced. A
    metric whose published weights are not in --weights is left out, and the reason is told. A run
    that was interrupted goes on where it was.

    For example:
    - `mfmjt score output/mine --reference real --weights weights`

    - `mfmjt score output/mine --reference real --weights weights --videos videos --metrics fd,ib`

    - `mfmjt score clips.csv --weights weights --report output/scores --json scores.json`

    - `mfmjt score output/mine --reference real --weights weights --protocol av-benchmark`
    """
    with defer_interrupts():
        from mfmjt.evaluate.metrics import load_metric
        from mfmjt.evaluate.scoring import save_report
        from mfmjt.evaluate.scoring import score as compute
        from mfmjt.files import check_writable
        from mfmjt.progress import stage_bar

    wanted: list[Any] | None = None
    if metrics is not None or metric:
        wanted = [name.strip() for name in (metrics or "").split(",") if name.strip()]
        wanted += map(load_metric, metric or ())
    if metrics is not None and not metrics.strip():
        raise InputError("--metrics names none. Give names, such as fd,kl, or leave it out.")
    for path in filter(None, (json, report)):
        check_writable(path)
    with stage_bar(STAGE_TITLES) as progress:
        result = compute(
            generated, reference, captions, videos, wanted, weights, protocol, seconds=seconds,
            check=check, cache=cache, workers=workers, device=device, progress=progress,
        )  # fmt: skip
    for line in result.summary():
        typer.echo(line, err=True)
    if json is not None:
        result.save(json)
    if report is not None:
        save_report(result, report)
    typer.echo(result.table().rstrip())
