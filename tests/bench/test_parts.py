"""The parts of models are judged alone, and the judges are right where the answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import parts
from mfmjt.codec import MelSpectrogram
from mfmjt.evaluate.classifier import Classifier, ClassifierConfig
from tests.support.bundles import write_ends
from tests.support.recordings import write_recordings


def test_what_comes_out_as_it_went_in_is_at_distance_0() -> None:
    rng = np.random.default_rng(0)
    sounds = [rng.standard_normal(n).astype(np.float32) / 8 for n in (300, 5000)]
    same = parts.reconstructions(lambda wave: torch.nn.functional.pad(wave, (0, 7)), iter(sounds))
    assert same == {"mel": 0.0, "log": 0.0, "linear": 0.0, "stft": 0.0}
    # Half as loud: by log10 2 in mels, by log 2 in nepers but near the floor, by half in the norm.
    half = parts.reconstructions(lambda wave: wave / 2, iter(sounds[1:]))
    assert half["linear"] == pytest.approx(0.5, abs=1e-3)
    assert half["mel"] == pytest.approx(np.log10(2), abs=1e-2)
    assert half["stft"] == pytest.approx(half["log"] + half["linear"], abs=2e-4)


def test_griffin_lim_gives_a_sound_with_that_mel() -> None:
    generator = torch.Generator().manual_seed(0)
    decay = torch.exp(-3 * torch.arange(16384) / 16000)
    wave, other = (0.1 * torch.randn(2, 16384, generator=generator) * decay).split(1)
    mel = MelSpectrogram("16k")
    made = parts.griffin_lim(mel(wave), wave.shape[1])
    assert made.shape == wave.shape
    # Nearer than another noise of the same course by far: its own bands are in the mel.
    distances = [float((mel(x) - mel(wave)).abs().mean()) for x in (made, other)]
    assert distances[0] < distances[1] / 2


def test_a_folder_is_judged_by_what_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_recordings(tmp_path / "corpus", labels=("dog", "rain"))
    model = tmp_path / "model"
    model.mkdir()
    write_ends(model)
    Classifier(ClassifierConfig(classes=("dog",))).save(model / "classifier.safetensors")
    out = tmp_path / "results"
    assert parts.main([str(corpus), str(model), "--out", str(out)]) == 0
    found = json.loads((out / "parts.json").read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert found["recordings"] == 4
    assert set(found["model"]) == {"codec", "text", "classifier"}
    # Two recordings are of dogs, and it knows nothing else.
    assert found["model"]["classifier"] == {"all": [1.0, 2], "dog": [1.0, 2]}
    # Of two labels none is hard to guess, of all some are.
    text = found["model"]["text"]
    assert text["largest"]["reworded"] > text["all"]["reworded"]
    assert set(found["griffin_lim"]) == set(found["model"]["codec"])
