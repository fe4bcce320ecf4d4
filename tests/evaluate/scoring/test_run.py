from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from mfmjt.data import foley
from mfmjt.errors import InputError, RunError
from mfmjt.evaluate import score, statistics
from mfmjt.evaluate.classifier import load_classifier
from mfmjt.evaluate.listening import file_digest
from mfmjt.evaluate.metrics import Figure, Metric, Score
from mfmjt.evaluate.resample import resample
from mfmjt.evaluate.scoring import Result, save_report
from tests.evaluate.scoring.conftest import RATE, Write, sound
from tests.support.commands import refused, run


def _distance(made: Any, real: Any, known: Any) -> Score:
    each = np.linalg.norm(made.embedding - real.embedding, axis=1)
    distance = statistics.frechet(made.embedding, real.embedding)
    return Score({"distance": distance, "mean": float(each.mean())}, per_clip={"mean": each})


# The networks with published weights are too large for these tests; the classifier that ships goes
# the same way.
DISTANCE = Metric(
    "distance", (Figure("distance", "my distance", 2), Figure("mean")), _distance, ("classifier",)
)


def scored(folders: tuple[Path, Path], **options: Any) -> Result:
    return score(*folders, metrics=[DISTANCE], **{"workers": 1, "device": "cpu", **options})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_the_figures_are_those_of_the_sounds(folders: tuple[Path, Path], cache: Path) -> None:
    result = scored(folders, cache=cache)
    judge, embeddings = load_classifier(), []
    for folder in folders:
        waves = [soundfile.read(folder / f"clip{i}.wav", dtype="float32")[0] for i in range(10)]
        batch = torch.from_numpy(np.stack(waves))
        embeddings.append(judge.judge(batch - batch.mean(1, True))[1])
    expected = statistics.frechet(*embeddings)
    # One clip at a time, and sums in another order: float32 through four layers.
    assert result.figures["distance"] == pytest.approx(expected, rel=1e-4)
    assert (result.clips, result.seconds, result.problems) == (10, 1.0, [])
    assert result.per_clip["clip3"]["seconds"] == 1.0
    mean = np.mean([values["mean"] for values in result.per_clip.values()])
    assert mean == pytest.approx(result.figures["mean"])


def test_one_set_of_clips_and_every_reason(
    folders: tuple[Path, Path], write: Write, cache: Path
) -> None:
    whole = scored(folders, cache=cache)
    write("made/silent.wav", np.zeros(RATE)), write("real/silent.wav", 3)
    write("made/broken.wav", 1), write("real/broken.wav", 4)
    (folders[1] / "broken.wav").write_bytes(b"no sound")
    write("made/short.wav", sound(1, seconds=0.1)), write("real/short.wav", 5)
    nan = sound(2)
    nan[7] = np.nan
    write("made/nan.wav", nan, subtype="FLOAT"), write("real/nan.wav", 2)
    write("made/alone.wav", 6)
    result = scored(folders, cache=cache)
    assert result.figures == whole.figures
    assert result.clips == 10
    told = {(problem.side, problem.name): problem.why for problem in result.problems}
    assert told.keys() == {
        ("generated", "silent"), ("reference", "broken"), ("generated", "short"),
        ("generated", "nan"), ("generated", "alone"),
    }  # fmt: skip
    assert any("generated (1): short: it is 0.10 s long" in line for line in result.summary())


def test_rates_and_channels_are_mixed_down_and_said(
    folders: tuple[Path, Path], write: Write, cache: Path
) -> None:
    fast = resample(torch.from_numpy(sound(0)), RATE, 48000).numpy()
    write("real/clip0.wav", np.stack([fast, fast], axis=1), rate=48000)
    write("real/clip1.wav", 0)
    result = scored(folders, cache=cache)
    notes = " ".join(result.notes)
    assert "16000 Hz (9), 48000 Hz (1)" in notes
    assert "1 reference sounds have several channels" in notes
    assert result.clips == 10


def test_equal_files_are_said(folders: tuple[Path, Path], cache: Path) -> None:
    shutil.copy(folders[0] / "clip1.wav", folders[0] / "clip2.wav")
    assert "1 generated files have the same content" in " ".join(scored(folders, cache=cache).notes)


