"""One file per op: the cases on which it is timed, what they cost, and the peers beside it."""

from __future__ import annotations

import pkgutil

from mfmjt.errors import InputError

__all__ = ["OPS", "named_ops"]

OPS = tuple(sorted(name for _, name, _ in pkgutil.iter_modules(__path__)))
"""Names of the ops that have a file here."""


def named_ops(names: str | None) -> tuple[str, ...]:
    """Return the ops of a list with commas; all where none are given.

    Raises:
        InputError: One has no benchmark.
    """
    ops = tuple(names.split(",")) if names else OPS
    if unknown := [op for op in ops if op not in OPS]:
        raise InputError(
            f"There is no benchmark of {', '.join(unknown)}. Choose from {', '.join(OPS)}."
        )
    return ops
