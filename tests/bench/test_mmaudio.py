"""The bench of MMAudio's own parts runs, and its rows say what they are held to."""

from __future__ import annotations

import json
from pathlib import Path

from bench.networks import mmaudio


def test_a_row_has_its_target_and_its_environment(tmp_path: Path, capsys) -> None:
    for _ in range(2):
        mmaudio.main(["--out", str(tmp_path), "--smoke", "--part", "video"])
    rows = [json.loads(line) for line in (tmp_path / "ends.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["part"] == "video"
        assert row["bar"] == mmaudio.TARGETS["video"].limit
        assert row["value"] > 0
        assert row["cpu_ms_p50"] > 0
        assert row["environment"]["torch"]
        assert row["smoke"]
    met = "pass" if row["value"] <= row["bar"] else "MISS"
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{met}          video: ")
