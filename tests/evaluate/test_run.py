from __future__ import annotations

from pathlib import Path

from mfmjt.evaluate.classifier import Classifier
from mfmjt.evaluate.examples import Examples
from mfmjt.evaluate.report import Report, read_reports, table
from mfmjt.evaluate.run import evaluate, suite
from mfmjt.families import Bundle


def test_equal_arguments_give_equal_figures(
    bundle: Bundle, classifier: Classifier, clips: Examples, report: Report
) -> None:
    again = evaluate(bundle, clips, classifier=classifier, batch=2)
    assert (again.figures, again.interval) == (report.figures, report.interval)


def test_the_suite_writes_reports_and_a_table(
    bundle: Bundle, classifier: Classifier, clips: Examples, tmp_path: Path
) -> None:
    seen = []
    reports = suite(
        bundle, bundle, tmp_path / "results", clips, classifier=classifier, steps=(1, 2),
        progress=lambda stage, done: seen.append((stage, done)),
    )  # fmt: skip
    assert [(r.model, r.steps, r.instantaneous) for r in reports] == [
        ("MeanFlow", 1, False),
        ("MeanFlow", 2, False),
        ("flow matching", 1, True),
        ("flow matching", 2, True),
    ]
    assert read_reports(tmp_path / "results") == reports
    written = (tmp_path / "results" / "table.md").read_text()
    assert written == table(reports)
    widths = {line.count("|") for line in written.splitlines()}
    assert len(widths) == 1
    assert ("generate", 1.0) in seen
    assert reports[0].figures["codec_onset_f1_20ms"] is not None
    assert reports[1].figures["codec_onset_f1_20ms"] is None
