"""The one writer of feature stores: in parts, resumable, shared by any number of processes.

A store has a folder for each split. A split has parts, and an index once all of them are there:

part         safetensors: `mean`, `logvar` (n, N, C) of n clips; with frames also `video` (n, V, Dv)
             and `sync` (n, S, Ds). Its header has what they were made with, the clips and a
             checksum of all of that and of the tensors
text part    safetensors: `text` (n, L, D), each distinct caption once, the empty one first
index.json   the names of the parts in order, the captions and what else is known of the clips, and
             the mean and standard deviation (C,) of the latents as they will be sampled

A part depends only on its items and on the store's source, and appears whole or not at all. So a
run that was killed goes on with the missing parts, any number of processes and machines with a
common folder share them without a message, and the store is the same, byte for byte, as if nothing
had happened. Whichever process finds all parts done writes the index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfmjt.errors import InputError
from mfmjt.features.format import FORMAT, INDEX, Part, write_part
from mfmjt.files import atomic_path
from mfmjt.processes import rank_and_world, share
from mfmjt.progress import ProgressBar

__all__ = ["Job", "Writer", "latent_statistics"]


class Job(NamedTuple):
    """One part to be made.

    Attributes:
        path: The part's file.
        items: What it is made of.
        names: What identifies each item, as JSON can hold it; None where the store's source and
            their number say it.
        states: What else decides on the features, such as whether a file was there.
    """

    path: Path
    items: Sequence[Any]
    names: Sequence[Any] | None = None
    states: Sequence[Any] = ()

    def header(self) -> dict[str, str]:
        """Return what the part's header says of the items."""
        if self.names is None:
            return {}
        return {
            "items": self.digest(),
            "count": str(len(self.items)),
            "state": _sha256(self.states),
        }

    def digest(self, count: int | None = None) -> str:
        """Return a digest of the names of all items, or of the first `count`."""
        return _sha256([json.dumps(name) for name in (self.names or ())[:count]])


class Writer:
    """Writes one split of a store; every process has its own.

    Args:
        folder: Folder of the split; it must be there.
        source: What the features are made with, as JSON can hold it: parts of another source are
            not mixed in.
        option: How the user names another folder, for messages.
    """

    def __init__(self, folder: Path, source: dict[str, Any], option: str) -> None:
        self.folder, self.source, self.option = folder, source, option

    def jobs(
        self,
        name: str,
        size: int,
        items: Sequence[Any],
        names: Sequence[Any] | None = None,
        states: Sequence[Any] = (),
    ) -> list[Job]:
        """Deal items out to parts.

        Args:
            name: Format of a part's name, given the number of its first item.
            size: Items of a part.
            items: All items, in order.
            names: As of `Job`, for all items.
            states: The same.
        """
        slices = [slice(start, start + size) for start in range(0, len(items), size)]
        return [
            Job(
                self.folder / f"{name.format(part.start)}.safetensors",
                items[part],
                None if names is None else names[part],
                states[part],
            )
            for part in slices
        ]

    @contextmanager
    def work(
        self, title: str, unit: str, jobs: Sequence[Job]
    ) -> Iterator[tuple[list[Job], ProgressBar]]:
        """Begin this process's share of the jobs.

        What killed processes left half-written of it is removed.

        Args:
            title: What the progress bar says.
            unit: What it counts, in the plural.
            jobs: All jobs, of all processes.

        Yields:
            This process's jobs that are not done, and the bar, to be moved by each item.

        Raises:
            InputError: A part was made of something else.
        """
        first, mine = rank_and_world()[0] == 0, share(jobs)
        stems = {job.path.stem for job in mine}
        for path in self.folder.glob(".*.*.*"):
            of_split = first and path.suffix in (".json", ".jsonl")
            if of_split or path.name.split(".")[1] in stems:
                path.unlink(missing_ok=True)
        missing = [job for job in mine if not self._is_done(job)]
        total = sum(len(job.items) for job in mine)
        done = total - sum(len(job.items) for job in missing)
        with ProgressBar(title, total, done, unit, not first) as progress:
            yield missing, progress

    def write(self, job: Job, tensors: Mapping[str, Tensor], **about: Any) -> None:
        """Write a part; `about` goes to its header as JSON.

        Raises:
            RunError: The disk is full or cannot be written.
        """
        header = {"format": FORMAT, "source": json.dumps(self.source), **job.header()}
        header |= {key: json.dumps(value) for key, value in about.items()}
        write_part(job.path, tensors, header)

    def are_done(self, jobs: Sequence[Job]) -> bool:
        """Return whether all parts are there, those of other processes included."""
        return all(self._is_done(job) for job in jobs)

    def write_index(
        self,
        parts: Sequence[Part],
        columns: Mapping[str, str],
        text_jobs: Sequence[Job] = (),
    ) -> list[dict[str, Any]]:
        """Write the index of a split whose parts are done.

        Args:
            parts: The parts that hold clips.
            columns: Keys of the index -> keys of the clips in the parts' headers.
            text_jobs: The text parts; their items are the texts.

        Returns:
            What the parts' headers say of each clip.
        """
        mean, std = latent_statistics(parts)
        clips = [clip for part in parts for clip in json.loads(part.metadata["clips"])]
        index: dict[str, Any] = {
            "format": FORMAT,
            "source": self.source,
            "shards": [part.path.name for part in parts],
        }
        if text_jobs:
            index["text_shards"] = [job.path.name for job in text_jobs]
            index["texts"] = [text for job in text_jobs for text in job.items]
        index |= {"latent_mean": mean, "latent_std": std}
        index |= {key: [clip[field] for clip in clips] for key, field in columns.items()}
        with atomic_path(self.folder / INDEX) as temporary:
            temporary.write_text(json.dumps(index))
        return clips

    def _is_done(self, job: Job) -> bool:
        """Return whether the part is there and whole; raise if it is of something else."""
        if not job.path.exists():
            return False
        try:
            header = Part(job.path).metadata
        except InputError:
            return False  # no process of ours leaves such a file, but a machine that stops does
        if header.get("format") != FORMAT or header.get("source") != json.dumps(self.source):
            raise InputError(
                f"{self.folder} holds features made with other weights or settings. "
                f"Give another {self.option}, or remove that folder."
            )
        if job.names is None:
            return len(json.loads(header["clips"])) == len(job.items)
        count = int(header.get("count", 0))
        if header.get("items") != job.digest(count) or count > len(job.items):
            raise InputError(
                f"{job.path} holds clips of another table, or of rows that have changed. "
                f"Give another {self.option}, or remove that folder."
            )
        # A part that has grown, or whose files were missing, is made again.
        return job.header().items() <= header.items()


def latent_statistics(parts: Sequence[Part]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation (C,) of the latents in parts, as they will be sampled."""
    total = square = torch.zeros(())
    tokens = 0
    for part in parts:
        mean = part.tensors["mean"].double().flatten(0, 1)
        variance = part.tensors["logvar"].double().flatten(0, 1).exp()
        total = total + mean.sum(0)
        square = square + (mean.square() + variance).sum(0)
        tokens += mean.shape[0]
    center = total / tokens
    return center.tolist(), (square / tokens - center.square()).sqrt().tolist()


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
