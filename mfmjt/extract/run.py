"""Rows of a table to a feature store: threads decode ahead, this one encodes.

The store is that of `mfmjt.features.writer`, in parts of 64 rows. The header of a part also has the
rows that could not be used and why. Beside the index of a split are

rejects.jsonl  the rows that could not be used, with the reason
notes.jsonl    the clips whose files were odd but could be used, and how; where there are any
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfmjt.devices import parse_dtype
from mfmjt.errors import InputError, RunError, short
from mfmjt.extract.clips import Cut, Piece, decode
from mfmjt.extract.tables import Row, read_folder, read_table
from mfmjt.families import Bundle
from mfmjt.features.format import INDEX, Part
from mfmjt.features.store import FeatureStore
from mfmjt.features.writer import Job, Writer
from mfmjt.files import atomic_path
from mfmjt.progress import ProgressBar

__all__ = ["NOTES", "REJECTS", "Done", "Settings", "extract", "stored"]

REJECTS = "rejects.jsonl"
NOTES = "notes.jsonl"
PART_ROWS = 64
PART_TEXTS = 256
ENCODE_CLIPS = 8
_AHEAD = 2  # clips decoded beyond one for each worker: enough that encoding never waits for one

Decoded = tuple[Row, list[Piece] | str]
"""A row, and its clips or why there are none."""


@dataclass(frozen=True)
class Settings:
    """How a table becomes a store.

    Attributes:
        cut: What of a file becomes a clip.
        dtype: Precision of the stored features: float16 is half the size, and rounds to 0.05 %.
        workers: Threads that decode; 0 decodes in the calling thread.
        device: Device on which features are computed.
    """

    cut: Cut = field(default_factory=Cut)
    dtype: str = "float16"
    workers: int = 4
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        parse_dtype(self.dtype, ("float16", "float32"))
        if self.workers < 0:
            raise InputError(f"{self.workers} workers: give 0 or more.")


class Done(NamedTuple):
    """What became of one split.

    Attributes:
        folder: Folder of the split.
        clips: Number of clips in the store.
        rejects: Rows that could not be used; `rejects.jsonl` in the folder lists them.
        finished: Whether the index is written: other processes may still be at work.
        notes: Clips whose files were odd but could be used; `notes.jsonl` lists them.
    """

    folder: Path
    clips: int
    rejects: int
    finished: bool
    notes: int = 0

    def __str__(self) -> str:
        """Return one line for the user."""
        skipped = f", {self.rejects} skipped: {self.folder / REJECTS}" if self.rejects else ""
        noted = f", {self.notes} with a note: {self.folder / NOTES}" if self.notes else ""
        return f"{self.folder}: {self.clips} clips{skipped}{noted}."


def extract(
    rows: Sequence[Row], out: str | Path, bundle: Bundle, settings: Settings | None = None
) -> list[Done]:
    """Compute the features of a table's clips, going on where it stopped.

    Under torchrun every process makes its share, and the last one writes the index.

    Args:
        rows: Rows from `read_table`.
        out: Folder of the store; made where it does not exist.
        bundle: The codec and encoders; its network is not used.
        settings: None takes the defaults.

    Raises:
        InputError: The store was made with something else, or clips cannot have that length.
        RunError: It cannot be written, or no clip of a split can be used.
    """
    settings = settings or Settings()
    seconds, period = settings.cut.seconds, bundle.encoders.period
    if period and abs(seconds / period - round(seconds / period)) > 1e-6:
        raise InputError(
            f"Clips of {seconds:g} s: nano's frames and latents meet every {period:g} s. Give a "
            "multiple of that, such as 8."
        )
    encoder = _Encoder(bundle.to(settings.device), settings)
    source = {"ends": bundle.identity(), "dtype": settings.dtype, **asdict(settings.cut)}
    source = dict(sorted(source.items()))
    done = []
    for split in dict.fromkeys(row.split for row in rows):
        folder = Path(out) / split
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"Cannot write to {folder}: {error.strerror}. Give another --out."
            ) from error
        writer = Writer(folder, source, "--out")
        done.append(_extract_split(writer, [row for row in rows if row.split == split], encoder))
    return done


@contextmanager
def stored(data: str | Path, bundle: Bundle, split: str) -> Iterator[FeatureStore]:
    """Give a feature store, or one that is made of files and lasts as long as the block.

    Args:
        data: A store; a table as for `read_table`; or a folder of videos, which have no captions.
        bundle: The codec and encoders, on the device where they work.
        split: What is needed of it; the files of a folder are all of it.

    Raises:
        InputError: It is none of these, or a table that cannot be read.
        RunError: None of the files can be used.
    """
    data = Path(data)
    if any(data.glob(f"*/{INDEX}")):
        yield FeatureStore(data, split)
        return
    rows = read_folder(data, split) if data.is_dir() else read_table(data, split=split)
    with TemporaryDirectory() as folder:
        extract(rows, folder, bundle, Settings(Cut(shortest=1.0), device=str(bundle.device)))
        yield FeatureStore(folder, split)


def _extract_split(writer: Writer, rows: Sequence[Row], encoder: _Encoder) -> Done:
    """Make this process's parts of one split; the last process writes the index."""
    rows = [_with_condition(row, encoder.settings.cut) for row in rows]
    texts = list(dict.fromkeys(["", *(row.caption for row in rows)]))
    names = [[row.line, row.id, row.caption] for row in rows]
    states = [[row.path and row.path.name, row.reason] for row in rows]
    clip_jobs = writer.jobs("{:08d}", PART_ROWS, rows, names, states)
    text_jobs = writer.jobs("text-{:08d}", PART_TEXTS, texts, texts)
    split = writer.folder.name
    with writer.work(f"texts {split}", "texts", text_jobs) as (missing, progress):
        for job in missing:
            writer.write(job, {"text": encoder.texts(job.items, progress)})
    with writer.work(f"features {split}", "clips", clip_jobs) as (missing, progress):
        decoded = _decode([row for job in missing for row in job.items], encoder)
        try:
            for job in missing:
                _write_clips(writer, job, islice(decoded, len(job.items)), encoder, progress)
        finally:
            decoded.close()
    if writer.are_done(clip_jobs) and writer.are_done(text_jobs):
        return _finish(writer, clip_jobs, text_jobs)
    return Done(writer.folder, 0, 0, False)


