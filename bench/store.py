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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bench import parser
from bench.clock import on_cpu
from bench.machine import environment
from bench.rows import Row, Rows
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
    usage = parser("store", __doc__, out="")
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

    def write(name: str, count: int, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Write files of random numbers; return their names."""
        names = []
        for start in range(0, count, ROWS):
            rows = min(ROWS, count - start)
            names.append(f"{name}{start:08d}.safetensors")
            numbers = {k: torch.randn(rows, *s, generator=generator) for k, s in shapes.items()}
            write_part(folder / names[-1], {k: x.to(dtype) for k, x in numbers.items()}, {})
        return names

    captions = [f"label {i % LABELS if pictures else i}" for i in range(clips)]
    distinct = ["", *dict.fromkeys(captions)]
    parts, texts = write("", clips, shapes), write("text-", len(distinct), {"text": TEXT})
    index = {
        "format": FORMAT, "shards": parts, "text_shards": texts, "texts": distinct,
        "captions": captions, "latent_mean": [0.0] * 20, "latent_std": [1.0] * 20,
    }  # fmt: skip
    (folder / INDEX).write_text(json.dumps(index))
    return store


def _measure(sources: list[tuple[Path, float]], batch: int, batches: int) -> Row:
    store, slices = FeatureStore(sources), _Slices(sources)
    generator = torch.Generator().manual_seed(1)
    source = torch.ones(2**28)  # 1 GiB, beyond any cache
    sizes: list[int] = []
    rates: dict[str, list[tuple[float, float]]] = {}
    for i in range(batches + 2):
        clips, _ = store.choose(batch, None, generator)
        ways: dict[str, Callable[[], object]] = {
            "safetensors_slices_": lambda: sizes.append(slices.read(clips.tolist())),  # noqa: B023
            "": lambda: store.rows(clips),  # noqa: B023
            "memory_copy_": lambda: source[: sizes[-1] // 4].clone(),
        }
        for way, call in ways.items():
            wall, cpu = on_cpu(call)()
            if i >= 2:  # both to warm up
                rates.setdefault(way, []).append((sizes[-1] / wall / 1e6, sizes[-1] / cpu / 1e6))
    size = statistics.mean(sizes) / batch
    found: Row = {"mb_per_clip": round(size / 1e6, 3)}
    for way, both in rates.items():
        for clock, values in zip(("s", "cpu_s"), zip(*both, strict=True), strict=True):
            found[f"{way}gb_per_{clock}_p50"] = round(statistics.median(values), 2)
    ours = [wall for wall, _ in rates[""]]
    found["gb_per_s_min"] = round(min(ours), 2)
    found["clips_per_s_p50"] = round(statistics.median(ours) * 1e9 / size)
    return found


class _Slices:
    """Reads the same rows by safetensors' own reader, one slice after the other."""

    def __init__(self, sources: list[tuple[Path, float]]) -> None:
        self.rows: list[list[tuple[str, Any, int]]] = []
        for source, _ in sources:
            folder = source / "train"
            index = json.loads((folder / INDEX).read_text())
            number = {caption: i for i, caption in enumerate(index["texts"])}
            texts, parts = (
                [safe_open(folder / name, framework="pt") for name in index[shards]]
                for shards in ("text_shards", "shards")
            )
            for clip, caption in enumerate(index["captions"]):
                places = ((parts, clip), (texts, number[caption]))
                files = [(files[at // ROWS], at % ROWS) for files, at in places]
                pieces = [(k, f.get_slice(k), row) for f, row in files for k in f.keys()]  # noqa: SIM118
                self.rows.append(pieces)

    def read(self, clips: list[int]) -> int:
        """Read batches of the clips, in float32; return the bytes."""
        read, total = {}, 0
        for i, clip in enumerate(clips):
            for key, features, row in self.rows[clip]:
                piece = features[row]
                if key not in read:
                    read[key] = torch.zeros(len(clips), *piece.shape)
                read[key][i] = piece
                total += piece.nbytes
        return total
