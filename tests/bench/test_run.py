"""`python -m bench ops`, on tiny cases."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path

import pytest

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
    assert {row["dtype"] for row in found} == {"float32", "bfloat16"}
    assert all(row["threads"] == 1 and row["status"] == "ok" for row in found)
    out = capsys.readouterr().out
    assert "[8/8, " in out
    assert "ms of CPU; eager x" in out
    assert bench(monkeypatch, *command) == 0
    assert rows(tmp_path / "kernels.jsonl") == found


def test_an_unknown_op_is_an_error(monkeypatch, tmp_path, capsys):
    assert bench(monkeypatch, "ops", "relu", "--out", tmp_path) == 2
    assert "no benchmark of relu" in capsys.readouterr().err


@pytest.mark.parametrize("command", __main__.COMMANDS)
def test_every_command_has_a_module_with_its_function(command):
    spec = importlib.util.find_spec(__main__.COMMANDS[command][0])
    tree = ast.parse(Path(spec.origin).read_text())
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main")
    assert [argument.arg for argument in function.args.args] == ["argv"]
    assert ast.unparse(function.returns) == "int"


def test_the_help_names_every_command_once(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["--help"])
    out = capsys.readouterr().out
    for command, (_, about) in __main__.COMMANDS.items():
        assert out.count(f"  {command} ") >= 1
        assert out.count(about) == 1
