"""What training computes once per clip: render, encode, keep the features, drop the frames.

A store is a folder with one folder per split. A split holds shards of 64 clips and `index.json`.

shard        safetensors, fp16: `mean`, `logvar` (n, 250, 20); `video` (n, 64, 128);
             `sync` (n, 200, 128); the clips' captions, labels and events as JSON in the header
index.json   the shards in order, all captions, labels and events, and the mean and standard
             deviation (20,) of the latents as they will be sampled

Each shard appears whole or not at all and names the weights it was made with, so that an
interrupted extraction goes on where it stopped and never mixes two encoders. Under torchrun every
process makes its share of the shards, and whichever finds all of them done writes the index: the
processes need a folder that all see, and nothing else of one another.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfmjt.data import foley
from mfmjt.errors import InputError, RunError
from mfmjt.files import atomic_path
from mfmjt.progress import ProgressBar
from mfmjt.train.config import FeatureExtraction
from mfmjt.train.distributed import rank_and_world, share
from mfmjt.train.memory import keep_memory
from mfmjt.train.shards import Shard, write_shard

__all__ = ["FORMAT", "INDEX", "extract", "extract_all", "latent_statistics", "video_frames"]

FORMAT = "mfmjt-features-1"
INDEX = "index.json"
SHARD_CLIPS = 64
ENCODE_CLIPS = 8


def video_frames(frames: Tensor, fps: int, video_fps: int) -> Tensor:
    """Return the frames (T', H, W, 3) of `frames` (T, H, W, 3) shown at times j / video_fps."""
    count = math.ceil(frames.shape[0] * video_fps / fps)
    return frames[torch.arange(count) * fps // video_fps]


def extract(
    store: str | Path,
    split: str,
    clips: int,
    encoders: nn.Module,
    codec: nn.Module,
    workers: int = 2,
    seed: int = 0,
) -> Path:
    """Compute the features of the first `clips` clips of `split`, going on where it stopped.

    Args:
        store: Folder of the store; made where it does not exist.
        split: `train`, `validation` or `test`.
        clips: Number of clips, of all processes; a store can be extended by asking for more.
        encoders: Frame encoders with `encode_frames` and `encode_sync`.
        codec: Codec with `encode`.
        workers: Processes, each with one thread; 0 works in this process.
        seed: Seed of the procedural set.

    Returns:
        The folder of the split.

    Raises:
        InputError: The folder holds features of other weights or another seed.
        RunError: A worker died.
    """
    folder = Path(store) / split
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"Cannot write to {folder}: {error.strerror}. Give another out=."
        ) from error
    source = {"weights": _fingerprint(codec, encoders), "split": split, "seed": seed}
    shards = [
        (folder / f"{start:06d}.safetensors", start, min(SHARD_CLIPS, clips - start))
        for start in range(0, clips, SHARD_CLIPS)
    ]
    mine = share(shards)
    missing = [shard for shard in mine if not _is_done(shard, source)]
    total = sum(count for _, _, count in mine)
    done = total - sum(count for _, _, count in missing)
    quiet = rank_and_world()[0] > 0
    with ProgressBar(f"features {split}", total, done, "clips", quiet) as progress:
        for count in _work(missing, source, encoders, codec, workers):
            done += count
            progress.update(done)
    if all(_is_done(shard, source) for shard in shards):
        _write_index(folder, [path for path, _, _ in shards], source)
    return folder


def extract_all(config: FeatureExtraction) -> Path:
    """Run the stage `features`: both splits, from the weights that `config` names."""
    from mfmjt.codec import NanoCodec
    from mfmjt.encoders import NanoEncoders

    codec, encoders = NanoCodec.load(config.codec), NanoEncoders.load(config.encoders)
    for split, clips in (("validation", config.validation), ("train", config.clips)):
        extract(config.out, split, clips, encoders, codec, config.workers, config.seed)
    return Path(config.out)


Job = tuple[Path, int, int]
_models: tuple[nn.Module, nn.Module]


def _work(
    shards: Sequence[Job],
    source: dict[str, Any],
    encoders: nn.Module,
    codec: nn.Module,
    workers: int,
) -> Iterator[int]:
    """Make `shards`, yielding the number of clips as each is finished."""
    models = (encoders.cpu().eval(), codec.cpu().eval())
    if workers == 0 or not shards:
        for shard in shards:
            yield _make_shard(shard, source, *models)
        return
    # Spawned, not forked: a fork after torch has started threads can hang.
    pool = ProcessPoolExecutor(
        min(workers, len(shards)), get_context("spawn"), _start_worker, (*models, os.getpid())
    )
    try:
        futures = [pool.submit(_in_worker, shard, source) for shard in shards]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise RunError(
            "A feature worker died, perhaps for lack of memory. Run the same command again with "
            "fewer workers: finished shards are kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(encoders: nn.Module, codec: nn.Module, parent: int) -> None:
    global _models
    _models = (encoders, codec)
    torch.set_num_threads(1)
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; it waits for our shard

    def follow_parent() -> None:
        # A pool's workers outlive a parent that was killed, waiting for work for ever.
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _in_worker(shard: Job, source: dict[str, Any]) -> int:
    return _make_shard(shard, source, *_models)


@torch.inference_mode()
def _make_shard(shard: Job, source: dict[str, Any], encoders: Any, codec: Any) -> int:
    """Render and encode the clips of one shard and write it; return their number."""
    path, start, count = shard
    parts: list[dict[str, Tensor]] = []
    about: list[dict[str, Any]] = []
    for first in range(start, start + count, ENCODE_CLIPS):
        clips = [
            foley.clip(index, source["split"], source["seed"])
            for index in range(first, min(first + ENCODE_CLIPS, start + count))
        ]
        about += [
            {"caption": c.caption, "label": int(c.label), "events": [float(e) for e in c.events]}
            for c in clips
        ]
        frames = torch.stack([torch.from_numpy(c.frames) for c in clips])
        video = torch.stack([video_frames(f, foley.FPS, encoders.video_fps) for f in frames])
        mean, logvar = codec.encode(torch.stack([torch.from_numpy(c.audio) for c in clips]))
        parts.append(
            {
                "mean": mean,
                "logvar": logvar,
                "video": encoders.encode_frames(video),
                "sync": encoders.encode_sync(frames),
            }
        )
    tensors = {key: torch.cat([part[key] for part in parts]).half() for key in parts[0]}
    header = {"format": FORMAT, "source": json.dumps(source), "clips": json.dumps(about)}
    write_shard(path, tensors, header)
    return count


def _is_done(shard: Job, source: dict[str, Any]) -> bool:
    """Whether the shard is there, whole; raise if it was made by something else."""
    path, _, count = shard
    if not path.exists():
        return False
    try:
        header = Shard(path).metadata
        same = header["format"] == FORMAT and json.loads(header["source"]) == source
        if same:
            return len(json.loads(header["clips"])) == count
    except (InputError, KeyError, json.JSONDecodeError):
        pass  # a foreign or damaged file is not ours to overwrite
    raise InputError(
        f"{path.parent} holds features of other weights or another seed. "
        "Give another folder with out=, or remove that one."
    )


def _write_index(folder: Path, shards: Sequence[Path], source: dict[str, Any]) -> None:
    """Collect the clips' descriptions and the statistics of their sampled latents."""
    files = [Shard(path) for path in shards]
    about = [clip for file in files for clip in json.loads(file.metadata["clips"])]
    mean, std = latent_statistics(files)
    index = {
        "format": FORMAT,
        "source": source,
        "shards": [path.name for path in shards],
        "latent_mean": mean,
        "latent_std": std,
        "captions": [clip["caption"] for clip in about],
        "labels": [clip["label"] for clip in about],
        "events": [clip["events"] for clip in about],
    }
    with atomic_path(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(index))


def latent_statistics(shards: Sequence[Shard]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation (C,) of the latents in shards, as they will be sampled."""
    total = square = torch.zeros(())
    tokens = 0
    for shard in shards:
        mean = shard.tensors["mean"].double().flatten(0, 1)
        variance = shard.tensors["logvar"].double().flatten(0, 1).exp()
        total = total + mean.sum(0)
        square = square + (mean.square() + variance).sum(0)
        tokens += mean.shape[0]
    center = total / tokens
    return center.tolist(), (square / tokens - center.square()).sqrt().tolist()


def _fingerprint(*modules: nn.Module) -> str:
    digest = hashlib.sha256()
    for module in modules:
        for key, tensor in module.state_dict().items():
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
