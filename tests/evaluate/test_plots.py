from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from mfmjt.data import foley
from mfmjt.errors import InputError
from mfmjt.evaluate.experiment import Examples, Report
from mfmjt.evaluate.plots import plot_gallery, plot_learning_curves, plot_steps


def report(model: str, steps: int, f1: float) -> Report:
    return Report(
        model=model, clips=4, impact_clips=3, split="test", seed=0, steps=steps, guidance=1.5,
        mode="cfg_scaled", conditions="both", instantaneous=False, onset_f1=f1,
        interval={"onset_f1": (f1 - 0.1, f1 + 0.1)},
    )  # fmt: skip


def text_of(path: Path) -> str:
    return " ".join(ElementTree.parse(path).getroot().itertext())


def test_steps_are_drawn_for_every_network_and_repeat_to_the_byte(tmp_path: Path) -> None:
    reports = [report(m, s, 0.1 * s) for m in ("MeanFlow", "flow matching") for s in (1, 4)]
    plot_steps(reports, tmp_path / "a.svg")
    plot_steps(reports, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    text = text_of(tmp_path / "a.svg")
    assert all(word in text for word in ("MeanFlow", "flow matching", "onset F1", "real audio"))


def test_the_gallery_shows_real_beside_generated(tmp_path: Path) -> None:
    made = [foley.clip(i, "test", duration=1.0, render=False) for i in (0, 6)]
    clips = Examples(
        indices=[0, 6], split="test", seconds={},
        audio=torch.stack([torch.from_numpy(c.audio) for c in made]),
        labels=torch.tensor([c.label for c in made]),
        events=[np.asarray(c.events) for c in made],
        captions=[c.caption for c in made],
        video=torch.empty(2, 0, 0), sync=torch.empty(2, 0, 0), text=torch.empty(2, 0, 0),
    )  # fmt: skip
    plot_gallery(clips, torch.zeros_like(clips.audio), tmp_path / "gallery.svg", rows=(0, 1))
    plot_gallery(clips, clips.audio, tmp_path / "default.svg")
    assert "rain" not in text_of(tmp_path / "default.svg")
    text = text_of(tmp_path / "gallery.svg")
    assert all(word in text for word in ("ball wood, real", "ball wood, generated", "rain, real"))
    with pytest.raises(InputError, match="other rows"):
        plot_gallery(clips, clips.audio, tmp_path / "gallery.svg", rows=(2,))


def test_learning_curves_are_drawn_from_the_logs(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [{"step": 0, "config": {}}, *({"step": s, "loss": 1 / s} for s in range(1, 2000))]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_learning_curves({"nano": log}, tmp_path / "curves.svg")
    assert "nano" in text_of(tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").stat().st_size < 100_000
    with pytest.raises(InputError, match="No log holds"):
        plot_learning_curves({"nano": log}, tmp_path / "curves.svg", keys=("pitch",))
    with pytest.raises(InputError, match="no training log"):
        plot_learning_curves({"nano": tmp_path / "absent"}, tmp_path / "curves.svg")


def test_nothing_to_plot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no reports"):
        plot_steps([], tmp_path / "a.svg")


def test_without_matplotlib_the_message_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"mfmjt\[plot\]"):
        plot_steps([report("MeanFlow", 1, 0.5)], tmp_path / "a.svg")
    assert not (tmp_path / "a.svg").exists()
