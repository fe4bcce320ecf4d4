"""`mfmjt check`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from mfmjt.cli._common import Debug, Fps, defer_interrupts

__all__ = ["check"]


def check(
    video: Annotated[Path, typer.Argument(help="Video file, folder or pattern of pictures.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Check that this file could be written, too."),
    ] = None,
    fps: Fps = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Say what would be read of a video, and what would be copied, without making sound.

    That is: which stream, its codec and size, when its frames are shown, into which files they
    can be copied as they are, what is left out, and all that is odd, such as damage.

    For example:
    - `mfmjt check clip.mp4`

    - `mfmjt check recording.webm -o out.mp4`

    - `mfmjt check clip.mkv --json`

    - `mfmjt check frames/%04d.png --fps 24`
    """
    with defer_interrupts():
        from mfmjt import media
    report = media.check(media.as_source(video, fps), output)
    typer.echo(json.dumps(dataclasses.asdict(report), indent=2) if as_json else str(report))
