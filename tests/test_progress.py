from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from mfmjt.progress import ProgressBar, stage_bar

WORK = """
from mfmjt.progress import ProgressBar, stage_bar
with ProgressBar("knit", 8, 2, "rows") as bar:
    bar.update(4, "loss [red],")
    bar.message("half [bold]")
with stage_bar({"a": "Casting", "b": "Purling"}) as report:
    report("a", 1.0)
    report("b", 0.5)
"""


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("knit", 8, 2, "rows") as bar:
        assert not bar.due()
        bar.update(5, "loss 0.5,")
        bar.message("a note")
    with stage_bar() as report:
        report("purl", 0.5)
    note, line = capsys.readouterr().err.splitlines()
    assert note == "a note"
    assert re.fullmatch(r"knit 5/8 \(62%\) loss 0.5, [\d.e+]+ rows/s, 0:00:00 left", line)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.1])
def test_time_that_is_left(capsys: pytest.CaptureFixture[str], fraction: float) -> None:
    with ProgressBar("knit", 100, 10) as bar:
        bar.began -= 600
        bar.update(30, fraction=fraction)
    # 20 steps took 10 minutes. In all 30 took 15, which is half of the budget.
    share, left = ("50%", "0:15:00") if fraction == 0.5 else ("30%", "0:35:00")
    assert f"({share}) 0.0333 steps/s, {left} left" in capsys.readouterr().err


def test_another_process_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("knit", 8, quiet=True) as bar:
        bar.update(8)
        bar.message("a note")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rich", [True, False])
def test_a_bar_on_a_terminal(rich: bool) -> None:
    hidden = "" if rich else "import sys; sys.modules['rich.console'] = None\n"
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", hidden + WORK],
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ) as process:
        os.close(theirs)
        shown = b""
        while block := _read(ours):
            shown += block
    os.close(ours)
    assert process.returncode == 0, shown
    text = re.sub(r"\x1b\[[\d;?]*\w", "", shown.decode())
    assert "half [bold]" in text
    assert "knit" in text
    assert "4/8 (50%) loss" in text
    assert ("Purling" in text) == ("━" in text) == rich


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 2**16)
    except OSError:  # how Linux says that the other side is closed
        return b""
