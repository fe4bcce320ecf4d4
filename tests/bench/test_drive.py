"""The parent of a GPU's pieces: what it keeps when they break, what runs, and what comes home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import __main__
from bench.gpu import drive
from bench.gpu.drive import PARTS, Drive, Piece, carry, stages
from bench.rows import KEY, Rows, read

ROOT = Path(__file__).parents[2]
FAULTY = Path(__file__).with_name("faulty.py")
EIGHT = {"summary.txt", "environment.json"} | {
    f"{name}.jsonl" for name in ("check", "generate", "train_step", "kernels", "train", "pieces")
}


def run(tmp_path: Path, *names: str, seconds: float = 20.0, end: float = 60.0) -> bool:
    """Run pieces that work or break, all in one stage but the last."""
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir(exist_ok=True)
    work.mkdir(exist_ok=True)
    started = Drive(
        out,
        work,
        time.monotonic() + end,
        lambda name: [sys.executable, str(FAULTY), name, str(out), str(work)],
        {"PYTHONPATH": str(ROOT)},
        least=0.5,
    )
    pieces = [Piece(name, seconds) for name in names]
    return started.run([pieces[:-1], pieces[-1:]] if len(pieces) > 1 else [pieces])


def by_case(tmp_path: Path) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for row in read(tmp_path / "out" / "kernels.jsonl"):
        found.setdefault(row["op"], []).append((row["case"], row["status"]))
    return found


def ended(tmp_path: Path) -> list[tuple[str, str]]:
    rows = read(tmp_path / "out" / "pieces.jsonl")
    return sorted((row["piece"], row["status"]) for row in rows)


def test_what_breaks_is_named_and_leaves_the_others_whole(tmp_path):
    assert not run(tmp_path, "a works", "b crashes", "c loses", "d raises", "e taints", "f works")
    whole = [("first", "ok"), ("second", "ok"), ("third", "ok")]

    def broken(status: str) -> list[tuple[str, str]]:
        return [("first", "ok"), ("second", status), ("third", "ok")]

    assert by_case(tmp_path) == {
        "a works": whole,
        "b crashes": broken("crashed"),
        "c loses": broken("lost"),
        "d raises": broken("failed"),
        "e taints": broken("failed"),
        "f works": whole,
    }
    reasons = {
        row["op"]: row.get("reason")
        for row in read(tmp_path / "out" / "kernels.jsonl")
        if row["case"] == "second"
    }
    assert "exit status -11" in reasons["b crashes"]
    assert reasons["c loses"] == (
        "RuntimeError: CUDA error: an illegal memory access was encountered"
    )
    assert reasons["d raises"] == "ValueError: of no use"
    assert ended(tmp_path) == [
        ("a works", "ok"),
        ("b crashes", "crashed"),
        ("b crashes", "ok"),  # started again, behind what broke
        ("c loses", "lost"),
        ("c loses", "ok"),
        ("d raises", "ok"),
        ("e taints", "lost"),
        ("e taints", "ok"),
        ("f works", "ok"),
    ]
    text = (tmp_path / "out" / "summary.txt").read_text()
    assert "b crashes crashed at" in text
    assert "Traceback" in text  # the end of a log comes home


def test_what_hangs_is_ended_and_the_next_one_runs(tmp_path):
    assert not run(tmp_path, "a works", "b hangs", "c works", seconds=1.0)
    assert by_case(tmp_path)["b hangs"] == [("first", "ok"), ("second", "timed out")]
    assert [len(by_case(tmp_path)[name]) for name in ("a works", "c works")] == [3, 3]
    assert ended(tmp_path) == [("a works", "ok"), ("b hangs", "timed out"), ("c works", "ok")]


def test_what_there_is_no_time_for_is_said(tmp_path):
    assert not run(tmp_path, "a works", "b works", end=0.0)
    assert ended(tmp_path) == [("a works", "not reached"), ("b works", "not reached")]


def test_an_op_after_the_other_comes_after_what_is_worth_more():
    plan = stages(PARTS, ("adaln", "conv1d", "swiglu"), "cuda")
    parts = [stage[0].name.split()[0] for stage in plan]
    assert list(dict.fromkeys(parts)) == [p for p in PARTS if p in parts]  # in order of worth
    check = next(stage for stage in plan if stage[0].name.startswith("check"))
    assert [p.name for p in check] == [
        f"check {op}" for op in ("adaln", "conv1d", "swiglu", "network")
    ]
    assert all(
        len(stage) == 1 for stage in plan if stage[0].name.split()[0] not in ("check", "memcheck")
    )
    first = sum(p.seconds for stage in plan[:1] for p in stage) + max(p.seconds for p in check)
    assert first < 200  # the rest of nine minutes is for times


def test_a_line_that_was_cut_short_is_no_row_and_spoils_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"op": "a", "case": "one"}\n{"op": "a", "ca')
    rows = Rows(path, ("op", "case"))
    assert rows.has(op="a", case="one")
    rows.add({"op": "a", "case": "two"})
    assert [row["case"] for row in Rows(path, ("op", "case")).rows] == ["one", "two"]


def test_a_run_goes_on_from_carried_results(tmp_path):
    before, out = tmp_path / "before", tmp_path / "out"
    for folder in (before, out):
        folder.mkdir()
    good = {"op": "a works", "case": "first", "status": "ok", "mine": 1}
    rows = Rows(before / "kernels.jsonl", KEY)
    rows.add(good)
    rows.add({"op": "a works", "case": "second", "status": "lost"})
    (before / "environment.json").write_text('{"ceilings": {"copy_gbps": 1}}')
    carry(before, out)
    assert read(out / "kernels.jsonl") == [{**good}]
    assert json.loads((out / "environment.json").read_text())["ceilings"] == {"copy_gbps": 1}
    assert run(tmp_path, "a works")
    found = read(out / "kernels.jsonl")
    assert [row["case"] for row in found] == ["first", "second", "third"]
    assert found[0]["mine"] == 1
    carry(before, out)  # the same command again
    assert read(out / "kernels.jsonl") == found
    with pytest.raises(drive.InputError, match="has no results"):
        carry(tmp_path / "nothing", out)


def bench(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", "gpu", *map(str, arguments)])
    return __main__.main()


def test_misuse_is_one_line(monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    cpu = ("--out", out, "--device", "cpu", "--smoke")
    assert bench(monkeypatch, *cpu, "--part", "speed") == 2
    assert bench(monkeypatch, *cpu, "--ops", "relu") == 2
    assert bench(monkeypatch, *cpu, "--work", out / "work") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [word in line for word, line in zip(("speed", "relu", "inside"), lines, strict=True)]
    assert not out.exists()


@pytest.mark.skipif(drive._has_gpu(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    assert bench(monkeypatch, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No CUDA GPU" in line
    assert not (tmp_path / "out").exists()


def test_the_parent_does_without_pytorch():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, bench.gpu.drive; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout == "False\n", done.stderr


@pytest.mark.slow
def test_the_whole_command_runs_tiny_in_a_bare_copy(tmp_path):
    """Without .git, from PYTHONPATH alone; eight files; and what is there is not made again."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    environment |= {"PYTHONPATH": str(ROOT), "COMMIT": "c0ffee"}
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bench", "gpu", "--out", out, "--work", tmp_path / "work"]
    command += ["--device", "cpu", "--smoke", "--ops", "swiglu,adaln"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in out.iterdir()} == EIGHT
    assert {row["status"] for row in read(out / "pieces.jsonl")} == {"ok"}
    assert {row["commit"] for row in read(out / "check.jsonl")} == {"c0ffee"}
    kept = EIGHT - {"summary.txt", "pieces.jsonl", "environment.json"}
    before = {name: (out / name).read_text() for name in kept}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0
    assert {name: (out / name).read_text() for name in kept} == before
