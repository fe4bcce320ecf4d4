"""The example clips, drawn by the procedural set: no file of them ships."""

from __future__ import annotations

import threading
from pathlib import Path

from mfmjt.data.foley import CLASSES, clip
from mfmjt.data.preview import write_clip

__all__ = ["EXAMPLES", "Examples"]

EXAMPLES = {
    "ball_wood": "A wooden ball",
    "footsteps": "Footsteps",
    "bell": "A bell",
}
"""Name of a class -> what the page calls it."""


class Examples:
    """Silent clips of 8 s, each drawn when it is first requested.

    Args:
        folder: Where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def path(self, name: str) -> Path:
        """Return the file of a clip in `EXAMPLES`."""
        path = self._folder / f"{name}.mp4"
        with self._lock:
            if not path.exists():
                drawn = clip(CLASSES.index(name), "test", size=256)
                assert drawn.frames is not None
                write_clip(path, drawn.frames, None)
        return path
