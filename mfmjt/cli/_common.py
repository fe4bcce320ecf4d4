"""Options that several commands have, and what protects their imports."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

__all__ = [
    "Debug",
    "Device",
    "Dtype",
    "Fps",
    "Guidance",
    "LowMemory",
    "Mode",
    "Model",
    "Steps",
    "defer_interrupts",
]


def _remember(ctx: typer.Context, debug: bool) -> bool:
    if debug:
        ctx.find_root().obj = True
    return debug


Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_remember)
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda where there is one.")
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Precision of the network: float32, bfloat16 or float16; auto is bfloat16 where the "
        "device has instructions for it, else float32."
    ),
]
LowMemory = Annotated[
    bool,
    typer.Option(
        "--low-memory", help="Read each part of the model when it is needed, and free it after."
    ),
]
Model = Annotated[
    str,
    typer.Option(
        help="A model that ships, a folder with one or with MMAudio's files, the file of a "
        "network in such a folder, or owner/name on Hugging Face's hub."
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(help="Evaluations of the network. Default: 1; 25 for one of flow matching."),
]
Guidance = Annotated[
    float | None,
    typer.Option(help="Strength of guidance; 1 is none. Default: 1.5; 4.5 for flow matching."),
]
Mode = Annotated[
    str | None,
    typer.Option(help="cfg_scaled, cfg or none. Default: cfg_scaled; cfg for flow matching."),
]
Fps = Annotated[
    str | None,
    typer.Option(help="Frames per second of a folder or pattern. Default: 25.", metavar="N"),
]


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back while libraries load: native ones, interrupted half-way, crash."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt
