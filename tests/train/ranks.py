"""Trainings in several processes without torchrun's seconds of start.

`python -m tests.train.ranks` reads jobs from standard input, one JSON object a line: {"world",
"config", "limit"}. Each is run by `world` processes forked from this one, which has imported
everything and computed nothing. `limit` is the largest file, in bytes, that the last process may
write. It answers with a line for each: the processes' numbers when they have started, and their
exit statuses and errors when they have ended.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

# What training imports when it first needs it, once instead of in every child.
import torch._decomp.decompositions_for_jvp
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401

from mfmjt.errors import MfmjtError
from mfmjt.train.recipe import NetworkTraining, _build
from mfmjt.train.tasks.network import train_network

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    statuses: list[int]
    messages: list[str]


class Ranks:
    """The process that forks; jobs run one at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, world: int, config: NetworkTraining, limit: int | None = None) -> list[int]:
        """Begin a job; the numbers of its processes."""
        assert self.process.stdin is not None
        job = {"world": world, "config": asdict(config), "limit": limit}
        self.process.stdin.write(json.dumps(job) + "\n")
        return self._answer()

    def end(self) -> Ended:
        return Ended(*self._answer())

    def run(self, world: int, config: NetworkTraining, limit: int | None = None) -> Ended:
        self.start(world, config, limit)
        return self.end()

    def train(self, world: int, config: NetworkTraining) -> None:
        ended = self.run(world, config)
        assert ended == Ended([0] * world, []), "\n".join(ended.messages)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _child(rank: int, job: dict[str, Any], port: int, errors: int) -> int:
    if job["world"] > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job["world"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    if job["limit"] and rank == job["world"] - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
    try:
        train_network(_build(NetworkTraining, job["config"], "network"))
    except MfmjtError as error:
        os.write(errors, f"{error}\n".encode())
        return error.exit_code
    except BaseException:
        os.write(errors, f"{traceback.format_exc()}\n".encode())
        return 70
    return 0


def _tell(answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    for line in sys.stdin:
        job, port, children = json.loads(line), _free_port(), []
        read, write = os.pipe()
        for rank in range(job["world"]):
            child = os.fork()
            if not child:
                os._exit(_child(rank, job, port, write))
            children.append(child)
        os.close(write)
        _tell(children)
        with os.fdopen(read) as errors:
            messages = errors.read().splitlines()
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        _tell([statuses, messages])


if __name__ == "__main__":
    main()
