"""Documents name only what exists: links, paths, commands, options and Python names."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
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
NOTEBOOKS = sorted((ROOT / "docs" / "learn").glob("*.ipynb"))


def documents() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = listed.stdout.split() if listed.returncode == 0 else []
    found = sorted(ROOT / n for n in names) or sorted(ROOT.glob("*.md")) + sorted(
        ROOT.glob("[a-z]*/**/*.md")
    )
    return [*found, *NOTEBOOKS]


def read(path: Path) -> str:
    """A document, a notebook as Markdown without its outputs."""
    text = path.read_text()
    if path.suffix != ".ipynb":
        return text
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(f"```python\n{s}\n```" if k == "code" else s for k, s in cells)


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
    for target in re.findall(r"\]\(([^)\s]+)\)", read(path)):
        if re.match(r"\w+:", target) or target.startswith("#"):
            continue
        assert (path.parent / target.split("#")[0]).exists(), target


@everywhere
def test_named_code_is_in_the_linked_file(path: Path) -> None:
    """A link from `name` or `Class.method` to a Python file names what that file defines."""
    for name, target in re.findall(r"\[`([\w.]+)`\]\(([^)\s]+\.py)\)", read(path)):
        if name.endswith(".py"):
            continue
        scope: ast.AST = ast.parse((path.parent / target).read_text())
        for part in name.split("."):
            found = [node for node in ast.iter_child_nodes(scope) if part in _defines(node)]
            assert found, f"{target} does not define {name}"
            scope = found[0]


def _defines(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


@everywhere
def test_paths(path: Path) -> None:
    for name in inline(read(path)):
        if not re.fullmatch(r"\.?[\w-]+/[\w./*{},<>-]*", name) or name.startswith(MADE):
            continue
        pattern = re.sub(r"<\w+>|\{[^}]*\}", "*", name).rstrip("/")
        bases = (ROOT, path.parent, ROOT / "mfmjt", HEADERS)
        found = [p for base in bases for p in base.glob(pattern)]
        assert found, f"{name} is not in the repository"


@everywhere
def test_commands(path: Path) -> None:
    for line in commands(read(path)):
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
    for language, code in blocks(read(path)):
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


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_the_tables_of_nano_are_the_measured_ones() -> None:
    table = (ROOT / "bench/results/nano/table.md").read_text()
    assert table in (ROOT / "mfmjt/pretrained/nano/README.md").read_text()
    head, _, *rows = map(_cells, table.splitlines())
    measured = [dict(zip(head, row, strict=True)) for row in rows]
    columns = "onset F1", "class accuracy", "text only: class"
    lines = {}
    for row in measured:
        steps = row["steps"] and f", {row['steps']} step{'s' * (row['steps'] != '1')}"
        lines[row["network"] + steps] = [row[column] for column in columns]
    readme = (ROOT / "README.md").read_text()
    shown = readme.partition("| network | onset F1 ")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(shown) >= 5
    for name, *figures in map(_cells, shown):
        assert figures == lines[name]


PAGES = (
    "README.md",
    "docs/quickstart.md",
    "docs/inputs.md",
    "docs/extend.md",
    "docs/score.md",
)


@pytest.mark.parametrize("name", PAGES)
def test_python_blocks_run(name: str, tmp_path: Path) -> None:
    """All blocks of a page, one after the other, where a checkout's `examples` are."""
    code = [code for language, code in blocks((ROOT / name).read_text()) if language == "python"]
    assert code
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    _run("\n\n".join(code), tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_run(path: Path) -> None:
    """What a notebook asserts holds, and the outputs that it is committed with are of one run."""
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    assert not any(o["output_type"] == "error" for c in cells for o in c["outputs"])
    assert path.stat().st_size < 200_000
    _run("\n\n".join("".join(c["source"]) for c in cells), path.parent)


def _run(code: str, folder: Path) -> None:
    environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
