"""Documents name only what exists: links, paths, commands, options and Python names."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer

from mfmjt import cli

ROOT = Path(__file__).parents[1]
HEADERS = Path(torch.__file__).parent / "include"  # PyTorch's own, such as torch/csrc/stable
MADE = ("output/", "demo/", ".venv/", "build/")  # what commands make; not in the repository
SHELLS = {"", "bash", "sh", "console"}


def documents() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = listed.stdout.split() if listed.returncode == 0 else []
    return sorted(ROOT / n for n in names) or sorted(ROOT.glob("*.md")) + sorted(
        ROOT.glob("[a-z]*/**/*.md")
    )


def blocks(text: str) -> list[tuple[str, str]]:
    """Fenced blocks as (language, code)."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def inline(text: str) -> list[str]:
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", outside)


def commands(text: str) -> list[str]:
    """Shell lines of fenced blocks, continued lines joined, and commands in running text."""
    lines = [
        line.strip().removeprefix("$ ")
        for language, code in blocks(text)
        if language in SHELLS
        for line in code.replace("\\\n", " ").splitlines()
    ]
    return [line for line in (*lines, *inline(text)) if re.match(r"(mfmjt|make|python -m) ", line)]


everywhere = pytest.mark.parametrize("path", documents(), ids=lambda p: str(p.relative_to(ROOT)))


@everywhere
def test_links(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"\w+:", target) or target.startswith("#"):
            continue
        assert (path.parent / target.split("#")[0]).exists(), target


@everywhere
def test_paths(path: Path) -> None:
    for name in inline(path.read_text()):
        if not re.fullmatch(r"\.?[\w-]+/[\w./*{},<>-]*", name) or name.startswith(MADE):
            continue
        pattern = re.sub(r"<\w+>|\{[^}]*\}", "*", name).rstrip("/")
        bases = (ROOT, path.parent, ROOT / "mfmjt", HEADERS)
        found = [p for base in bases for p in base.glob(pattern)]
        assert found, f"{name} is not in the repository"


@everywhere
def test_commands(path: Path) -> None:
    for line in commands(path.read_text()):
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            wanted = [w for w in words[1:] if "=" not in w]
            assert set(wanted) <= set(targets), line
        elif words[0] == "python":
            assert importlib.util.find_spec(words[2]) is not None, line
        else:
            _check_command(words[1:], line)


def _check_command(words: list[str], line: str) -> None:
    command = typer.main.get_command(cli.app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    assert not hasattr(command, "commands") or words in ([], ["--help"]), f"no command: {line}"
    options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    used = {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)}
    assert used <= options, f"{line}: no option {used - options}"


@everywhere
def test_python(path: Path) -> None:
    for language, code in blocks(path.read_text()):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute):
                _resolve(ast.unparse(node))
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mfmjt"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


def _resolve(dotted: str) -> None:
    if not re.fullmatch(r"mfmjt(\.\w+)+", dotted):
        return
    found: object = importlib.import_module("mfmjt")
    for name in dotted.split(".")[1:]:
        assert hasattr(found, name), dotted
        found = getattr(found, name)
    assert isinstance(found, (ModuleType, type)) or callable(found) or name == "__version__"


def test_nothing_is_left_to_do_in_the_code() -> None:
    marks = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)))
    for folder in ("mfmjt", "tests", "bench", "csrc", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu"):
                assert not marks.search(path.read_text()), path


@everywhere
def test_documents_name_no_machine(path: Path) -> None:
    found = re.search(r"(?<![\w.:/-])/(?:home|root|tmp|opt|mnt)/", path.read_text())
    assert found is None, found


@pytest.mark.parametrize("name", ["README.md", "mfmjt/pretrained/nano/README.md"])
def test_the_table_is_the_measured_one(name: str) -> None:
    table = (ROOT / "bench/results/nano/table.md").read_text()
    assert table in (ROOT / name).read_text()
