"""Draw the clips of this folder anew: silent test clips of the procedural set, 8 s, 256x256."""

from __future__ import annotations

from pathlib import Path

from mfmjt.data.foley import CLASSES, clip
from mfmjt.data.preview import write_clip

SOURCES = ("ball_wood", "footsteps", "bell")


def main() -> None:
    """Write one clip of each source beside this file."""
    for source in SOURCES:
        drawn = clip(CLASSES.index(source), "test", size=256)
        assert drawn.frames is not None
        write_clip(Path(__file__).with_name(f"{source}.mp4"), drawn.frames, None)


if __name__ == "__main__":
    main()
