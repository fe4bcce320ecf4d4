"""Benchmarks: `python -m bench --help`."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["ROOT", "parser"]

ROOT = Path(__file__).parents[1]
"""The source tree."""


def parser(
    command: str, about: str | None, out: str | None = None, smoke: bool = False
) -> argparse.ArgumentParser:
    """Return the parser of `python -m bench COMMAND`, with the options that many commands have.

    Args:
        command: Its name.
        about: The module's docstring, with examples at its end under "Examples:".
        out: Folder of the results where --out is not given; "" if it must be; None: no --out.
        smoke: It has --smoke.
    """
    text, _, examples = (about or "").partition("Examples:")
    usage = argparse.ArgumentParser(
        prog=f"python -m bench {command}",
        description=text,
        epilog=f"examples:{examples}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if out is not None:
        about = f"folder of the results{f' [{out}]' if out else ''}"
        usage.add_argument("--out", type=Path, default=out or None, required=not out, help=about)
    if smoke:
        usage.add_argument("--smoke", action="store_true", help="everything tiny, to see it run")
    return usage
