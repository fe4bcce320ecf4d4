"""The bench of the real ends runs, and its rows say what they are held to."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench.model import bench_ends


def test_a_row_has_its_bar_and_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--smoke", "--calls", "2", "--threads", "1", "--part", "video"]
    monkeypatch.setattr(sys, "argv", ["bench_ends", "--out", str(tmp_path), *arguments])
    for _ in range(2):
        bench_ends.main()
    rows = [json.loads(line) for line in (tmp_path / "ends.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["part"] == "video"
        assert row["bar"] == bench_ends.BARS["video"]
        assert row["met"] == (row["value"] <= row["bar"])
        assert row["value"] == row["cpu_s_p50"] > 0
        assert row["environment"]["torch"]
        assert row["smoke"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["part"] == "video"
