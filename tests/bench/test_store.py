"""The bench of the feature store runs, and its rows say what they are held to."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench.data import bench_store


def test_rows_have_a_bar_and_what_they_are_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_store, "SHAPES", dict.fromkeys(bench_store.SHAPES, (8, 20)))
    monkeypatch.setattr(bench_store, "TEXT", (2, 4))
    monkeypatch.setattr(bench_store, "LABELS", 3)
    arguments = ["--out", str(tmp_path), "--clips", "70", "--batch", "4", "--batches", "2"]
    monkeypatch.setattr(sys, "argv", ["bench_store", *arguments])
    bench_store.main()
    rows = [json.loads(line) for line in (tmp_path / "store.jsonl").read_text().splitlines()]
    assert [(row["store"], row["dtype"]) for row in rows] == [
        (store, dtype) for dtype in ("float32", "float16") for store in ("video", "audio", "joint")
    ]
    # Four features of 160 numbers with pictures, two without, and one of 8 of the caption.
    sizes = [4 * 648e-6, 4 * 328e-6]
    assert [row["mb_per_clip"] for row in rows[:2]] == pytest.approx(sizes, abs=5e-4)
    for row in rows:
        assert row["met"] == (row["gb_per_s_p50"] >= bench_store.BAR)
        assert row["environment"]["torch"]
