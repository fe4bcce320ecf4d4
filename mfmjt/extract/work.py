"""Rows of a table to a feature store: threads decode ahead, this one encodes.

A store has a folder for each split, and that has shards of 64 rows of the table:

shard          safetensors: `mean`, `logvar` (n, N, C); with pictures `video` (n, V, Dv) and `sync`
               (n, S, Ds). Its header has the clips, the rows that could not be used and why, what
               they were made with, and a checksum of all of that and of the tensors
text-…         safetensors: `text` (n, L, D), each distinct caption once, the empty one first
index.json     the shards in order, captions, and the statistics of the latents
rejects.jsonl  rows that could not be used, with the reason
notes.jsonl    clips whose files were odd but could be used, and how; where there are any

A shard depends on its rows and on nothing else, and appears whole or not at all. So a run that was
killed goes on with the shards that are missing, any number of processes and machines share them,
and the store is the same, byte for byte, as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfmjt.devices import choose_device
from mfmjt.errors import InputError, RunError, reason, short, some
from mfmjt.extract.clips import Cut, Piece, decode
from mfmjt.extract.ends import Ends
from mfmjt.extract.tables import Row
from mfmjt.files import atomic_path
from mfmjt.progress import ProgressBar
from mfmjt.train.distributed import rank_and_world, share
from mfmjt.train.features import FORMAT, INDEX, latent_statistics
from mfmjt.train.shards import Shard, write_shard

__all__ = ["NOTES", "REJECTS", "Done", "Settings", "extract", "own_device", "verify"]

REJECTS = "rejects.jsonl"
NOTES = "notes.jsonl"
SHARD_ROWS = 64
SHARD_TEXTS = 256
ENCODE_CLIPS = 8
_AHEAD = 2  # clips decoded beyond one for each worker: enough that encoding never waits for one
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """How a table becomes a store.

    Attributes:
        cut: What of a file becomes a clip.
        dtype: Of the stored features: float16 is half the size, and rounds to 0.05 %.
        workers: Threads that decode; 0 for none beside this one.
        device: Where features are computed.
    """

    cut: Cut = field(default_factory=Cut)
    dtype: str = "float16"
    workers: int = 4
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.dtype not in _DTYPES:
            raise InputError(f"There is no dtype {self.dtype!r}. Choose float16 or float32.")
        if self.workers < 0:
            raise InputError(f"{self.workers} workers: give 0 or more.")


class Done(NamedTuple):
    """What became of one split.

    Attributes:
        folder: Of the split.
        clips: In the store.
        rejects: Rows that could not be used; `rejects.jsonl` in the folder lists them.
        finished: Whether the index is written: other processes may still be at work.
        notes: Clips whose files were odd but could be used; `notes.jsonl` lists them.
    """

    folder: Path
    clips: int
    rejects: int
    finished: bool
    notes: int = 0


class _Job(NamedTuple):
    """One shard to be made.

    Attributes:
        path: Of the file.
        items: Rows, or texts.
        names: What the table says of each.
        state: What is known of their files.
    """

    path: Path
    items: tuple[Any, ...]
    names: tuple[str, ...]
    state: str

    def digest(self, count: int | None = None) -> str:
        """Of the names of all items, or of the first `count`."""
        return hashlib.sha256(json.dumps(self.names[:count]).encode()).hexdigest()


def extract(
    rows: Sequence[Row],
    out: str | Path,
    ends: Ends,
    settings: Settings | None = None,
) -> list[Done]:
    """Compute the features of a table's clips, going on where it stopped.

    Under torchrun every process makes its share, and whichever finds all of it done writes the
    index.

    Args:
        rows: From `read_table`.
        out: Folder of the store; made where it does not exist.
        ends: Codec and encoders.
        settings: None takes the defaults.

    Raises:
        InputError: The store was made with something else.
        RunError: It cannot be written, or no clip of a split can be used.
    """
    settings = settings or Settings()
    device = torch.device(settings.device)
    ends.to(device).lengths(settings.cut.seconds)
    source = json.dumps(
        {"ends": ends.identity(), "dtype": settings.dtype, **asdict(settings.cut)}, sort_keys=True
    )
    work = _Work(Path(out), ends, settings, device, source)
    return [
        work.split(split, [row for row in rows if row.split == split])
        for split in dict.fromkeys(row.split for row in rows)
    ]


def own_device(asked: str | None) -> str:
    """Where this process computes: of several with GPUs, each has its own.

    Raises:
        InputError: The device cannot be used.
    """
    device = choose_device(asked)
    if device.type == "cuda" and device.index is None:
        device = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    return str(device)


def verify(store: str | Path) -> int:
    """Compare every shard of a store with its checksum.

    Returns:
        How many files were read.

    Raises:
        InputError: There is no finished store.
        RunError: Files are missing or damaged; the message names them.
    """
    indices = sorted(Path(store).glob(f"*/{INDEX}"))
    if not indices:
        raise InputError(f"{store} holds no finished store. Run mfmjt extract first.")
    wrong: list[str] = []
    paths: list[Path] = []
    for path in indices:
        try:
            index = json.loads(path.read_text())
            names = [*index["shards"], *index.get("text_shards", [])]
        except (OSError, ValueError, KeyError) as error:
            wrong.append(f"{path} cannot be read ({reason(error)}).")
            continue
        paths += [path.parent / name for name in names]
    with ProgressBar("verify", len(paths), 0, "files", rank_and_world()[0] > 0) as progress:
        for done, path in enumerate(paths, start=1):
            try:
                Shard(path).check()
            except InputError as error:
                wrong.append(str(error))
            progress.update(done)
    if wrong:
        raise RunError(some(wrong, " ", 2, each=250))
    return len(paths)


class _Work:
    """What all splits of a store share."""

    def __init__(
        self, out: Path, ends: Ends, settings: Settings, device: torch.device, source: str
    ) -> None:
        self.out, self.ends, self.settings, self.device = out, ends, settings, device
        self.source, self.dtype = source, _DTYPES[settings.dtype]
        self.quiet = rank_and_world()[0] > 0
        self.rejected = 0

    def split(self, name: str, rows: Sequence[Row]) -> Done:
        """Make this process's shards of one split; the last process writes the index."""
        folder = self.out / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"Cannot write to {folder}: {error.strerror}. Give another --out."
            ) from error
        rows = [_with_condition(row, self.settings.cut) for row in rows]
        texts = list(dict.fromkeys(["", *(row.caption for row in rows)]))
        clips = _jobs(folder, "", rows, SHARD_ROWS)
        text = _jobs(folder, "text-", texts, SHARD_TEXTS)
        self._sweep(folder, [*clips, *text])
        self._make_texts(name, share(text))
        self._make_clips(name, share(clips))
        if all(self._is_done(job) for job in (*clips, *text)):
            return self._finish(folder, clips, text, texts)
        return Done(folder, 0, 0, False)

    def _sweep(self, folder: Path, jobs: Sequence[_Job]) -> None:
        """Remove what a killed process was writing; only what would be this one's to write."""
        mine = {job.path.stem for job in share(jobs)}
        mine |= set() if self.quiet else {"index", "rejects", "notes"}
        for path in folder.glob(".*.*.*"):
            if path.name.split(".")[1] in mine:
                path.unlink(missing_ok=True)

    def _is_done(self, job: _Job) -> bool:
        """Whether the shard is there, whole and of these rows; raise if something else made it."""
        if not job.path.exists():
            return False
        try:
            said = Shard(job.path).metadata
        except InputError:
            return False  # no process of ours leaves such a file, but a machine that stops does
        if said.get("format") != FORMAT or said.get("source") != self.source:
            raise InputError(
                f"{job.path.parent} holds features made with other weights or settings. "
                "Give another --out, or remove that folder."
            )
        count = int(said.get("count", 0))
        # What has grown, or whose files were missing, is made again.
        if said.get("items") != job.digest(count) or count > len(job.items):
            raise InputError(
                f"{job.path} holds clips of another table, or of rows that have changed. "
                "Give another --out, or remove that folder."
            )
        return count == len(job.items) and said.get("state") == job.state

    def _header(self, job: _Job) -> dict[str, str]:
        return {
            "format": FORMAT,
            "source": self.source,
            "items": job.digest(),
            "count": str(len(job.items)),
            "state": job.state,
        }

    # Text

    @torch.inference_mode()
    def _make_texts(self, name: str, jobs: Sequence[_Job]) -> None:
        missing = [job for job in jobs if not self._is_done(job)]
        if not missing:
            return
        total = sum(len(job.items) for job in missing)
        with ProgressBar(f"texts {name}", total, 0, "texts", self.quiet) as progress:
            for job in missing:
                parts = []
                for first in range(0, len(job.items), ENCODE_CLIPS):
                    batch = list(job.items[first : first + ENCODE_CLIPS])
                    parts.append(self.ends.encoders.encode_text(batch).to("cpu", self.dtype))
                    progress.update(progress.done + len(batch))
                write_shard(job.path, {"text": torch.cat(parts)}, self._header(job))

    # Clips

    def _make_clips(self, name: str, jobs: Sequence[_Job]) -> None:
        missing = [job for job in jobs if not self._is_done(job)]
        total = sum(len(job.items) for job in jobs)
        done = total - sum(len(job.items) for job in missing)
        rows = [row for job in missing for row in job.items]
        decoded = self._decoded(rows)
        try:
            with ProgressBar(f"features {name}", total, done, "clips", self.quiet) as progress:
                for job in missing:
                    self._make_shard(job, islice(decoded, len(job.items)), progress)
        finally:
            decoded.close()

    def _decoded(self, rows: Sequence[Row]) -> Generator[tuple[Row, list[Piece] | str], None, None]:
        """Each row's clips, or why there are none, in order."""

        def work(row: Row) -> list[Piece] | str:
            if row.reason or row.path is None:
                return row.reason
            try:
                return decode(row.path, self.settings.cut, self.ends, self.device)
            except (ValueError, OSError) as error:  # an InputError, or what FFmpeg says
                return short(error, 300)

        workers = self.settings.workers
        if workers == 0:
            for row in rows:
                yield row, work(row)
            return
        pool = ThreadPoolExecutor(workers, "mfmjt-decode")
        line: deque[Any] = deque()
        try:
            for row in rows:
                line.append((row, pool.submit(work, row)))
                if len(line) > workers + _AHEAD:
                    first, found = line.popleft()
                    yield first, found.result()
            while line:
                first, found = line.popleft()
                yield first, found.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _make_shard(
        self, job: _Job, decoded: Iterable[tuple[Row, list[Piece] | str]], progress: ProgressBar
    ) -> None:
        kept: list[dict[str, Tensor]] = []
        clips: list[dict[str, Any]] = []
        rejects: list[dict[str, Any]] = []
        waiting: list[tuple[Row, Piece]] = []

        def reject(row: Row, reason: str) -> None:
            path = None if row.path is None else str(row.path)
            rejects.append({"line": row.line, "id": row.id, "path": path, "reason": reason})
            self.rejected += 1

        def encode() -> None:
            features = self._encoded([piece for _, piece in waiting]) if waiting else []
            for (row, piece), found in zip(waiting, features, strict=True):
                if all(bool(value.isfinite().all()) for value in found.values()):
                    kept.append(found)
                    clip = {"id": row.id, "caption": row.caption, "start": piece.start}
                    clips.append(clip | ({"note": piece.note} if piece.note else {}))
                else:
                    reject(row, f"{row.path} has features that are not finite.")
            waiting.clear()

        for row, found in decoded:
            if isinstance(found, str):
                reject(row, found)
            else:
                waiting += [(row, piece) for piece in found]
            if len(waiting) >= ENCODE_CLIPS:
                encode()
            note = f"{self.rejected} skipped," if self.rejected else ""
            progress.update(progress.done + 1, note)
        encode()
        rejects.sort(key=lambda reject: reject["line"])
        about = {"clips": json.dumps(clips), "rejects": json.dumps(rejects)}
        tensors = {key: torch.stack([f[key] for f in kept]) for key in kept[0]} if kept else {}
        write_shard(job.path, tensors, self._header(job) | about)

    @torch.inference_mode()
    def _encoded(self, pieces: Sequence[Piece]) -> list[dict[str, Tensor]]:
        """Features of some clips, on the CPU as they are stored."""
        codec, encoders = self.ends.codec, self.ends.encoders
        audio = torch.stack([piece.audio for piece in pieces]).to(self.device)
        mean, logvar = codec.encode(audio)
        found = {"mean": mean, "logvar": logvar}
        video = [piece.video for piece in pieces if piece.video is not None]
        sync = [piece.sync for piece in pieces if piece.sync is not None]
        if video:
            found["video"] = encoders.encode_frames(torch.stack(video).to(self.device))
            found["sync"] = encoders.encode_sync(torch.stack(sync).to(self.device))
        stored = {key: value.to("cpu", self.dtype) for key, value in found.items()}
        return [{key: value[i] for key, value in stored.items()} for i in range(len(pieces))]

    # The end

    def _finish(
        self, folder: Path, clips: Sequence[_Job], text: Sequence[_Job], texts: list[str]
    ) -> Done:
        shards = [Shard(job.path) for job in clips]
        rejects = [r for shard in shards for r in json.loads(shard.metadata["rejects"])]
        with atomic_path(folder / REJECTS) as temporary:
            temporary.write_text("".join(json.dumps(reject) + "\n" for reject in rejects))
        used = [shard for shard in shards if shard.tensors]
        about = [clip for shard in used for clip in json.loads(shard.metadata["clips"])]
        if not about:
            raise RunError(
                f"None of {len(rejects)} clips could be used, the first because: "
                f"{rejects[0]['reason']} {folder / REJECTS} has all reasons."
            )
        mean, std = latent_statistics(used)
        index = {
            "format": FORMAT,
            "source": json.loads(self.source),
            "shards": [shard.path.name for shard in used],
            "text_shards": [job.path.name for job in text],
            "texts": texts,
            "latent_mean": mean,
            "latent_std": std,
            "ids": [clip["id"] for clip in about],
            "starts": [clip["start"] for clip in about],
            "captions": [clip["caption"] for clip in about],
        }
        with atomic_path(folder / INDEX) as temporary:
            temporary.write_text(json.dumps(index))
        notes = [
            {key: clip[key] for key in ("id", "start", "note")} for clip in about if "note" in clip
        ]
        if notes:
            with atomic_path(folder / NOTES) as temporary:
                temporary.write_text("".join(json.dumps(note) + "\n" for note in notes))
        else:
            (folder / NOTES).unlink(missing_ok=True)
        return Done(folder, len(about), len(rejects), True, len(notes))


def _with_condition(row: Row, cut: Cut) -> Row:
    if row.reason or row.caption or cut.pictures:
        return row
    return replace(row, reason="It has neither pictures nor a caption: nothing says what is heard.")


def _jobs(folder: Path, prefix: str, items: Sequence[Row | str], size: int) -> list[_Job]:
    jobs = []
    for start in range(0, len(items), size):
        part = tuple(items[start : start + size])
        rows = [item for item in part if isinstance(item, Row)]
        names = tuple(
            json.dumps([item.line, item.id, item.caption] if isinstance(item, Row) else item)
            for item in part
        )
        known = json.dumps([[row.path and row.path.name, row.reason] for row in rows])
        state = hashlib.sha256(known.encode()).hexdigest()
        jobs.append(_Job(folder / f"{prefix}{start:08d}.safetensors", part, names, state))
    return jobs
