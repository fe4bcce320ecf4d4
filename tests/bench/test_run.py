"""`python -m bench ops`, on tiny cases."""

from __future__ import annotations

import json
import sys

from bench import __main__, run


def bench(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    return __main__.main()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_cpu_is_measured_under_both_allocators(monkeypatch, tmp_path, capsys):
    command = ("ops", "swiglu", "--out", tmp_path, "--tiny", "--seconds", 0, "--threads", 1)
    assert bench(monkeypatch, *command) == 0
    found = rows(tmp_path / "kernels.jsonl")
    pairs = {(row["provider"], row["malloc"]) for row in found}
    assert pairs == {(p, m) for p in run.IN_RAISED for m in ("default", "raised")}
    assert {row["dtype"] for row in found} == set(run.DTYPES)
    assert all(row["threads"] == 1 and row["status"] == "ok" for row in found)
    out = capsys.readouterr().out
    assert "[8/8, " in out
    assert "ms of CPU; eager x" in out
    assert bench(monkeypatch, *command) == 0
    assert rows(tmp_path / "kernels.jsonl") == found


def test_an_unknown_op_is_an_error(monkeypatch, tmp_path, capsys):
    assert bench(monkeypatch, "ops", "relu", "--out", tmp_path) == 2
    assert "no benchmark of relu" in capsys.readouterr().err
