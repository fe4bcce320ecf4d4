from __future__ import annotations

import json
from pathlib import Path

import pytest

from mfmjt.errors import InputError
from mfmjt.evaluate.metrics import METRICS
from mfmjt.evaluate.report import Report, read_reports, table, write_report

RESULTS = Path(__file__).parents[2] / "bench/results/nano"


def test_a_report_holds_every_figure_and_is_json(report: Report) -> None:
    values = json.loads(report.to_json())
    figures = {figure.key for metric in METRICS for figure in metric.figures}
    assert figures == report.figures.keys() <= values.keys()
    shares = [name for name in figures if "f1" in name or "accuracy" in name or "kept" in name]
    assert len(shares) >= 10
    for name in (*shares, "onset_precision", "onset_recall"):
        assert 0 <= values[name] <= 1
    for name in ("frechet", "frechet_real", "frechet_codec", "text_frechet"):
        assert values[name] >= 0
    for name, (low, high) in values["interval"].items():
        assert low <= values[name] <= high
    assert (values["clips"], values["impact_clips"]) == (3, 3)
    assert set(values["per_class"]) == {"ball_rubber", "drum", "footsteps"}
    assert set(values["per_class"]["drum"]) == {
        "clips",
        "onset_f1",
        "class_accuracy",
        "text_class_accuracy",
    }
    stages = {"render", "encode", "generate", "decode", "judge", "codec"}
    assert set(values["seconds_per_clip"]) == stages
    assert {"date", "torch", "device", "threads"} <= set(values["environment"])


def test_the_real_audio_scores_as_the_detector_does(report: Report) -> None:
    assert report.figures["onset_f1_real"] == 1
    assert report.figures["onset_f1_real_shuffled"] < 1


def test_reports_survive_the_file(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "evaluate_meanflow_1.json")
    assert read_reports(tmp_path) == [report]
    with pytest.raises(InputError, match="No evaluate"):
        read_reports(tmp_path / "absent")


def test_the_committed_reports_give_the_committed_table() -> None:
    assert table(read_reports(RESULTS)) == (RESULTS / "table.md").read_text()
