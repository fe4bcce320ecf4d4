"""Every experiment trains, probes, draws and writes its page.

Two networks at most are trained for each, of one seed; their rows stand for those of all networks
and seeds, so that what reads the rows runs on real ones.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from mfmjt.experiment.base import Row
from mfmjt.experiment.grid import Grid, Job
from mfmjt.experiment.page import write_page
from mfmjt.experiment.work import work

TRAINED = {
    "guidance": ("MeanFlow",),
    "steps": ("flow matching",),
    "scale": ("1/16 of the clips, 10 %",),
    "elsewhere": ("flow matching", "rectified"),
    "length": ("learned",),
    "joint": ("text alone", "text, then video, parts frozen"),
    "objectives": ("flow matching", "teacher rollout"),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_page(name: str, features: Grid, tmp_path: Path) -> None:
    own = dataclasses.replace(features, name=name)
    (own.folder / "parts").mkdir(parents=True)
    arms, found, seen = own.arms(), [], []
    for arm in TRAINED[name]:
        work(own, Job(arm, 0))
        part = json.loads(own.result(Job(arm, 0)).read_text())
        assert len(part["rows"]) == len(arms[arm].ways)
        found += part["rows"]
        seen += part["probes"]
    ways = {json.dumps({k: row[k] for k in arms[row["arm"]].ways[0].about}): row for row in found}
    rows: list[Row] = []
    probes: list[Row] = []
    for arm in arms.values():
        for seed in range(3):
            about = {"arm": arm.name, **arm.at, "seed": seed}
            for way in arm.ways:
                row = ways.get(json.dumps(way.about), found[0])
                rows.append(row | about | way.about)
            if not arm.settings or "validate_every" in arm.settings or name == "length":
                probes += [row | about for row in seen]
    about = own.about() | {"seeds": 3, "cpu": "", "digest": "", "training_core_minutes": 0}
    for file, lines in (("rows.jsonl", rows), ("probes.jsonl", probes)):
        (tmp_path / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "experiment.json").write_text(json.dumps(about))
    page = write_page(tmp_path, tmp_path / "page.md").read_text()
    for svg in tmp_path.glob("*.svg"):
        assert f"]({svg.name})" in page
    assert page.count("](") == 3 + len(list(tmp_path.glob("*.svg")))  # and the files
    assert not re.search(r"\bnan\b", page)
