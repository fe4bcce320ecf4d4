from __future__ import annotations

import json
from pathlib import Path

import pytest

from mfmjt.families import open_bundle
from mfmjt.features.procedural import write_store
from tests.support.clips import write_video
from tests.support.commands import refused, run


def test_evaluate_prints_one_object(here: Path, model_folder: Path) -> None:
    result = run("evaluate", "--model", model_folder, "--clips", 3, "--json", "-o", "e.json",
                 "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert {"onset_f1", "onset_f1_shuffled", "class_accuracy", "frechet"} <= figures.keys()
    assert json.loads((here / "e.json").read_text()) == figures
    refused(run("evaluate", "--model", model_folder, "--clips", 0), 2, "0 clips")
    refused(run("evaluate", "-o", "no/where.json"), 1, "Cannot write")


def test_a_store_is_judged_by_what_it_holds(here: Path, model_folder: Path) -> None:
    bundle = open_bundle(model_folder).to("cpu")
    write_store("store", {"test": 3}, bundle.codec, bundle.encoders, workers=0)
    result = run("evaluate", "--model", model_folder, "--data", "store", "--clips", 3, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["clips"] == 3
    assert figures["onset_f1"] is not None
    assert figures["codec_class_kept"] is None
    refused(run("evaluate", "--data", "store", "--split", "train"), 2, "Cannot read features")


def test_a_folder_of_videos_is_judged(here: Path, model_folder: Path) -> None:
    (here / "clips").mkdir()
    for number in range(3):
        write_video(here / "clips" / f"{number}.mp4", frames=40 + number, sound=True)
    result = run("evaluate", "--model", model_folder, "--data", "clips", "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert (figures["clips"], figures["onset_f1"]) == (3, None)
    assert figures["frechet"] > 0
    (here / "empty").mkdir()
    refused(run("evaluate", "--data", "empty"), 2, "neither a feature store nor videos")


def test_the_whole_table(here: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "own.py").write_text(
        "from mfmjt.evaluate.metrics import Figure, Metric, Score\n"
        "def score(made, real, examples):\n"
        "    return Score({'peak': float(made.waves.abs().max())})\n"
        "peak = Metric('peak', (Figure('peak', 'loudest'),), score)\n"
    )
    monkeypatch.syspath_prepend(here)
    result = run(
        *("evaluate", "--model", model_folder, "--suite", "results", "--clips", 2),
        *("--against", model_folder / "network.safetensors", "--metric", "own:peak"),
        *("--plot", "results/gallery.svg"),
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == (here / "results/table.md").read_text()
    assert "loudest" in result.stdout
    names = {f"evaluate_{kind}_{n}.json" for kind in ("meanflow", "flow") for n in (1, 2, 4, 25)}
    assert {path.name for path in (here / "results").iterdir()} == {
        *names,
        "table.md",
        "steps.svg",
        "gallery.svg",
    }


def test_misuse_of_evaluate(here: Path) -> None:
    refused(run("evaluate", "--against", "flow.safetensors"), 2, "--suite")
    refused(run("evaluate", "--suite", "results", "--steps", 4), 2, "--steps")
    refused(run("evaluate", "--metric", "no.such:thing"), 2, "cannot be imported")
    refused(run("evaluate", "--metric", "loudness"), 2, "no metric 'loudness'")
    refused(run("evaluate", "--guidance-mode", "none at all"), 2, "none at all")
