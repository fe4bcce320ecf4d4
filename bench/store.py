"""Measure how fast a process reads random clips of a feature store from the page cache.

Writes stores of random numbers in MMAudio's sizes to a temporary folder and appends rows to
`store.jsonl`, with the bar they are held to, 1.5 GB/s:

video   clips with pictures and one of 309 labels, 1.2 MB in float32
audio   clips of sound, each with a caption of its own, 0.36 MB in float32
joint   both, half of a batch from each

Batches are drawn at random and made as training makes them. Beside ours stand what the same rows
cost by safetensors' own slices, and a copy of as many bytes in memory, which nothing can beat. All
take turns. GB are 1e9 bytes of the store's own files, by wall time and, where others use the same
cores, by the process's CPU time.

Examples:
  python -m bench store --out output/bench
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bench import parser
from bench.machine import environment
from bench.rows import Rows
from mfmjt.features.format import FORMAT, INDEX, write_part
from mfmjt.features.store import FeatureStore
from mfmjt.memory import keep_memory

__all__ = ["BAR", "main"]

BAR = 1.5
ROWS = 64
LABELS = 309  # VGGSound's
SHAPES = {"mean": (250, 20), "logvar": (250, 20), "video": (64, 1024), "sync": (192, 768)}
TEXT = (77, 1024)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and append to `store.jsonl`."""
    usage = parser("store", __doc__)
    usage.add_argument("--out", required=True, type=Path, help="folder of the results")
    usage.add_argument("--folder", type=Path, help="where the stores are made [temporary]")
    usage.add_argument("--clips", type=int, default=1024, help="of each store [1024]")
    usage.add_argument("--batch", type=int, default=64, help="clips of a batch [64]")
    usage.add_argument("--batches", type=int, default=30, help="of each way [30]")
    usage.add_argument("--threads", type=int, default=1, help="of PyTorch [1]")
    given = usage.parse_args(argv)
    torch.set_num_threads(given.threads)
    keep_memory()  # as training does: fresh pages cost more than what is copied to them
    given.out.mkdir(parents=True, exist_ok=True)
    stamp = {"environment": environment(torch.device("cpu"))}
    rows = Rows(given.out / "store.jsonl", about=stamp)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        for dtype in (torch.float32, torch.float16):
            folder = Path(name) / str(dtype).removeprefix("torch.")
            stores = {
                "video": [(_make(folder / "video", given.clips, dtype, True), 1.0)],
                "audio": [(_make(folder / "audio", given.clips, dtype, False), 1.0)],
            }
            stores["joint"] = stores["video"] + stores["audio"]
            for what, sources in stores.items():
                row = _measure(sources, given.batch, given.batches)
                row = {"store": what, "dtype": folder.name, **row, "bar": BAR}
                row["met"] = row["gb_per_s_p50"] >= BAR
                about = {"clips": given.clips, "batch": given.batch, "threads": given.threads}
                rows.add(row | about)
                print(json.dumps(row), flush=True)
    return 0


def _make(store: Path, clips: int, dtype: torch.dtype, pictures: bool) -> Path:
    """Write a store of random numbers, which leaves its files in the page cache; return it."""
    folder = store / "train"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPES if pictures else {key: SHAPES[key] for key in ("mean", "logvar")}

    def random(rows: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(rows, *shape, generator=generator).to(dtype)

    parts, texts = [], []
    for start in range(0, clips, ROWS):
        rows = min(ROWS, clips - start)
        parts.append(f"{start:08d}.safetensors")
        write_part(folder / parts[-1], {k: random(rows, s) for k, s in shapes.items()}, {})
    captions = [f"label {i % LABELS if pictures else i}" for i in range(clips)]
    distinct = ["", *dict.fromkeys(captions)]
    for start in range(0, len(distinct), ROWS):
        rows = min(ROWS, len(distinct) - start)
        texts.append(f"text-{start:08d}.safetensors")
        write_part(folder / texts[-1], {"text": random(rows, TEXT)}, {})
    index = {
        "format": FORMAT, "shards": parts, "text_shards": texts, "texts": distinct,
        "captions": captions, "latent_mean": [0.0] * 20, "latent_std": [1.0] * 20,
    }  # fmt: skip
    (folder / INDEX).write_text(json.dumps(index))
    return store


def _measure(sources: list[tuple[Path, float]], batch: int, batches: int) -> dict[str, Any]:
    store = FeatureStore(sources)
    generator = torch.Generator().manual_seed(1)
    slices = _Slices(sources)
    sizes: list[int] = []

    def sliced(clips: Tensor) -> None:
        sizes.append(slices.read(clips.tolist()))

    source = torch.ones(2**28)  # 1 GiB, beyond any cache

    def copied(clips: Tensor) -> None:
        source[: sizes[-1] // 4].clone()

    ways: dict[str, Callable[[Tensor], Any]] = {
        "safetensors_slices": sliced, "ours": store.rows, "memory_copy": copied,
    }  # fmt: skip
    walls: dict[str, list[float]] = {way: [] for way in ways}
    cpus: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(batches + 2):
        clips, _ = store.choose(batch, None, generator)
        for way, call in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call(clips)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if i >= 2:  # both to warm up
                walls[way].append(sizes[-1] / wall / 1e9)
                cpus[way].append(sizes[-1] / cpu / 1e9)
    size = statistics.mean(sizes) / batch
    found: dict[str, Any] = {"mb_per_clip": round(size / 1e6, 3)}
    for way, rates in walls.items():
        said = "" if way == "ours" else f"{way}_"
        found[f"{said}gb_per_s_p50"] = round(statistics.median(rates), 2)
        found[f"{said}gb_per_cpu_s_p50"] = round(statistics.median(cpus[way]), 2)
    found["gb_per_s_min"] = round(min(walls["ours"]), 2)
    found["clips_per_s_p50"] = round(statistics.median(walls["ours"]) * 1e9 / size)
    return found


class _Slices:
    """Reads the same rows by safetensors' own reader, one slice after the other."""

    def __init__(self, sources: list[tuple[Path, float]]) -> None:
        self.rows: list[tuple[Any, int, Any, int]] = []
        for source, _ in sources:
            folder = source / "train"
            index = json.loads((folder / INDEX).read_text())
            text = [self._open(folder / name) for name in index["text_shards"]]
            number = {caption: i for i, caption in enumerate(index["texts"])}
            parts = [self._open(folder / name) for name in index["shards"]]
            for clip, caption in enumerate(index["captions"]):
                at = number[caption]
                place = (parts[clip // ROWS], clip % ROWS, text[at // ROWS], at % ROWS)
                self.rows.append(place)

    @staticmethod
    def _open(path: Path) -> dict[str, Any]:
        file = safe_open(path, framework="pt")
        return {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118

    def read(self, clips: list[int]) -> int:
        """Read batches of the clips, in float32; return the bytes."""
        read, total = {}, 0
        for i, clip in enumerate(clips):
            part, row, text, at = self.rows[clip]
            pieces = {key: piece[row] for key, piece in part.items()} | {"text": text["text"][at]}
            for key, piece in pieces.items():
                if key not in read:
                    read[key] = torch.zeros(len(clips), *piece.shape)
                read[key][i] = piece
                total += piece.nbytes
        return total
