"""`mfmjt extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mfmjt.cli._common import Debug, Device
from mfmjt.errors import InputError

__all__ = ["extract"]


def extract(
    table: Annotated[
        Path | None,
        typer.Argument(help="The clips: .csv, .tsv, .jsonl, .json or .parquet; docs/data.md."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the feature store.")] = Path(
        "features"
    ),
    media: Annotated[
        Path | None, typer.Option(help="Folder of the files. Default: that of the table.")
    ] = None,
    layout: Annotated[
        str, typer.Option(help="table, or as published: vggsound, audiocaps, esc50 or wavcaps.")
    ] = "table",
    column: Annotated[
        list[str] | None,
        typer.Option(help="OURS=THEIRS, if the table has another name. May be repeated."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Only this split; of a table without splits, the split of all rows."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(help="Codec and encoders: nano, or a folder with these or MMAudio's files."),
    ] = "nano",
    codec: Annotated[
        str | None,
        typer.Option(
            "--codec", "--mode", help="MMAudio's codec: 16k or 44k. Default: what is there."
        ),
    ] = None,
    arithmetic: Annotated[
        str, typer.Option(help="Precision of MMAudio's networks: float32, bfloat16 or float16.")
    ] = "float32",
    sound: Annotated[
        bool, typer.Option("--sound", help="Only sound and captions; frames are not looked at.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="Length of a clip.")] = 8.0,
    shortest: Annotated[
        float | None,
        typer.Option(help="Skip files of fewer seconds; shorter clips are filled up. [seconds]"),
    ] = None,
    pieces: Annotated[
        int, typer.Option(help="Clips that a long file of sound gives at most, with --sound.")
    ] = 1,
    dtype: Annotated[
        str, typer.Option(help="Precision of the stored features: float16 or float32.")
    ] = "float16",
    workers: Annotated[int, typer.Option(help="Threads that decode.")] = 4,
    device: Device = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Then compare all files with their checksums.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Turn videos or sounds with captions into features to train on.

    The same command goes on where it was killed. Files that cannot be used are skipped, and listed
    in `rejects.jsonl`. Started by torchrun, processes and machines share the work.

    For example:
    - `mfmjt extract clips.csv --media videos --out features/mine`

    - `mfmjt extract vggsound.csv --layout vggsound --media VGGSound --model MMAudio --codec 16k`

    - `mfmjt extract train.csv --layout audiocaps --media audiocaps --sound --split train`

    - `mfmjt extract ESC-50/meta/esc50.csv --layout esc50 --media ESC-50 --sound --seconds 5`

    - `mfmjt extract fsd_final.json --layout wavcaps --media FreeSound --sound --pieces 5`

    - `mfmjt extract --out features/mine --verify`

    - `torchrun --nproc-per-node 8 --no-python mfmjt extract clips.parquet --device cuda`
    """
    from mfmjt.devices import parse_dtype
    from mfmjt.extract import run, tables
    from mfmjt.extract.clips import Cut
    from mfmjt.families import open_bundle
    from mfmjt.features import store
    from mfmjt.processes import own_device, rank_and_world

    if verify and rank_and_world()[1] > 1:
        raise InputError("--verify is for one process: leave it out, and run it when all are done.")
    if table is None and not verify:
        raise InputError("Nothing to do. Give a table, or --verify with the --out of a store.")
    if table is not None:
        precision = parse_dtype(arithmetic)
        columns = dict(part.split("=", 1) for part in column or [] if "=" in part)
        if len(columns) < len(column or []):
            raise InputError("A --column is OURS=THEIRS, such as path=filename.")
        cut = Cut(seconds, seconds if shortest is None else shortest, pieces, pictures=not sound)
        settings = run.Settings(cut, dtype, workers, own_device(device))
        # The table is read first: its mistakes are known before gigabytes of weights are.
        rows = tables.read_table(table, layout, media, columns, split)
        bundle = open_bundle(model, False, codec, precision)
        for done in run.extract(rows, out, bundle, settings):
            if done.finished:
                typer.echo(done)
    if verify:
        typer.echo(f"{store.verify(out)} files of {out} are as they were written.")
