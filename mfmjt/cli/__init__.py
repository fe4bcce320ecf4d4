"""The command line, one file a command.

Heavy imports happen inside the commands, so that `mfmjt --help` is quick.
"""

from __future__ import annotations

import select
import signal
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from mfmjt.cli import (
    check,
    convert,
    data,
    evaluate,
    experiment,
    extract,
    generate,
    info,
    listen,
    score,
    serve,
    train,
)
from mfmjt.errors import MfmjtError, reason, short

__all__ = ["app", "main"]

INTERRUPTED = 130  # what shells report for a process that Ctrl-C ended


class _Commands(TyperGroup):
    """Turns every way a command can end into an exit status and at most one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("Interrupted. No output was left half-written.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if isinstance(error, BrokenPipeError) and stdout_closed():
                raise  # the parser of arguments ends quietly, as for `mfmjt info | head -1`
            if hasattr(error, "format_message"):  # misuse found by the parser of arguments
                if not error.format_message():
                    raise  # a command without arguments, which shows its help
                message = short(" ".join(error.format_message().split()).rstrip("."), 500)
                typer.echo(f"Error: {message}. See 'mfmjt --help'.", err=True)
                raise typer.Exit(2) from None
            if ctx.obj is True:
                traceback.print_exc()
            if isinstance(error, MfmjtError):
                typer.echo(f"Error: {error}", err=True)
                raise typer.Exit(error.exit_code) from None
            if ctx.obj is not True:
                why = f"{type(error).__name__}: {reason(error, whole=True)}"
                typer.echo(
                    f"Error: mfmjt failed unexpectedly ({why}). "
                    "Run the command again with --debug for the traceback.",
                    err=True,
                )
            raise typer.Exit(1) from None


def stdout_closed() -> bool:
    """Return whether the reader of standard output has gone; another pipe may have broken."""
    output = select.poll()
    output.register(1, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


app = typer.Typer(
    cls=_Commands,
    help="Sound for video and text, by one step of a multimodal MeanFlow transformer.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for _command in (
    generate.generate,
    check.check,
    serve.serve,
    extract.extract,
    train.train,
    evaluate.evaluate,
    experiment.experiment,
    score.score,
    convert.convert,
    info.info,
):
    app.command()(_command)
app.add_typer(data.app, name="data")
app.add_typer(listen.app, name="listen")


def main() -> None:
    """Run the command line; the entry point of the installed `mfmjt`."""
    # SIGTERM, too, runs the clean-up of files that are being written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app(prog_name="mfmjt")
