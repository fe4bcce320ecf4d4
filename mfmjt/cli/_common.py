"""Options that several commands have, and what protects their imports."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

__all__ = ["Debug", "Device", "Fps", "defer_interrupts"]


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
