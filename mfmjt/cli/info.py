"""`mfmjt info`."""

from __future__ import annotations

import typer

from mfmjt.cli._common import Debug

__all__ = ["info"]


def info(debug: Debug = False) -> None:
    """Print versions, hardware, and what runs where.

    For example: `mfmjt info`
    """
    from mfmjt.info import report

    typer.echo(report())
