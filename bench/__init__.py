"""Benchmarks: `python -m bench --help`."""

from __future__ import annotations

import argparse

__all__ = ["parser"]


def parser(command: str, about: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m bench COMMAND`.

    Args:
        command: Its name.
        about: The module's docstring, with examples at its end under "Examples:".
    """
    text, _, examples = (about or "").partition("Examples:")
    return argparse.ArgumentParser(
        prog=f"python -m bench {command}",
        description=text,
        epilog=f"examples:{examples}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
