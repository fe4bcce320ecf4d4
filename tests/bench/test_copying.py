"""Copies of training recordings are found, however loud or transposed; other sounds are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import copying
from mfmjt.data.recordings import Recording
from tests.support.bundles import write_model
from tests.support.open_corpus import write_corpus


def sound(seed: int, seconds: float = 1.5) -> torch.Tensor:
    """Make bursts of noise of a random spectrum at random times."""
    rng = np.random.default_rng(seed)
    samples = round(16000 * seconds)
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    octave = np.log2(np.maximum(np.fft.rfftfreq(samples, 1 / 16000), 100) / 100)
    gains = np.interp(octave, np.arange(8), rng.normal(0, 15, 8))
    wave = np.fft.irfft(spectrum * 10 ** (gains / 20), samples)
    at = np.arange(samples)[:, None] / 16000 - rng.uniform(0.2, seconds - 0.5, 4)
    envelope = np.where(at > 0, np.exp(-at / 0.1), 0).sum(axis=1)
    return torch.from_numpy((wave * envelope).astype(np.float32))


def test_a_copy_is_found_and_another_sound_is_not() -> None:
    known = [sound(seed) for seed in range(8)]
    lead = torch.zeros(9 * copying.HOP)
    copies = [torch.cat([lead, 0.01 * known[3]]), known[5] + 0.003 * known[5].std() * sound(99)]
    made = torch.stack([copying.patch(wave) for wave in (*copies, sound(20))])
    alike, where = copying.nearest(made, known)
    assert where[:2].tolist() == [3, 5]
    assert float(alike[:2].min()) > 0.99 > 0.9 > float(alike[2])


def test_a_band_higher_is_a_copy_still() -> None:
    wave = sound(1)
    found = copying.patch(wave)
    higher = torch.nn.functional.pad(found, (0, 0, 1, 0))[: copying.BANDS]
    higher = (higher - higher.mean())[None]
    alike, _ = copying.nearest(higher / higher.norm(), [wave])
    assert float(alike[0]) > 0.95


def test_takes_are_other_recordings_of_one_thing() -> None:
    def row(name: str, caption: str, author: str = "a") -> Recording:
        return Recording(name, 0, 1, "train", "dog", caption, "set", "CC0", author)

    rows = [row("x_000", "bark"), row("x_001", "bark"), row("y_000", "bark"), row("z_000", "howl")]
    assert [[r.id for r in group] for group in copying.takes(rows)] == [["x_000", "y_000"]]
    assert copying.takes([row("x_000", "bark"), row("y_000", "bark", "b")]) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    model = write_model(tmp_path / "model")
    assert copying.main([str(corpus), str(model), "--clips", "2", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "copying.json").read_text())
    assert found == json.loads(capsys.readouterr().out)
    # Two takes of each label in a split, of which tones and the same strokes sound.
    assert found["takes"]["sounds"] == 18
    assert found["scenes"]["sounds"] == found["texts"]["sounds"] == 2
    assert found["held out"]["sounds"] == 18
