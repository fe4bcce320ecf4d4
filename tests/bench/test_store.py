"""The bench of the feature store runs, and its rows say what they are held to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import store


def test_rows_have_a_bar_and_what_they_are_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SHAPES", dict.fromkeys(store.SHAPES, (8, 20)))
    monkeypatch.setattr(store, "TEXT", (2, 4))
    monkeypatch.setattr(store, "LABELS", 3)
    arguments = ["--out", str(tmp_path), "--clips", "70", "--batch", "4", "--batches", "2"]
    assert store.main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "store.jsonl").read_text().splitlines()]
    assert [(row["store"], row["dtype"]) for row in rows] == [
        (store, dtype) for dtype in ("float32", "float16") for store in ("video", "audio", "joint")
    ]
    # Four features of 160 numbers with pictures, two without, and one of 8 of the caption.
    sizes = [4 * 648e-6, 4 * 328e-6]
    assert [row["mb_per_clip"] for row in rows[:2]] == pytest.approx(sizes, abs=5e-4)
    for row in rows:
        assert row["met"] == (row["gb_per_s_p50"] >= store.BAR)
        assert row["environment"]["torch"]
