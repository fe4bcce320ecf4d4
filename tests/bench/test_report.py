from __future__ import annotations

import json
import sys
from typing import Any

import pytest

pytest.importorskip("pandas")

from bench import __main__, report
from bench.compare import changes
from mfmjt.codec.bigvgan import BIGVGAN_CONFIGS

STAMP = {
    "cpu": "Some CPU",
    "threads": 2,
    "torch": "2.13.0",
    "commit": "0123456789abcdef",
    "dirty": False,
    "utc": "2026-01-02T03:04:05+00:00",
    "ceilings": {"copy_gbps": 20.0, "gemm_tflops": {"float32": 0.18}},
}


def row(provider: str, ms: float, spread: float = 0.01, **more: Any) -> dict[str, Any]:
    quantiles = {"p20": ms * (1 - spread), "p50": ms, "p80": ms * (1 + spread)}
    return {
        "op": "swiglu",
        "case": "small_16k B=2",
        "model": "small_16k",
        "batch": 2,
        "length": 250,
        "dtype": "float32",
        "mode": "value",
        "malloc": "default",
        "threads": 2,
        "floor_ms": 0.5,
        "provider": provider,
        "status": "ok",
        **{f"{stem}_{k}": v for stem in ("ms", "cpu_ms") for k, v in quantiles.items()},
        **more,
    }


def refusal(provider: str, reason: str) -> dict[str, Any]:
    common = {k: v for k, v in row(provider, 1.0).items() if "ms_" not in k}
    return common | {"status": "unsupported", "reason": reason}


