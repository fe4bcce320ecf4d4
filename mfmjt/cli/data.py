"""`mfmjt data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mfmjt.cli._common import Debug

__all__ = ["app"]

app = typer.Typer(help="Look at the data that models here are trained on.", no_args_is_help=True)


@app.command()
def preview(
    out: Annotated[Path, typer.Argument(help="Folder to write to.")] = Path("demo/preview"),
    clips: Annotated[int, typer.Option(help="How many clips; 12 show each source once.")] = 12,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    seed: Annotated[int, typer.Option(help="Another seed is another endless set.")] = 0,
    size: Annotated[int, typer.Option(help="Pixels along each side of the frames.")] = 256,
    debug: Debug = False,
) -> None:
    """Write clips of the procedural set to watch and hear, and a contact sheet.

    For example:
    - `mfmjt data preview`

    - `mfmjt data preview out --clips 24 --split test`
    """
    from mfmjt.data.preview import preview as write_preview
    from mfmjt.progress import stage_bar

    with stage_bar() as report:
        written = write_preview(
            out, clips, split, seed, size, lambda done, total: report("Drawing", done / total)
        )
    typer.echo(f"Wrote {len(written)} files to {out}; begin with {written[0]}.")
