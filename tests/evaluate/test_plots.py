from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from mfmjt.data import foley
from mfmjt.errors import InputError
from mfmjt.evaluate.examples import Examples
from mfmjt.evaluate.plots import plot_gallery, plot_steps
from mfmjt.evaluate.report import Report


def report(model: str, steps: int, f1: float) -> Report:
    return Report(
        model=model, clips=4, split="test", seed=0, steps=steps, guidance=1.5, mode="cfg_scaled",
        conditions="both", instantaneous=False, figures={"onset_f1": f1, "onset_f1_real": 0.9},
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
    made = [foley.clip(i, "test", duration=1.0, render=False) for i in range(5)]
    clips = Examples(
        indices=list(range(5)), split="test", seed=0, captions=[c.caption for c in made],
        features={}, audio=torch.stack([torch.from_numpy(c.audio) for c in made]),
        sample_rate=foley.SAMPLE_RATE, labels=torch.tensor([c.label for c in made]),
        events=[np.asarray(c.events) for c in made],
    )  # fmt: skip
    plot_gallery(clips, torch.zeros_like(clips.audio), tmp_path / "gallery.svg")
    text = text_of(tmp_path / "gallery.svg")
    assert all(word in text for word in ("ball wood", "drum", "real", "generated", "onsets"))
    assert "ball glass" not in text
    unknown = dataclasses.replace(clips, labels=None, events=None)
    plot_gallery(unknown, clips.audio, tmp_path / "unknown.svg")
    assert clips.captions[4] in text_of(tmp_path / "unknown.svg")


def test_nothing_to_plot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no reports"):
        plot_steps([], tmp_path / "a.svg")


def test_without_matplotlib_the_message_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"mfmjt\[plot\]"):
        plot_steps([report("MeanFlow", 1, 0.5)], tmp_path / "a.svg")
    assert not (tmp_path / "a.svg").exists()