def _with_condition(row: Row, cut: Cut) -> Row:
    if row.reason or row.caption or cut.pictures:
        return row
    return replace(row, reason="It has neither pictures nor a caption: nothing says what is heard.")


class _Encoder:
    """Codec and encoders on their device, and the number of rows they could not use."""

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        self.bundle, self.settings = bundle, settings
        self.device, self.dtype = bundle.device, parse_dtype(settings.dtype)
        self.rejected = 0

    def clips(self, row: Row) -> list[Piece] | str:
        """Read a row's clips; or return why there are none."""
        if row.reason or row.path is None:
            return row.reason
        try:
            return decode(row.path, self.settings.cut, self.bundle)
        except (ValueError, OSError) as error:  # an InputError, or what FFmpeg says
            return short(error, 300)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], progress: ProgressBar) -> Tensor:
        """Return features (n, L, D) of texts, on the CPU as they are stored."""
        features = []
        for first in range(0, len(texts), ENCODE_CLIPS):
            batch = list(texts[first : first + ENCODE_CLIPS])
            features.append(self.bundle.encoders.encode_text(batch).to("cpu", self.dtype))
            progress.update(progress.done + len(batch))
        return torch.cat(features)

    @torch.inference_mode()
    def features(self, pieces: Sequence[Piece]) -> list[dict[str, Tensor]]:
        """Return the features of each of some clips, on the CPU as they are stored."""
        codec, encoders = self.bundle.codec, self.bundle.encoders
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


def _decode(rows: Sequence[Row], encoder: _Encoder) -> Generator[Decoded, None, None]:
    """Yield each row with its clips, or with why there are none, in order."""
    workers = encoder.settings.workers
    if workers == 0:
        for row in rows:
            yield row, encoder.clips(row)
        return
    pool = ThreadPoolExecutor(workers, "mfmjt-decode")
    line: deque[tuple[Row, Future[list[Piece] | str]]] = deque()
    try:
        for row in rows:
            line.append((row, pool.submit(encoder.clips, row)))
            if len(line) > workers + _AHEAD:
                first, found = line.popleft()
                yield first, found.result()
        for first, found in line:
            yield first, found.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_clips(
    writer: Writer, job: Job, decoded: Iterable[Decoded], encoder: _Encoder, progress: ProgressBar
) -> None:
    """Encode the clips of one part's rows and write it."""
    kept: list[dict[str, Tensor]] = []
    clips: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []
    waiting: list[tuple[Row, Piece]] = []

    def reject(row: Row, reason: str) -> None:
        path = None if row.path is None else str(row.path)
        rejects.append({"line": row.line, "id": row.id, "path": path, "reason": reason})
        encoder.rejected += 1

    def encode() -> None:
        features = encoder.features([piece for _, piece in waiting]) if waiting else []
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
        note = f"{encoder.rejected} skipped," if encoder.rejected else ""
        progress.update(progress.done + 1, note)
    encode()
    rejects.sort(key=lambda reject: reject["line"])
    tensors = {key: torch.stack([f[key] for f in kept]) for key in kept[0]} if kept else {}
    writer.write(job, tensors, clips=clips, rejects=rejects)


def _finish(writer: Writer, clip_jobs: Sequence[Job], text_jobs: Sequence[Job]) -> Done:
    """Write the index and the lists beside it."""
    folder = writer.folder
    parts = [Part(job.path) for job in clip_jobs]
    rejects = [reject for part in parts for reject in json.loads(part.metadata["rejects"])]
    _write_lines(folder / REJECTS, rejects)
    used = [part for part in parts if part.tensors]
    if not used:
        raise RunError(
            f"None of {len(rejects)} clips could be used, the first because: "
            f"{rejects[0]['reason']} {folder / REJECTS} has all reasons."
        )
    columns = {"ids": "id", "starts": "start", "captions": "caption"}
    clips = writer.write_index(used, columns, text_jobs)
    notes = [
        {key: clip[key] for key in ("id", "start", "note")} for clip in clips if "note" in clip
    ]
    if notes:
        _write_lines(folder / NOTES, notes)
    else:
        (folder / NOTES).unlink(missing_ok=True)
    return Done(folder, len(clips), len(rejects), True, len(notes))


def _write_lines(path: Path, records: Sequence[Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