def write(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "kernels.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "environment.json").write_text(json.dumps(STAMP))
    return folder


def bench(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    return __main__.main()


def test_tables_have_every_row_the_slower_ones_too(tmp_path):
    rows = [row("mfmjt", 1.0), row("eager", 2.5), row("compile", 0.8), refusal("peer", "too old")]
    folder = write(tmp_path / "a", [*rows, row("eager", 3.0, malloc="raised")])
    table, details = report.write_tables(folder, report.frame(report.load(folder)))
    for text in (table.read_text(), details.read_text()):
        assert "Some CPU, 2 threads; torch 2.13.0; copy 20 GB/s; float32 product 180" in text
        assert "| swiglu | dtype | mode | mfmjt, CPU ms | of the roofline | eager |" in text
        line = "| small_16k B=2 | float32 | value | 1 | 50 % | 2.50x | **0.80x** | unsupported |"
        assert f"{line} 3.00x |" in text
    assert "* peer, unsupported (small_16k B=2 float32 value): too old" in details.read_text()


def test_a_vocoder_s_activations_are_added_up(tmp_path):
    stages = [
        row(name, ms, op="snake", case=f"bigvgan_16k {i}", length=i)
        for i in range(len(BIGVGAN_CONFIGS["16k"].rates))
        for name, ms in (("mfmjt", 2.0), ("eager", 40.0), ("compile", 9.0))
    ]
    table, _ = report.write_tables(write(tmp_path / "a", stages), report.frame(stages))
    # (6 stages x 18 + 1) x 2 ms on two threads
    assert "float32: mfmjt 0.109 s, eager 2.18 s" in table.read_text()
    table, _ = report.write_tables(tmp_path / "a", report.frame(stages[3:]))
    assert "All activations" not in table.read_text()


def test_documents_get_their_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("a\n<!-- mine/table.md -->\nold\n<!-- end -->\nz\n")
    (tmp_path / "docs" / "b.md").write_text("<!-- other/table.md -->\nold\n<!-- end -->\n")
    folder = write(tmp_path / "mine", [row("mfmjt", 1.0), row("compile", 2.0)])
    assert bench(monkeypatch, "report", folder) == 0
    table = (folder / "table.md").read_text()
    text = (tmp_path / "README.md").read_text()
    assert text == f"a\n<!-- mine/table.md -->\n{table}<!-- end -->\nz\n"
    assert "old" in (tmp_path / "docs" / "b.md").read_text()
    svg = (folder / "swiglu.svg").read_text()
    assert "roofline" in svg
    assert bench(monkeypatch, "report", folder) == 0
    assert (folder / "swiglu.svg").read_text() == svg


def test_compare_finds_what_became_slower(tmp_path, monkeypatch, capsys):
    before = write(tmp_path / "a", [row("mfmjt", 1.0), row("eager", 4.0)])
    slower = write(tmp_path / "b", [row("mfmjt", 1.2), row("eager", 4.0)])
    assert bench(monkeypatch, "compare", before, slower) == 1
    assert "SLOWER  swiglu small_16k B=2 float32 value: +20.0 %" in capsys.readouterr().out
    assert bench(monkeypatch, "compare", slower, before) == 0
    assert "faster" in capsys.readouterr().out


def made(provider: str, ms: float, **more: Any) -> dict[str, Any]:
    """Return a row of generation."""
    about = {"what": "latents", "network": "nano", "device": "cpu", "clips_per_s": 1e3 / ms}
    return row(provider, ms, **about | {"dtype": "bfloat16", "batch": 1} | more)


def test_generation_is_reported_and_compared(tmp_path, monkeypatch, capsys):
    folders = []
    for name, ms in (("a", 10.0), ("b", 13.0)):
        folder = write(tmp_path / name, [row("mfmjt", 1.0), row("eager", 4.0)])
        rows = [made("mfmjt", ms), made("eager", 20.0), made("mfmjt", ms, batch=8)]
        cold = {"what": "cold_start", "provider": "mfmjt", "network": "nano", "import_s": 0.25}
        rows += [cold | {"status": "ok", "device": "cpu", "threads": 2}]
        (folder / "generate.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        folders.append(folder)
    assert bench(monkeypatch, "report", folders[0]) == 0
    text = (folders[0] / "generate.md").read_text()
    assert "| latents | nano | 1 | 10 | 100 | 2.00x |" in text
    assert "import 0.25 s" in text
    assert "clips a second" in (folders[0] / "generate.svg").read_text()
    assert bench(monkeypatch, "compare", *folders) == 1
    assert "SLOWER  generate latents nano B=1 bfloat16 value: +30.0 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("after", "worse"),
    [
        ([row("mfmjt", 2.0), row("eager", 8.0)], False),  # the whole machine was slower
        ([row("mfmjt", 1.04), row("eager", 4.0)], False),  # less than five per cent
        ([row("mfmjt", 1.2, spread=0.3), row("eager", 4.0)], False),  # within noise
        ([row("mfmjt", 1.2), row("eager", 3.0)], True),
        ([refusal("mfmjt", "broken"), row("eager", 4.0)], True),
        ([row("mfmjt", 1.2)], True),  # nothing to compare with but itself
    ],
)
def test_noise_is_no_regression(after, worse):
    found = changes([row("mfmjt", 1.0), row("eager", 4.0)], after)
    assert [*found["worse"]] == [worse]


def test_other_cases_are_not_compared():
    other = [row("mfmjt", 9.0, case="small_16k B=1")]
    assert changes([row("mfmjt", 1.0)], other).empty
    assert changes([refusal("mfmjt", "no")], [row("mfmjt", 1.0)]).empty


def stepped(provider: str, ms: float, **more: Any) -> dict[str, Any]:
    about = {"what": "timed", "network": "small_16k", "batch": 256, "length": 250, "ratio": 0.1}
    return about | {"provider": provider, "status": "ok", "ms_p50": ms, "over_flow": None} | more


def test_training_steps_of_a_gpu_are_reported_without_kernels(tmp_path, monkeypatch):
    rows = [stepped("flow", 100.0, over_flow=1.0, peak_mib=2048, eager_ms=200.0)]
    rows += [stepped("mfmjt", 106.0, over_flow=1.06)]
    rows += [stepped("jvp", 0, status="lost", reason="gone")]
    del rows[-1]["ms_p50"]
    (tmp_path / "train_step.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert bench(monkeypatch, "report", tmp_path, "--no-plots") == 0
    text = (tmp_path / "steps.md").read_text()
    assert "| small_16k | 256 | 250 | 0.1 | flow | 100 | 1.000 | 2048 | 200 |" in text
    assert "| small_16k | 256 | 250 | 0.1 | mfmjt | 106 | 1.060 |  |  |" in text
    assert "lost: gone" in text


def test_headline_cases_are_the_short_table_whoever_was_timed(tmp_path):
    rows = [row("mfmjt", 1.0, headline=True), row("eager", 2.0, headline=True)]
    rows += [row("mfmjt", 3.0, headline=False, case="small_16k B=1")]
    table, details = report.write_tables(write(tmp_path / "a", rows), report.frame(rows))
    assert "small_16k B=2" in table.read_text()
    assert "small_16k B=1" not in table.read_text()
    assert "small_16k B=1" in details.read_text()


def test_documents_say_of_a_gpu_what_was_measured_and_nothing_else():
    """Until there are results, that there are none; then the tables of them."""
    text = (report.ROOT / "docs" / "benchmarks" / "results.md").read_text()
    for name in ("table.md", "steps.md", "generate.md"):
        mark = f"bench/results/h200/{name}"
        _, found, after = text.partition(f"<!-- {mark} -->\n")
        assert found
        table = report.ROOT / mark
        wanted = table.read_text() if table.exists() else "Not measured.\n"
        assert after.partition("<!-- end -->")[0] == wanted


def test_a_folder_without_results_is_an_error(tmp_path, monkeypatch, capsys):
    assert bench(monkeypatch, "report", tmp_path) == 2
    assert "nothing was timed into it" in capsys.readouterr().err
