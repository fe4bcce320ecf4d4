"""`mfmjt convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mfmjt.cli._common import Debug, defer_interrupts
from mfmjt.errors import InputError

__all__ = ["convert"]


def convert(
    layout: Annotated[
        str,
        typer.Argument(
            help="Of FILE: mmaudio, meanaudio or foleydash (published), or mfmjt (ours)."
        ),
    ],
    file: Annotated[Path, typer.Argument(help="The network to convert.")],
    to: Annotated[
        Path,
        typer.Option(
            help="File to write in the other layout: .safetensors, or .pth for a published one."
        ),
    ],
    config: Annotated[
        str | None,
        typer.Option(help="Name of the configuration, such as small_16k. Default: inferred."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Precision of the stored file: float32, bfloat16 or float16.")
    ] = "float32",
    adapter: Annotated[
        Path | None, typer.Option(help="Merge this adapter.safetensors of a fine-tuning first.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Convert a network from a published layout to ours, or back to the one of its family.

    Weights are read as tensors only; no code in a file is run. Every parameter is accounted for.

    For example:
    - `mfmjt convert mmaudio mmaudio_small_16k.pth --to small_16k.safetensors`

    - `mfmjt convert mmaudio mine.pth --to mine.safetensors --config large_44k_v2`

    - `mfmjt convert meanaudio meanaudio_s_full.pth --to meanaudio_s.safetensors`

    - `mfmjt convert mfmjt mine.safetensors --to mmaudio_mine.pth`
    """
    with defer_interrupts():
        from mfmjt import convert as conversion
        from mfmjt.devices import parse_dtype

    ways = {
        "mmaudio": conversion.from_mmaudio,
        "meanaudio": conversion.from_meanaudio,
        "foleydash": conversion.from_foleydash,
        "mfmjt": conversion.to_published,
    }
    if layout not in ways:
        raise InputError(f"There is no layout {layout!r}. Choose one of {', '.join(ways)}.")
    done = ways[layout](file, to, config, parse_dtype(dtype), adapter)
    for note in done.notes:
        typer.echo(f"Note: {note}", err=True)
    typer.echo(f"Wrote {done.path}: {done.name}, {done.parameters / 1e6:.1f} M parameters.")
