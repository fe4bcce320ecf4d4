from __future__ import annotations

import json

import pytest

from bench import cpu
from bench.cases import Case


def test_rows_are_made_once(tmp_path, monkeypatch, capsys):
    command = ["cpu", "--out", str(tmp_path), "--smoke", "--seconds", "0", "--op", "swiglu"]
    monkeypatch.setattr("sys.argv", command)
    cpu.main()
    rows = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert {row["provider"] for row in rows} == {"ours", "formula", "eager"}
    assert {row["mode"] for row in rows} == set(cpu.MODES)
    cpu.main()
    assert len((tmp_path / "cpu.jsonl").read_text().splitlines()) == len(rows)
    assert "ms of CPU" in capsys.readouterr().out


def test_a_wrong_op_is_not_timed():
    right = next(cpu.vocoder_cases(1))
    wrong = Case(**{**vars(right), "function": lambda **inputs: right.function(**inputs) * 1.01})
    cpu._check(right, right.inputs["x"].float().dtype)
    with pytest.raises(AssertionError, match=r"snake .* is wrong"):
        cpu._check(wrong, right.inputs["x"].float().dtype)
