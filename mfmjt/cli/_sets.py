"""Options of `mfmjt evaluate` that say what is judged, and by what; and the clips they choose."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mfmjt.errors import InputError

if TYPE_CHECKING:
    from mfmjt.evaluate.examples import Examples
    from mfmjt.families import Bundle
    from mfmjt.progress import Progress

__all__ = ["Data", "Judge", "Metrics", "Recordings", "Unseen", "Weights", "check", "examples"]

Data = Annotated[
    Path | None, typer.Option(help="Feature store, table or folder of videos to judge on.")
]
Recordings = Annotated[
    Path | None,
    typer.Option(help="Folder of `mfmjt data real`: judge on the open set made from it."),
]
Unseen = Annotated[
    bool, typer.Option("--unseen", help="Of --recordings: prompts of words never trained on.")
]
Judge = Annotated[
    Path | None, typer.Option(help="Folder with another classifier.safetensors than nano's.")
]
Metrics = Annotated[
    list[str] | None,
    typer.Option(help="Also fd, kl, ..., or your own: package.module:name. Repeatable."),
]
Weights = Annotated[
    Path | None, typer.Option(help="Published weights for such a metric; docs/score.md.")
]


def check(data: Path | None, recordings: Path | None, unseen: bool, conditions: str) -> None:
    """Refuse options that do not go together."""
    if data is not None and recordings is not None:
        raise InputError("--data and --recordings are two sets to judge on. Give one of them.")
    if unseen and (recordings is None or conditions != "text"):
        raise InputError("--unseen is for --recordings FOLDER --conditions text. Give both.")


def examples(
    stack: ExitStack,
    bundle: Bundle,
    known: tuple[str, ...],
    clips: int,
    seed: int,
    split: str,
    conditions: str,
    data: Path | None,
    recordings: Path | None,
    unseen: bool,
) -> tuple[Examples, Progress]:
    """Return the clips that the options choose, of classes that a judge knows, and the bar."""
    from mfmjt.evaluate.examples import opened, procedural, stored
    from mfmjt.extract import run
    from mfmjt.progress import stage_bar

    store = None if data is None else stack.enter_context(run.stored(data, bundle, split))
    progress = stack.enter_context(stage_bar())
    if store is not None:
        return stored(store, bundle, clips, seed, split, progress=progress), progress
    if recordings is None:
        made = procedural(bundle.encoders, clips, seed, split, progress=progress)
    else:
        alone = conditions == "text"
        made = opened(
            recordings, bundle.encoders, known, clips, seed, split,
            text_alone=alone, unseen=unseen, progress=progress,
        )  # fmt: skip
    return made, progress
