"""`mfmjt train`."""

from __future__ import annotations

from typing import Annotated

import typer

from mfmjt.cli._common import Debug, defer_interrupts

__all__ = ["train"]


def train(
    stage: Annotated[str, typer.Argument(help="codec, teacher, text, encoders, ..., classifier.")],
    recipe: Annotated[
        str, typer.Argument(help="A JSON file, or the name of a recipe that ships.")
    ] = "nano",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, as key=value.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Run one stage of the training of a model; an interrupted stage goes on where it stopped.

    The stages in order: codec, encoders, features, network. The classifier judges the result.
    Before the encoders, `teacher` and `text` may teach a text encoder what words mean.

    For example:
    - `mfmjt train codec`

    - `mfmjt train network nano steps=20000 lr=5e-4`

    - `mfmjt train network recipe.json device=cuda metrics=onsets,classes`
    """
    with defer_interrupts():
        from mfmjt.train.stages import run

    changes = list(overrides or [])
    if "=" in recipe:
        recipe, changes = "nano", [recipe, *changes]
    typer.echo(run(stage, recipe, changes))
