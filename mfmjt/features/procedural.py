"""The procedural or the open set into a store: render, encode, keep the features, drop the frames.

A part holds 64 clips in float16: `mean`, `logvar` (n, 250, 20); `video` (n, 64, 128); `sync`
(n, 200, 128). Clips without a picture have parts of their own, which lack `video` and `sync`. The
index has captions, labels and events.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfmjt.codec import Codec, NanoCodec
from mfmjt.data import foley
from mfmjt.data.open_set import clips_of, has_picture, open_set
from mfmjt.encoders import Encoders, NanoEncoders
from mfmjt.errors import InputError, RunError
from mfmjt.features.format import Part
from mfmjt.features.writer import Job, Writer
from mfmjt.memory import keep_memory

__all__ = ["FeatureExtraction", "extract_all", "write_store"]

PART_CLIPS = 64
ENCODE_CLIPS = 8


@dataclass(frozen=True)
class FeatureExtraction:
    """What to compute once for every clip before the network is trained.

    Attributes:
        out: Folder of the feature store; each split is a folder in it.
        codec: Weights of the codec, from the stage `codec`.
        encoders: Weights of the encoders, from the stage `encoders`.
        clips: Number of training clips.
        validation: Number of validation clips.
        seed: Seed of the set.
        workers: Processes, each with one thread.
        recordings: Corpus of the open set, from `mfmjt data real`; null for the procedural set.
    """

    out: str = "output/nano/features"
    codec: str = "output/nano/codec/codec.safetensors"
    encoders: str = "output/nano/encoders/encoders.safetensors"
    clips: int = 4000
    validation: int = 128
    seed: int = 0
    workers: int = 2
    recordings: Path | None = None


def extract_all(config: FeatureExtraction) -> Path:
    """Run the stage `features`: both splits, from the weights that `config` names."""
    codec, encoders = NanoCodec.load(config.codec), NanoEncoders.load(config.encoders)
    clips = {"validation": config.validation, "train": config.clips}
    return write_store(
        config.out, clips, codec, encoders, config.workers, config.seed, config.recordings
    )


def write_store(
    store: str | Path,
    clips: Mapping[str, int],
    codec: Codec,
    encoders: Encoders,
    workers: int = 2,
    seed: int = 0,
    recordings: Path | None = None,
) -> Path:
    """Compute the features of the first clips of each split, going on where it stopped.

    Args:
        store: Folder of the store; made where it does not exist.
        clips: Split (`train`, `validation` or `test`) -> number of its clips, of all processes; a
            store can be extended by asking for more.
        codec: Waveforms to latents.
        encoders: Frames to features.
        workers: Processes, each with one thread; 0 works in this process.
        seed: Seed of the set.
        recordings: Corpus of the open set; None means the procedural set.

    Returns:
        The folder of the store.

    Raises:
        InputError: The folder holds features of other weights, recordings or another seed; there
            are no such recordings.
        RunError: A worker died.
    """
    made_with: dict[str, Any] = {"weights": _fingerprint(codec, encoders)}
    if recordings is not None:
        made_with["recordings"] = open_set(recordings).recordings.digest
    models = (codec.cpu().eval(), encoders.cpu().eval())
    for split, count in clips.items():
        folder = Path(store) / split
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"Cannot write to {folder}: {error.strerror}. Give another out=."
            ) from error
        writer = Writer(folder, {**made_with, "split": split, "seed": seed}, "out=")
        seen = [i for i in range(count) if has_picture(i, recordings)]
        alone = [i for i in range(count) if not has_picture(i, recordings)]
        jobs = writer.jobs("{:06d}", PART_CLIPS, seen)
        jobs += writer.jobs("sound_{:06d}", PART_CLIPS, alone)
        with writer.work(f"features {split}", "clips", jobs) as (missing, progress):
            for made in _make(missing, writer, models, workers, recordings):
                progress.update(progress.done + made)
        if writer.are_done(jobs):
            columns = {"captions": "caption", "labels": "label", "events": "events"}
            writer.write_index([Part(job.path) for job in jobs], columns)
    return Path(store)


_models: tuple[Codec, Encoders]


def _make(
    jobs: Sequence[Job],
    writer: Writer,
    models: tuple[Codec, Encoders],
    workers: int,
    recordings: Path | None,
) -> Iterator[int]:
    """Make parts, yielding the number of clips as each is finished."""
    if workers == 0 or not jobs:
        for job in jobs:
            yield _make_part(job, writer, recordings, *models)
        return
    # Spawned, not forked: a fork after torch has started threads can hang.
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), get_context("spawn"), _start_worker, (*models, os.getpid())
    )
    try:
        futures = [pool.submit(_in_worker, job, writer, recordings) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise RunError(
            "A feature worker died, perhaps for lack of memory. Run the same command again with "
            "fewer workers: finished parts are kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(codec: Codec, encoders: Encoders, parent: int) -> None:
    global _models
    _models = (codec, encoders)
    torch.set_num_threads(1)
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; it waits for our part

    def follow_parent() -> None:
        # A pool's workers outlive a parent that was killed, waiting for work for ever.
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _in_worker(job: Job, writer: Writer, recordings: Path | None) -> int:
    return _make_part(job, writer, recordings, *_models)


@torch.inference_mode()
def _make_part(
    job: Job, writer: Writer, recordings: Path | None, codec: Codec, encoders: Encoders
) -> int:
    """Render and encode the clips of one part and write it; return their number."""
    make = clips_of(recordings)
    features: list[dict[str, Tensor]] = []
    about: list[dict[str, Any]] = []
    for first in range(0, len(job.items), ENCODE_CLIPS):
        clips = [
            make(index, writer.source["split"], writer.source["seed"])
            for index in job.items[first : first + ENCODE_CLIPS]
        ]
        about += [
            {"caption": c.caption, "label": int(c.label), "events": [float(e) for e in c.events]}
            for c in clips
        ]
        mean, logvar = codec.encode(torch.stack([torch.from_numpy(c.audio) for c in clips]))
        found = {"mean": mean, "logvar": logvar}
        if clips[0].frames is not None:
            frames = torch.stack([torch.from_numpy(c.frames) for c in clips])
            shown = foley.frames_shown(frames.shape[1], encoders.video_fps)
            found["video"] = encoders.encode_frames(frames[:, shown])
            found["sync"] = encoders.encode_sync(frames)
        features.append(found)
    tensors = {key: torch.cat([part[key] for part in features]).half() for key in features[0]}
    writer.write(job, tensors, clips=about)
    return len(about)


def _fingerprint(*modules: nn.Module) -> str:
    digest = hashlib.sha256()
    for module in modules:
        for key, tensor in module.state_dict().items():
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
