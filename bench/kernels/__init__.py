"""One file per op: the cases on which it is timed, what they cost, and the peers beside it."""

from __future__ import annotations

import pkgutil

from mfmjt.errors import InputError

__all__ = ["bench_files", "named_ops"]


def bench_files() -> tuple[str, ...]:
    """Names of the ops that have a file here."""
    found = (name for _, name, _ in pkgutil.iter_modules(__path__))
    return tuple(name.removeprefix("bench_") for name in sorted(found) if name[:6] == "bench_")


def named_ops(names: str | None) -> tuple[str, ...]:
    """Ops of a list with commas; all where none are given.

    Raises:
        InputError: One has no benchmark.
    """
    known = bench_files()
    ops = tuple(names.split(",")) if names else known
    unknown = [op for op in ops if op not in known]
    if unknown:
        raise InputError(
            f"There is no benchmark of {', '.join(unknown)}. Choose from {', '.join(known)}."
        )
    return ops
