"""The command that brings a GPU's evidence home: a parent, and a process for each piece of it."""

from __future__ import annotations

__all__ = ["LOST", "file_name"]

LOST = 42
"""Exit status of a piece whose process is of no use any more, though the next one's may be."""


def file_name(piece: str) -> str:
    """Return a piece's name as a file's."""
    return piece.replace(" ", "_")
