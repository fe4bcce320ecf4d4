"""`mfmjt info`."""

from __future__ import annotations

from typing import Annotated

import typer

from mfmjt.cli._common import Debug

__all__ = ["info"]


def info(
    model: Annotated[
        str | None,
        typer.Argument(help="A model's name, file, folder or repository: print its terms of use."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Print versions, hardware, and what runs where, or under which license a model is.

    For example:
    - `mfmjt info`

    - `mfmjt info weights/mmaudio_small_16k.pth`
    """
    from mfmjt.info import report, terms

    typer.echo(report() if model is None else terms(model))
