"""`mfmjt serve`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from mfmjt.cli._common import Debug, Device, Dtype, LowMemory, Model
from mfmjt.errors import InputError
from mfmjt.serve.settings import Settings

__all__ = ["TOKEN", "serve"]

TOKEN = "MFMJT_TOKEN"
"""Variable of the environment that holds the token, where others cannot list it."""


def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.")] = 8000,
    model: Model = "nano",
    device: Device = None,
    dtype: Dtype = "auto",
    low_memory: LowMemory = False,
    max_duration: Annotated[float, typer.Option(help="Longest sound, in seconds.")] = 30.0,
    max_upload: Annotated[int, typer.Option(help="Largest upload, in MB.")] = 100,
    workers: Annotated[int, typer.Option(help="Uploads that are read at the same time.")] = 2,
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="A host name, or NAME:PORT, under which browsers reach the server, such as a "
            "proxy's. May be repeated."
        ),
    ] = None,
    root_path: Annotated[
        str, typer.Option(help="Path under which a proxy shows the server, such as /foley.")
    ] = "",
    debug: Debug = False,
) -> None:
    """Serve a page to drop a video on, and an HTTP API.

    Other machines reach it only with --host. Set MFMJT_TOKEN to a secret, and requests must carry
    it.

    For example:
    - `mfmjt serve`

    - `mfmjt serve --port 9000 --model weights/mmaudio_small_16k.pth --max-duration 60`

    - `MFMJT_TOKEN=... mfmjt serve --host 0.0.0.0`

    - `mfmjt serve --name sound.example.org --root-path /foley`
    """
    settings = Settings(
        host,
        port,
        os.environ.get(TOKEN) or None,
        tuple(name or ()),
        max_duration,
        max_upload * 2**20,
        workers,
        root_path=root_path,
    )
    try:
        from mfmjt.devices import parse_dtype_or_auto
        from mfmjt.serve.guard import is_local
        from mfmjt.serve.server import serve as run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "mfmjt":
            raise
        raise InputError(
            f"Serving needs {error.name}, which is not installed. Run: pip install 'mfmjt[web]'"
        ) from error
    if not is_local(host) and settings.token is None:
        typer.echo(
            f"Warning: whoever reaches {host} can use this server. Set {TOKEN} to ask for a token.",
            err=True,
        )
    run(
        settings,
        model,
        lambda address: typer.echo(f"Serving {model} at {address}"),
        device=device,
        dtype=parse_dtype_or_auto(dtype),
        low_memory=low_memory,
    )
