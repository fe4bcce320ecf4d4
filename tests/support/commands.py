"""Commands run as from a shell, in this process."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner, Result

from mfmjt import cli


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def refused(result: Result, exit_code: int, says: str) -> None:
    """The command ended with this status, one line on stderr, nothing else, and no traceback."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert re.fullmatch(r"Error: [^\n]+\n", result.stderr), result.stderr
    assert says in result.stderr
