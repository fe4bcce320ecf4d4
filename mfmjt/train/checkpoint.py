"""Training states in shards: every process writes its part while training goes on.

    checkpoints/step-000000500/shard-00001-….safetensors   one file a process and kind of tensor
                               state.json                  the rest, and every file's size
    checkpoints/latest                                     the name of the newest one

`torch.distributed.checkpoint` plans, writes and reads, so a state can be resumed by any number of
processes. Its own format keeps a pickle beside the data; this is its safetensors format, of which
nothing is unpickled. A folder is filled under another name and renamed when all of it is on disk;
then `latest` moves, and what is older than the state before is removed. Killed at any moment, a run
leaves a whole state behind.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from mfmjt.errors import InputError, RunError, reason
from mfmjt.files import atomic_path

__all__ = ["CheckpointFolder"]

FORMAT = "mfmjt-training-2"
STATE, LATEST, PARTIAL = "state.json", "latest", ".partial"


class CheckpointFolder:
    """The states of one training.

    Args:
        folder: Where they are.
        group: Process group for the thread that writes; None for a single process.
        first: Whether this process publishes what all have written.

    Attributes:
        step: Step of the newest state written or read by this run; None before the first.
    """

    def __init__(self, folder: Path, group: Any = None, first: bool = True) -> None:
        self.folder, self.group, self.first = folder, group, first
        self.step: int | None = None
        self._previous: str | None = None
        self._pending: Future[Any] | None = None
        if group is None:
            # What DCP warns of is what a single process wants.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        if first:
            # What killed runs left unfinished would be taken for part of the next state.
            for path in folder.glob(f"*{PARTIAL}"):
                shutil.rmtree(path)

    # Writing

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Copy the state and begin to write it; returns before it is on disk.

        Args:
            step: Optimizer step, which names it.
            tensors: Every tensor of the state, or this process's shards of it (DTensors). Those
                whose names begin alike, up to a dot, share a file.
            state: All else, as JSON values, the same on every process.

        Raises:
            RunError: The save before has failed.
        """
        self.wait()
        self.step = step
        name = f"step-{step:09d}"
        kinds = {key: key.split(".")[0] for key in tensors}
        writer = _Writer(self.folder, name, self._previous, kinds, state)
        # The same on all processes, because a failure anywhere is raised everywhere.
        self._previous = name
        tensors = {key: tensor.detach() for key, tensor in tensors.items()}
        saving = dcp.async_save(
            tensors,
            storage_writer=writer,
            process_group=self.group,
            no_dist=self.group is None,
        )
        assert isinstance(saving, Future)  # our writer copies before it returns
        self._pending = saving

    def wait(self) -> None:
        """Return when the last save is on disk.

        Raises:
            RunError: It could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (CheckpointException, OSError) as error:
            if self.first:
                for path in self.folder.glob(f"*{PARTIAL}"):
                    shutil.rmtree(path, ignore_errors=True)
            raise RunError(
                f"Cannot save the training state in {self.folder}: {_reason(error)}. What "
                "was saved before is whole: make room, and the same command goes on from there."
            ) from error

    # Reading

    def find(self, name: str = LATEST) -> Path | None:
        """Return the folder of a state, `latest` or `step-…`; None if there is no latest.

        Raises:
            InputError: There is no such state.
        """
        if name == LATEST:
            pointer = self.folder / LATEST
            if not pointer.exists():
                return None
            name = pointer.read_text().strip()
        path = self.folder / name
        if not path.is_dir():
            raise InputError(f"There is no training state {path}. {self._advice(name)}")
        return path

    def read(self, path: Path) -> dict[str, Any]:
        """Return what is no tensor of a state, after a look whether its files are whole.

        Raises:
            InputError: A file is missing, cut short or foreign; it is named.
        """
        file = path / STATE
        try:
            record = json.loads(file.read_text())
            if record["format"] != FORMAT:
                raise KeyError("format")
            for name, size in record["files"].items():
                file = path / name
                if (found := file.stat().st_size) != size:
                    raise ValueError(f"it has {found} bytes of {size}")
                with safe_open(file, framework="pt"):
                    pass
            return record["state"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(
                f"Cannot resume from {file}: {_reason(error)}. {self._advice(path.name)}"
            ) from error

    def load(self, path: Path, tensors: dict[str, Tensor], step: int) -> None:
        """Fill `tensors` in place, of whatever shards and devices, from the state at `path`.

        Raises:
            InputError: It holds other tensors.
        """
        try:
            dcp.load(
                dict(tensors),
                storage_reader=HuggingFaceStorageReader(str(path)),
                process_group=self.group,
                no_dist=self.group is None,
            )
        except (CheckpointException, RuntimeError, ValueError) as error:
            raise InputError(
                f"Cannot resume from {path}: {_reason(error)}. {self._advice(path.name)}"
            ) from error
        self.step, self._previous = step, path.name

    def _advice(self, name: str) -> str:
        others = sorted(p.name for p in self.folder.glob("step-*") if p.is_dir())
        others = [other for other in others if other != name and not other.endswith(PARTIAL)]
        earlier = f"Give resume={others[-1]} to go on from an earlier one, or r" if others else "R"
        return f"{earlier}emove {self.folder} to begin again."


class _Writer(HuggingFaceStorageWriter):
    """Writes the files of one process, and publishes the folder when all have finished."""

    def __init__(
        self,
        folder: Path,
        name: str,
        previous: str | None,
        kinds: dict[str, str],
        state: dict[str, Any],
    ) -> None:
        self.folder, self.name, self.previous, self.state = folder, name, previous, state
        self.partial = folder / f"{name}{PARTIAL}"
        # A file is put together in memory, so there is not one for everything.
        files = {kind: i for i, kind in enumerate(sorted(set(kinds.values())), 1)}
        super().__init__(
            str(self.partial),
            {key: files[kind] for key, kind in kinds.items()},
            save_distributed=True,
        )

    def finish(self, metadata: Any, results: Any) -> None:
        """Called on the first process, when the files of all of them are on disk."""
        super().finish(metadata, results)
        files = {path.name: path.stat().st_size for path in sorted(self.partial.iterdir())}
        record = {"format": FORMAT, "files": files, "state": self.state}
        with (self.partial / STATE).open("w") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        _sync(self.partial)
        final, replaced = self.folder / self.name, self.folder / f"replaced{PARTIAL}"
        if final.exists():
            # A run that went on from an earlier state comes to this step a second time.
            final.rename(replaced)
        self.partial.rename(final)
        _sync(self.folder)
        with atomic_path(self.folder / LATEST) as temporary:
            temporary.write_text(f"{self.name}\n")
        for path in self.folder.glob("step-*"):
            if path.name not in (self.name, self.previous):
                shutil.rmtree(path)
        shutil.rmtree(replaced, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Put a folder's entries on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """Return the first cause, in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return reason(error)
