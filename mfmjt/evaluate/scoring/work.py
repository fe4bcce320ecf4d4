"""Features of many files, in several processes, each kept in a file of its own.

A feature is kept under the digest of the sound file, that of the weights and what else it depends
on, so a cache is never stale, and work that was interrupted goes on where it was. Each clip is
computed alone and by one thread: neither the other clips nor the number of processes change a bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from mfmjt.errors import InputError, RunError, reason, short
from mfmjt.evaluate.listening import LISTENERS, Networks, file_digest
from mfmjt.evaluate.scoring.reading import Clip, benchmark_wave, read_clip
from mfmjt.files import atomic_path

__all__ = ["Done", "Job", "Listening", "Store", "listen_to_all", "one_thread", "processes"]

VERSION = "1"
"""Of what comes before the networks: a change of the front end makes new caches."""
FEWEST = 8
"""Clips below which another process costs more time than it saves."""
MOST = 8
"""Processes that are started unless more are asked for: each takes about 1.6 GiB."""


@dataclass(frozen=True)
class Job:
    """What is computed of every file.

    Attributes:
        cache: Folder of the features.
        networks: Names of the networks -> digest of their weights.
        weights: Folder of the weight files.
        check: As for `Networks`.
        seconds: That are judged of a clip.
        benchmark: Whether files are read as av-benchmark reads them.
        device: Where the networks compute.
        videos: The files are videos, to be watched.
    """

    cache: str
    networks: dict[str, str]
    weights: str | None
    check: Any
    seconds: float
    benchmark: bool
    device: str = "cpu"
    videos: bool = False


@dataclass(frozen=True)
class Done:
    """What became of one file.

    Attributes:
        digest: Of its content.
        rate: In Hz.
        channels: Number of them.
        seconds: Its length.
        problem: Why it is not scored; empty if it is.
        unheard: Networks for which it is too short, in the protocol of av-benchmark.
    """

    digest: str
    rate: int
    channels: int
    seconds: float
    problem: str
    unheard: tuple[str, ...] = ()


class Store:
    """Features of sound files, by the digests of the files.

    Args:
        job: What they depend on.
    """

    def __init__(self, job: Job) -> None:
        how = f"{'av-benchmark' if job.benchmark else 'default'}-{job.seconds:g}s-{VERSION}"
        kind = "-video" if job.videos else ""
        self._facts = Path(job.cache, "clips", how)
        self._folders = {
            name: Path(job.cache, f"{name}-{digest[:16]}{kind}", how)
            for name, digest in job.networks.items()
        }

    def _path(self, network: str, digest: str) -> Path:
        return self._folders[network] / digest[:2] / f"{digest}.safetensors"

    def has(self, network: str, digest: str) -> bool:
        """Return whether features are kept."""
        return self._path(network, digest).is_file()

    def read(self, network: str, digest: str) -> dict[str, np.ndarray]:
        """Return features as arrays by name.

        Raises:
            InputError: The file is damaged, or gone.
        """
        path = self._path(network, digest)
        try:
            return load_file(path)
        except Exception as error:  # what is in the file decides what a parser raises
            raise InputError(
                f"{path} is damaged or gone. Delete it and run again: it is computed again."
            ) from error

    def keep(self, network: str, digest: str, features: dict[str, np.ndarray]) -> None:
        """Write features, whole or not at all."""
        path = self._path(network, digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file({k: np.ascontiguousarray(v) for k, v in features.items()}, temporary)

    def facts(self, digest: str) -> dict[str, Any] | None:
        """Return what is known of a file that was read before."""
        path = self._facts / digest[:2] / f"{digest}.json"
        return dict(json.loads(path.read_text())) if path.is_file() else None

    def keep_facts(self, digest: str, facts: dict[str, Any]) -> None:
        """Write what is known of a file."""
        path = self._facts / digest[:2] / f"{digest}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(facts))


class Listening:
    """One process: it reads files and computes the features that are not there yet."""

    def __init__(self, job: Job) -> None:
        self.job, self.store = job, Store(job)
        self.networks = Networks(job.weights, job.check, job.device)

    def __call__(self, path: Path) -> Done:
        """Read a file and compute what is missing."""
        try:
            digest = file_digest(path)
        except OSError as error:
            return Done("", 0, 0, 0.0, f"it cannot be read: {error.strerror}")
        if self.job.videos:
            return self._watch(path, digest)
        facts = self.store.facts(digest)
        clip: Clip | None = None
        if facts is None:
            clip = read_clip(path, self.job.seconds, self.job.benchmark)
            facts = {
                "rate": clip.rate,
                "channels": clip.channels,
                "seconds": clip.seconds,
                "problem": clip.problem,
            }
            self.store.keep_facts(digest, facts)
        if facts["problem"]:
            return Done(digest, **facts)
        unheard = []
        for name in self.job.networks:
            if facts["seconds"] < self._shortest(name):
                unheard.append(name)
            elif not self.store.has(name, digest):
                rate, seconds = LISTENERS[name].rate, self.job.seconds
                if self.job.benchmark and LISTENERS[name].watch is not None:
                    wave = benchmark_wave(path, name, rate, seconds)
                else:
                    clip = clip or read_clip(path, seconds, self.job.benchmark)
                    wave = clip.at(rate, seconds, exact=not self.job.benchmark)
                self.store.keep(name, digest, self.networks.listen(name, wave))
        return Done(digest, **facts, unheard=tuple(unheard))

    def _shortest(self, name: str) -> float:
        """Seconds that a network needs; of which in the default protocol all clips have enough."""
        if not self.job.benchmark:
            return 0.0
        return self.job.seconds if name == "synchformer" else LISTENERS[name].shortest

    def _watch(self, path: Path, digest: str) -> Done:
        """Compute what is missing of a video."""
        for name in self.job.networks:
            if not self.store.has(name, digest):
                try:
                    features = self.networks.watch(name, path, self.job.seconds)
                except InputError as error:
                    return Done(digest, 0, 0, 0.0, reason(error))
                self.store.keep(name, digest, features)
        return Done(digest, 0, 0, self.job.seconds, "")


def processes(asked: int | None, files: int, device: str) -> int:
    """Return how many processes listen: one for each thread of PyTorch's unless asked otherwise.

    Raises:
        InputError: Fewer than one.
    """
    if asked is not None and asked < 1:
        raise InputError(f"{asked} workers cannot work: give 1 or more.")
    if asked is None:
        asked = 1 if device != "cpu" else min(MOST, torch.get_num_threads())
    return max(1, min(asked, files // FEWEST))


def listen_to_all(
    job: Job, files: Sequence[Path], workers: int, tell: Callable[[int], None]
) -> list[Done]:
    """Compute the features of files that are not kept yet.

    Args:
        job: What is computed.
        files: Files of sound.
        workers: Processes.
        tell: Called with the number of files that are done.

    Raises:
        RunError: A process ended before its work.
    """
    done: dict[int, Done] = {}

    def note(index: int, result: Done) -> None:
        done[index] = result
        tell(len(done))

    if workers == 1:
        with one_thread(job.device):
            listening = Listening(job)
            for i, path in enumerate(files):
                note(i, listening(path))
    else:
        shares = [range(i, len(files), workers) for i in range(workers)]
        _work_together(job, [[(i, files[i]) for i in share] for share in shares], note)
    return [done[i] for i in range(len(files))]


def _work_together(
    job: Job, shares: list[list[tuple[int, Path]]], note: Callable[[int, Done], None]
) -> None:
    """Give each share of the files to a process of its own; if one fails, end all."""
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(shares)))
        running = []
        for share in shares:
            said = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = _start(said)
            stack.enter_context(process)
            stack.callback(process.kill)
            running.append((pool.submit(_follow, process, job, share, note), process, said))
        for following, process, said in running:
            following.result()
            if code := process.wait():
                said.seek(0)
                lines = said.read().strip().splitlines()
                why = short(lines[-1], 300) if lines else "there may not be enough memory"
                raise RunError(
                    f"A process that computes features ended with status {code}: {why}. Run the "
                    "command again: what was computed is kept. Fewer workers need less memory."
                )


@contextlib.contextmanager
def one_thread(device: str) -> Iterator[None]:
    """Compute with one thread, as every process does, so that results have the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start(said: IO[str]) -> subprocess.Popen[str]:
    """Start a process, whose errors go to the file `said`."""
    return subprocess.Popen(
        [sys.executable, "-m", "mfmjt.evaluate.scoring.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _follow(
    process: subprocess.Popen[str],
    job: Job,
    share: list[tuple[int, Path]],
    note: Callable[[int, Done], None],
) -> None:
    """Give a process its share, and note what it says is done."""
    assert process.stdin is not None
    assert process.stdout is not None
    told = {"job": asdict(job), "files": [(i, str(path)) for i, path in share]}
    with contextlib.suppress(BrokenPipeError):  # its status says why
        process.stdin.write(json.dumps(told) + "\n")
        process.stdin.close()
    for line in process.stdout:
        index, result = json.loads(line)
        if index is None:
            raise (InputError if result["input"] else RunError)(result["error"])
        note(index, Done(**{**result, "unheard": tuple(result["unheard"])}))
