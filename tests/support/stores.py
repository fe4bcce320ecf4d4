"""Feature stores as their files."""

from __future__ import annotations

from pathlib import Path


def files(store: Path) -> dict[str, bytes]:
    """The content of every file of a store, half-written ones included, by its name."""
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}


def listed(store: Path) -> list[str | bytes]:
    """The same as one list, in order of names."""
    return [part for name, content in sorted(files(store).items()) for part in (name, content)]
