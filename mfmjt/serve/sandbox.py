"""Opens uploads in a process of their own (`mfmjt.serve.sandboxed`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mfmjt.encoders import FrameSpec
from mfmjt.errors import InputError, RunError, reason
from mfmjt.media import Video

__all__ = ["FRAMES", "Sandbox", "load_frames"]

FRAMES = ("frames-0.npy", "frames-1.npy")
_KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_ANSWER = 64 * 1024  # bytes, at most, that a child has to say


class Sandbox:
    """Starts the processes, a bounded number at once, and kills those that take too long.

    Args:
        workers: Processes at once.
        seconds: Wall time of each at most.
        memory: Bytes of each at most, in addition to what an idle one takes.
        specs: The frames that the encoders take.
    """

    def __init__(
        self, workers: int, seconds: float, memory: int, specs: Sequence[FrameSpec]
    ) -> None:
        self._slots = asyncio.Semaphore(workers)
        self._seconds, self._memory, self._specs = seconds, memory, specs

    async def read(self, folder: Path, duration: float | None, limit: float) -> dict[str, Any]:
        """Read the file `upload` of a folder; its frames are then in `FRAMES` beside it.

        Args:
            folder: Where the upload is.
            duration: Seconds of it from the start; None for all.
            limit: Longest duration in seconds of what is read as a whole.

        Returns:
            `duration`, `fps`, `width`, `height` and `notes` of the video, and `containers`: the
            suffixes of the files that `mux` can write.

        Raises:
            InputError: The file cannot be used.
        """
        asked = {"do": "read", "duration": duration, "limit": limit, "specs": self._specs}
        return await self._run(folder, asked)

    async def mux(self, folder: Path, sound: str, output: str) -> list[str]:
        """Write the upload's video stream with another sound to `output` in the same folder.

        Returns:
            One line each on what of the upload is not in the output.

        Raises:
            InputError: The container cannot hold the video stream as it is.
        """
        answer = await self._run(folder, {"do": "mux", "sound": sound, "output": output})
        notes: list[str] = answer["notes"]
        return notes

    async def _run(self, folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
        request = asked | {"memory": self._memory, "seconds": self._seconds}
        async with self._slots:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "mfmjt.serve.sandboxed",
                cwd=folder,
                # No secret of the server's environment; the same code and libraries as here.
                env={
                    **{name: os.environ[name] for name in _KEPT if name in os.environ},
                    "PATH": os.defpath,
                    "PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p),
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                    "MALLOC_ARENA_MAX": "2",
                },
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
                limit=_ANSWER,
            )
            try:
                said = await asyncio.wait_for(_talk(process, request), self._seconds)
            except (TimeoutError, asyncio.TimeoutError):
                raise InputError(
                    f"The file could not be read within {self._seconds:g} s. Give a shorter or "
                    "smaller video."
                ) from None
            finally:
                await _end(process)
        try:
            answer: dict[str, Any] = json.loads(said)
        except ValueError:
            # Killed by a limit, or crashed: what the file did to the decoder stayed there.
            slow = process.returncode == -signal.SIGALRM
            what = "looking through its index took too long" if slow else "its decoder ended early"
            raise InputError(
                f"The file could not be read: {what}. Convert the video to H.264, or give a "
                "smaller one."
            ) from None
        if "refused" in answer:
            raise InputError(answer["refused"])
        return answer


def load_frames(folder: Path, found: dict[str, Any]) -> Video:
    """Load what the sandbox read, for the pipeline.

    Raises:
        RunError: The files are not there any more.
    """
    try:
        frames = tuple(np.load(folder / name, allow_pickle=False) for name in FRAMES)
    except (OSError, ValueError) as error:
        raise RunError(
            f"The frames of the video are gone: {reason(error)}. Send it again."
        ) from error
    return Video(
        frames,
        found["duration"],
        found["fps"],
        found["width"],
        found["height"],
        tuple(found["notes"]),
    )


async def _talk(process: asyncio.subprocess.Process, request: dict[str, Any]) -> bytes:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(ConnectionError):
        process.stdin.write(json.dumps(request).encode())
        await process.stdin.drain()
    process.stdin.close()
    try:
        return await process.stdout.readline()
    except ValueError:  # more than `_ANSWER` without an end
        return b""


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill the process and what it may have started; wait until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await asyncio.shield(process.wait())
