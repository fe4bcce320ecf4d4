"""One file per op: the cases on which it is timed, what they cost, and the peers beside it."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence

from mfmjt.errors import InputError

__all__ = ["OPS", "named", "named_ops"]

OPS = tuple(sorted(name for _, name, _ in pkgutil.iter_modules(__path__)))
"""Names of the ops that have a file here."""


def named(names: str | None, choices: Sequence[str], kind: str) -> tuple[str, ...]:
    """Return the names of a list with commas; all choices where none are given.

    Raises:
        InputError: One is no choice.
    """
    found = tuple(names.split(",")) if names else tuple(choices)
    if unknown := [name for name in found if name not in choices]:
        raise InputError(f"There is no {kind} {unknown[0]}. Choose from {', '.join(choices)}.")
    return found


def named_ops(names: str | None) -> tuple[str, ...]:
    """Return the ops of a list with commas; all where none are given.

    Raises:
        InputError: One has no benchmark.
    """
    return named(names, OPS, "benchmark of")
