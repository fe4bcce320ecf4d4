"""`mfmjt listen`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mfmjt.cli._common import Debug
from mfmjt.errors import InputError, some

__all__ = ["app"]

app = typer.Typer(help="Ask people: listening tests, and their answers.", no_args_is_help=True)


@app.command()
def build(
    systems: Annotated[list[str], typer.Argument(help="NAME=FOLDER of each system's sounds.")],
    out: Annotated[Path, typer.Option(help="The page; its key is beside it.")] = Path(
        "output/listen.html"
    ),
    kind: Annotated[str, typer.Option(help="preference, rating or abx.")] = "preference",
    clips: Annotated[int, typer.Option(help="Clips in the test.")] = 20,
    most: Annotated[int, typer.Option(help="Questions that one listener gets.")] = 40,
    captions: Annotated[
        Path | None, typer.Option(help="Table with the columns id (or name) and caption.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="System that is also shown as the reference (rating).")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What to ask instead.")] = None,
    seed: Annotated[int, typer.Option(help="Decides clips and order.")] = 0,
    debug: Debug = False,
) -> None:
    """Write one page that holds a blind listening test, and the key that says who made what.

    The page needs no server and no network: send it to listeners, keep the key. Answers stay in the
    listener's browser until they are saved as a file, which they send back.

    For example:
    - `mfmjt listen build ours=output/ours theirs=output/theirs`

    - `mfmjt listen build real=real ours=a theirs=b --kind rating --reference real --out test.html`

    - `mfmjt listen build original=real codec=decoded --kind abx`
    """
    from mfmjt.listen import build as write

    named: dict[str, Path] = {}
    for given in systems:
        name, found, folder = given.partition("=")
        if not (found and name and folder) or name in named:
            raise InputError(
                f"{given!r} names no system, or one that is there already. Give NAME=FOLDER, a "
                "name for each."
            )
        named[name] = Path(folder)
    built = write(
        named, out, kind, clips=clips, most=most, captions=captions, reference=reference,
        question=question, seed=seed,
    )  # fmt: skip
    for name, lacking in built.missing.items():
        typer.echo(f"{name} lacks {len(lacking)} clips: {some(lacking, most=3)}.", err=True)
    size = built.page.stat().st_size / 1e6
    typer.echo(
        f"Wrote {built.page} ({size:.1f} MB): {built.trials} questions on {len(built.clips)} clips."
        f" Keep {built.key} from listeners; `mfmjt listen analyse` needs it."
    )


@app.command()
def analyse(
    answers: Annotated[list[Path], typer.Argument(help="Files that listeners sent.")],
    key: Annotated[Path, typer.Option(help="The key beside the page.")] = Path(
        "output/listen.key.json"
    ),
    json: Annotated[Path | None, typer.Option(help="Write every figure to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Say what listeners preferred, with intervals over clips, and how far they agree.

    For example:
    - `mfmjt listen analyse answers_*.json`

    - `mfmjt listen analyse answers/*.json --key test.key.json --json result.json`
    """
    from mfmjt.files import check_writable
    from mfmjt.listen import analyse as read

    if json is not None:
        check_writable(json)
    result = read(answers, key)
    if json is not None:
        result.save(json)
    typer.echo(result.table().rstrip())
