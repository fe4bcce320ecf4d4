"""One of the processes of `mfmjt score`; `listen_to_all` starts it."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mfmjt.errors import InputError, MfmjtError
from mfmjt.evaluate.scoring.work import Job, Listening

__all__: list[str] = []


def _main() -> None:
    """Work on what standard input says, a line for each file that is done; end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    told = json.loads(sys.stdin.readline())
    torch.set_num_threads(1)
    try:
        listening = Listening(Job(**told["job"]))
        for index, path in told["files"]:
            _say(index, asdict(listening(Path(path))))
    except MfmjtError as error:
        _say(None, {"error": str(error), "input": isinstance(error, InputError)})


def _say(index: int | None, result: dict[str, Any]) -> None:
    try:
        sys.stdout.write(json.dumps([index, result]) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the parent has ended
        os._exit(1)


if __name__ == "__main__":
    _main()
