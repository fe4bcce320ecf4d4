"""`mfmjt data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mfmjt.cli._common import Debug
from mfmjt.errors import InputError

__all__ = ["app"]

app = typer.Typer(help="Look at the data that models here are trained on.", no_args_is_help=True)


@app.command()
def preview(
    out: Annotated[Path, typer.Argument(help="Folder to write to.")] = Path("demo/preview"),
    clips: Annotated[int, typer.Option(help="How many clips; 12 show each source once.")] = 12,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    seed: Annotated[int, typer.Option(help="Another seed is another endless set.")] = 0,
    size: Annotated[int, typer.Option(help="Pixels along each side of the frames.")] = 256,
    recordings: Annotated[
        Path | None,
        typer.Option(help="Folder of `mfmjt data real`: show the open set made from it."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write clips of the procedural or the open set to watch and hear, and a contact sheet.

    For example:
    - `mfmjt data preview`

    - `mfmjt data preview out --clips 24 --split test`

    - `mfmjt data preview out --recordings corpus`
    """
    from mfmjt.data.preview import preview as write_preview
    from mfmjt.progress import stage_bar

    with stage_bar() as report:
        written = write_preview(
            out,
            clips,
            split,
            seed,
            size,
            recordings,
            lambda done, total: report("Drawing", done / total),
        )
    typer.echo(f"Wrote {len(written)} files to {out}; begin with {written[0]}.")


@app.command()
def real(
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")],
    sources: Annotated[
        Path | None,
        typer.Option(help="Folder with the repositories of the manifest, each named owner+name."),
    ] = None,
    clips: Annotated[
        Path | None,
        typer.Option(help="Table of ready clips, instead of the repositories: a CSV file."),
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="Another manifest than the one in this package.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Only this set; may be repeated.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Build the corpus of real sounds: recordings under free licenses, cut, labeled and credited.

    The manifest says which recordings: repository, commit, file, digest, author and license.
    Without a source of recordings, the repositories are listed.

    For example:
    - `mfmjt data real corpus`

    - `mfmjt data real corpus --sources repositories`

    - `mfmjt data real corpus --sources repositories --set kenney --set nps`

    - `mfmjt data real corpus --clips real_sounds/clips.csv`
    """
    from mfmjt.data import manifest as manifests
    from mfmjt.extract import corpus

    table = manifest or manifests.shipped()
    if sources is not None and clips is None:
        entries = corpus.from_sources(table, sources, sets or ())
    elif clips is not None and sources is None:
        entries = corpus.from_clips(clips, table, sets or ())
    else:
        for name in dict.fromkeys(line.source for line in manifests.read_manifest(table)):
            repository, _, commit = name.partition("@")
            typer.echo(f"https://github.com/{repository}  {commit}")
        raise InputError("Give either --sources, with these repositories in it, or --clips.")
    written = corpus.write(entries, folder)
    told = ", ".join(f"{count:,} {split}" for split, count in sorted(written.items()))
    typer.echo(f"Wrote {written.total():,} clips ({told}) to {folder}.")
