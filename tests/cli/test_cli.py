from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.commands import refused, run

COMMANDS = (
    *("generate", "check", "serve", "extract", "train", "evaluate", "convert"),
    *("info", "data preview", "data real"),
)


def test_the_unexpected(here: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("mfmjt.pipeline.Pipeline.from_pretrained", fails)
    result = run("generate", clip)
    refused(result, 1, "ZeroDivisionError: two lines")
    assert "--debug" in result.stderr
    result = run("generate", clip, "--debug")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert list(here.iterdir()) == []


def test_debug_shows_where_an_error_is_from(here: Path) -> None:
    result = run("generate", "missing.mp4", "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert "no file missing.mp4" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "kill"])
def test_interrupted(here: Path, clip: Path, model_folder: Path, number: int) -> None:
    command = [sys.executable, "-m", "mfmjt.cli", "generate", str(clip), "-o", "out.mp4"]
    command += ["--model", str(model_folder), "--steps", "1000", "--device", "cpu"]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        # A shell's background job ignores Ctrl-C, and tests may run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    libraries = Path(f"/proc/{process.pid}/maps")
    while "libsndfile" not in libraries.read_text():  # the command's own imports have begun
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert stderr.count("\n") == (1 if number == signal.SIGINT else 0), stderr
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"mfmjt {command}" in re.sub(r"\s+", " ", result.stdout.split("xample", 1)[1])


def test_help_is_quick_to_come() -> None:
    heavy = "torch", "numpy", "av", "matplotlib"
    code = (
        "import sys; sys.argv = ['mfmjt', '--help']\n"
        "from mfmjt.cli import main\n"
        "try: main()\n"
        f"except SystemExit: sys.exit(any(m in sys.modules for m in {heavy}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    "arguments", [["unknown"], ["train"], ["generate", "--seed"], ["data", "preview", "--split"]]
)
def test_misuse_of_the_command_line(arguments: list[str]) -> None:
    refused(run(*arguments), 2, "mfmjt --help")


def test_train_reports_misuse() -> None:
    refused(run("train", "nonsense"), 2, "nonsense")
    refused(run("train", "network", "nowhere.json"), 2, "nowhere.json")
    refused(run("train", "network", "nano", "stepz=3"), 2, "steps")
    refused(run("train", "network", "stepz=3"), 2, "steps")


def test_preview(here: Path) -> None:
    result = run("data", "preview", "out", "--clips", "1", "--size", "32")
    assert result.exit_code == 0, result.output
    assert (here / "out" / "sheet.png").is_file()
    refused(run("data", "preview", "out", "--clips", "1", "--size", "31"), 2, "size")


def test_info() -> None:
    result = run("info")
    assert result.exit_code == 0
    for told in ("torch", "CPU", "Precision", "GPU", "adaln", "matplotlib"):
        assert told in result.stdout


def test_ends_quietly_when_nobody_reads_its_output():
    command = [sys.executable, "-m", "mfmjt.cli", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, stderr = process.communicate()
    assert (process.returncode, stderr) == (1, b"")
