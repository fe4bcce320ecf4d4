from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.clips import write_video
from tests.support.damage import mutate

MUTATIONS, MANY = 40, 180
SECONDS = 120  # for 40 of them, on a machine that does much else; alone they take about two
# Suffix -> encoder; each is a reader of FFmpeg's, and a way of ours to find times.
KINDS = {
    ".mp4": "libx264",
    ".mkv": "libx264",
    ".avi": "mpeg4",
    ".ts": "libx264",
    ".h264": "libx264",
    ".webm": "libvpx-vp9",
    ".mov": "prores_ks",
}

# In a process of its own: a decoder that crashed would take the other tests along.
SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from mfmjt.errors import MfmjtError
from mfmjt.media import check, mux, read_video

ends = {}
for name in sys.argv[2:]:
    ends[name] = "refused"
    out = Path(sys.argv[1]) / (Path(name).stem + (".mkv" if len(ends) % 2 else ".mov"))
    try:
        report = check(name)
        assert "\\n" not in "".join(report.notes)
    except MfmjtError as error:
        assert "\\n" not in str(error)
    try:
        video = read_video(name, limit=60.0)
        assert all(f.shape[1:] == (64, 64, 3) and len(f) for f in video.frames)
        mux(name, np.zeros((1, round(video.duration * 16000)), np.float32), 16000, out)
        ends[name] = "used"
    except MfmjtError as error:
        assert "\\n" not in str(error)
        assert not out.exists()
print(json.dumps(ends))
"""


def judge(folder: Path, suffix: str, seeds: range) -> None:
    """Read, check and copy mutations of a file: each is used or refused, and nothing is left."""
    options = {"movflags": "faststart"} if suffix == ".mp4" else {}
    sound = suffix in (".mp4", ".mkv", ".ts")
    whole = write_video(
        folder / f"whole{suffix}",
        frames=20,
        sound=sound,
        options=options,
        codec=KINDS[suffix],
        pixels="yuv422p10le" if suffix == ".mov" else "yuv420p",
    )
    content = whole.read_bytes()
    files = []
    for seed in seeds:
        path = folder / f"mutation{seed}{suffix}"
        path.write_bytes(mutate(content, seed))
        files.append(str(path))
    (folder / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder / "out"), *files],
        capture_output=True,
        text=True,
        timeout=SECONDS * len(seeds) / MUTATIONS,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ends = json.loads(done.stdout)
    assert len(ends) == len(seeds)
    assert "used" in ends.values()  # else the mutations are too strong
    if suffix not in (".ts", ".h264"):  # of which something can always be read
        assert "refused" in ends.values()  # else they are too weak
    left = {p.stem for p in (folder / "out").iterdir()}
    assert left == {Path(name).stem for name, end in ends.items() if end == "used"}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_damaged_files_are_used_or_refused(tmp_path: Path, suffix: str) -> None:
    judge(tmp_path, suffix, range(MUTATIONS))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", KINDS)
def test_many_damaged_files_are_used_or_refused(tmp_path: Path, suffix: str) -> None:
    judge(tmp_path, suffix, range(MUTATIONS, MUTATIONS + MANY))