def features(cache: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in cache.rglob("[!.]*.safetensors")}


def test_features_are_kept_by_content(
    folders: tuple[Path, Path], write: Write, cache: Path
) -> None:
    first = scored(folders, cache=cache)
    kept = features(cache)
    assert len(kept) == 20
    (folders[0] / "clip0.wav").touch()
    again = scored(folders, cache=cache)
    assert again.figures == first.figures
    assert features(cache) == kept
    write("made/clip0.wav", 77)
    changed = scored(folders, cache=cache)
    assert changed.figures["distance"] != first.figures["distance"]
    assert len(features(cache)) == 21
    digest = file_digest(folders[0] / "clip0.wav")
    assert [path.stem for path in features(cache) if path not in kept] == [digest]


def test_a_cache_of_other_weights_or_another_length_is_not_used(
    folders: tuple[Path, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scored(folders, cache=cache)
    shorter = scored(folders, cache=cache, seconds=0.5)
    assert shorter.figures != first.figures
    assert len(features(cache)) == 40
    # The same features under the name of other weights: the directory is the digest's.
    (own,) = cache.glob("classifier-*")
    own.rename(own.with_name("classifier-0123456789abcdef"))
    assert scored(folders, cache=cache).figures == first.figures
    assert len(list(cache.glob("classifier-*"))) == 2


def test_a_damaged_feature_is_told(folders: tuple[Path, Path], cache: Path) -> None:
    scored(folders, cache=cache)
    path = next(iter(features(cache)))
    path.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"damaged or gone. Delete it"):
        scored(folders, cache=cache)


SCRIPT = """
import sys
from tests.evaluate.scoring.test_run import scored
scored((sys.argv[1], sys.argv[2]), cache=sys.argv[3], workers=int(sys.argv[4]))
"""


def test_processes_that_are_killed_and_one_that_goes_on_give_the_same_bits(
    folders: tuple[Path, Path], write: Write, cache: Path
) -> None:
    for i in range(10, 40):  # enough that they are killed on the way
        write(f"made/clip{i}.wav", sound(i, noise=0.05)), write(f"real/clip{i}.wav", i)
    whole = scored(folders, cache=cache.with_name("whole"))
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, folders), str(cache), "2"],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        cwd=root,
    )
    deadline = time.monotonic() + 120
    while len(features(cache)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(features(cache))
    assert there >= 5
    again = scored(folders, cache=cache)
    assert again.figures == whole.figures
    assert again.per_clip == whole.per_clip
    assert len(features(cache)) == len(features(cache.with_name("whole")))


def test_a_process_that_dies_is_told(
    folders: tuple[Path, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RunError, match="ended with status 1"):
        scored(folders, cache=cache, workers=2)


def test_clips_with_a_known_truth_are_judged(folders: tuple[Path, Path], tmp_path: Path) -> None:
    lines = ["id,class,events"]
    for i in range(10):
        events = " ".join(f"{t:.3f}" for t in (0.1, 0.5 + 0.01 * i))
        lines.append(f"clip{i},{foley.CLASSES[i % 3]},{events}")
    (tmp_path / "truth.csv").write_text("\n".join(lines) + "\n")
    result = score(
        *folders, tmp_path / "truth.csv", cache=tmp_path / "cache", workers=1, device="cpu"
    )
    assert {"onset_f1", "class_accuracy", "class_accuracy_real"} <= result.figures.keys()
    assert result.per_class[foley.CLASSES[0]]["clips"] == 4.0
    assert "class_accuracy" in result.per_class[foley.CLASSES[0]]
    missing = result.left_out["fd_panns"]
    assert "Cnn14_16k_mAP=0.438.pth is missing (no folder of weights is given)" in missing
    assert "https://zenodo.org/records/3987831, license CC-BY-4.0" in missing


def test_without_anything_to_compute_it_is_an_error(
    folders: tuple[Path, Path], tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(InputError, match=r"No metric can be computed.*vggish-10086976.pth"):
        score(*folders, metrics=["fd"], cache=cache)
    weights = tmp_path / "weights"
    weights.mkdir()
    torch.save({"features.0.weight": torch.zeros(3)}, weights / "vggish-10086976.pth")
    with pytest.raises(InputError, match=r"vggish-10086976\.pth has 0\.1M bytes"):
        score(*folders, metrics=["fd_vggish"], weights=weights, cache=cache)
    with pytest.raises(InputError, match="no state dict of VGGish"):
        score(
            *folders, metrics=["fd_vggish"], weights=weights, cache=cache, check="name", workers=1
        )
    for i in range(10):
        (folders[0] / f"clip{i}.wav").write_bytes(b"")
    with pytest.raises(InputError, match="None of the 10 generated sounds can be read"):
        scored(folders, cache=cache)
    with pytest.raises(InputError, match="No pair of clips can be scored: generated clip0"):
        scored(folders, cache=cache, seconds=1)


def test_clips_too_short_for_a_network_leave_it_out(
    folders: tuple[Path, Path], cache: Path
) -> None:
    result = score(
        *folders, metrics=["fd_vggish", DISTANCE], seconds=0.3, cache=cache, workers=1, device="cpu"
    )
    assert "needs clips of at least 0.975 s" in result.left_out["fd_vggish"]
    assert result.clips == 10


def test_one_clip_has_no_distance_but_its_own_figures(
    write: Write, tmp_path: Path, cache: Path
) -> None:
    write("made/one.wav", 0), write("real/one.wav", 1)
    with pytest.raises(InputError, match="at least 2 are needed"):
        scored((tmp_path / "made", tmp_path / "real"), cache=cache)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"protocol": "other"}, "No protocol 'other'"),
        ({"metrics": ["nonsense"]}, "no metric 'nonsense'"),
        ({"metrics": []}, "No metric was chosen"),
        ({"seconds": 0.0}, "0 s of each clip"),
        ({"check": "no"}, "No check 'no'"),
        ({"weights": "/nowhere"}, "no folder /nowhere of weights"),
        ({"workers": 0}, "0 workers"),
    ],
)
def test_arguments_that_are_none_are_refused(
    folders: tuple[Path, Path], cache: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        score(*folders, **{"metrics": [DISTANCE], "cache": cache, "device": "cpu", **options})


def test_the_report_holds_table_sounds_classes_and_lengths(
    folders: tuple[Path, Path], write: Write, tmp_path: Path, cache: Path
) -> None:
    write("made/clip9.wav", sound(9, seconds=3.0))
    lines = ["id,class", *(f"clip{i},kind <{i % 2}>" for i in range(10))]
    (tmp_path / "classes.csv").write_text("\n".join(lines) + "\n")
    result = scored(folders, captions=tmp_path / "classes.csv", cache=cache)
    # What has a place in the table of the field's metrics.
    for values in result.per_clip.values():
        values["kl_panns"] = values["mean"]
    for values in result.per_class.values():
        values["kl_panns"] = values["mean"]
    result.figures["kl_panns"], result.interval["kl_panns"] = 0.5, (0.4, 0.6)
    save_report(result, tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<td>0.400 to 0.600</td>" in page
    assert page.count("<audio") == 12
    assert "data:audio/flac;base64," in page
    assert "kind &lt;1&gt;" in page
    assert page.count("<circle") == 10
    assert "http" not in page
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| KL (PANNs) | 0.500 | 0.400 to 0.600 | 0.000 | lower |" in text
    assert "](<../made/clip" in text


def test_the_command(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.py"
    own.write_text("from tests.evaluate.scoring.test_run import DISTANCE\n")
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "scores.json"
    told = run(
        "score", folders[0], "--reference", folders[1], "--metric", "own:DISTANCE",
        "--cache", tmp_path / "cache", "--workers", "1", "--device", "cpu", "--json", out,
        "--report", tmp_path / "report",
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    assert "10 pairs of clips, 1 s of each, protocol default." in told.stderr
    assert "| my distance | " in told.stdout
    values = json.loads(out.read_text())
    assert values["figures"].keys() == {"distance", "mean"}
    assert (tmp_path / "report" / "index.html").is_file()
    refused(run("score", folders[0], "--cache", tmp_path / "cache"), 2, "--reference")
    refused(
        run("score", folders[0], "--reference", folders[1], "--cache", tmp_path / "cache"),
        2, "No metric can be computed",
    )  # fmt: skip
    refused(run("score", folders[0], "--reference", folders[1], "--metrics", " "), 2, "--metrics")
