"""Imports point down only, and training needs nothing but torch, NumPy and safetensors."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mfmjt"

# Part -> what it may import besides itself, which stands above it. `cli` and `info` see everything.
ALLOWED: dict[str, str] = {
    "errors": "",
    "files": "errors",
    "devices": "errors",
    "processes": "errors devices",
    "progress": "",
    "memory": "",
    "cuda_graph": "",
    "testing": "",
    "checkpoints": "errors files memory",
    "kernels": "",
    "model": "errors files memory checkpoints kernels",
    "meanflow": "errors cuda_graph kernels",
    "codec": "errors checkpoints kernels",
    "encoders": "errors files checkpoints model",
    "plotting": "errors files codec",
    "data": "errors files plotting",
    "media": "errors files",
    "families": "errors memory cuda_graph checkpoints kernels model meanflow codec encoders",
    "features": "errors files processes progress memory model codec encoders data",
    "extract": "errors files devices progress encoders data media families features",
    "evaluate": "errors files devices progress checkpoints meanflow codec encoders plotting data "
    "media families features extract",
    "train": "errors files processes progress memory cuda_graph kernels model meanflow codec "
    "encoders plotting data families features evaluate",
    "pipeline": "errors files devices progress checkpoints kernels model meanflow codec encoders "
    "media families",
    "serve": "errors encoders data media evaluate pipeline",
    "convert": "errors files model",
    "listen": "errors files extract",
    "experiment": "errors files devices progress meanflow model codec encoders plotting families "
    "features evaluate train pipeline",
}
TOP = {"cli", "info", "__init__"}
MADE_OF_OPS = {"__init__", "_accelerate", "streams", "swiglu_product", "vocoder"}  # known to no op
TRAINING = ["train", *ALLOWED["train"].split()]
TRAINING_NEEDS = {"torch", "numpy", "safetensors", "mfmjt", *sys.stdlib_module_names}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of what the code imports; `from a import b` counts as a and as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(tree: ast.Module) -> ast.Module:
    """The code that runs when the module is imported."""

    class Outside(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else node

    return Outside().visit(tree)


def parts_imported(path: Path) -> set[str]:
    names = imported(ast.parse(path.read_text()))
    parts = {name.split(".")[1] for name in names if name.startswith("mfmjt.")}
    return {p for p in parts if (PACKAGE / p).is_dir() or (PACKAGE / f"{p}.py").exists()}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = part(path)
    if here in TOP:
        return
    assert here in ALLOWED, f"say in tests/test_layering.py what {here} may import"
    assert parts_imported(path) <= {here, *ALLOWED[here].split()}


def test_files_are_short() -> None:
    """A file is read in one sitting; the kernels' have a rule of their own."""
    for path in modules():
        lines = len(path.read_text().splitlines())
        most = {"cli": 120, "kernels": lines}.get(part(path), 450)
        assert lines <= most, f"{path} has {lines} lines; split it along its own seams"


def test_arrows_point_up_the_table() -> None:
    above: set[str] = set()
    for name, allowed in ALLOWED.items():
        assert set(allowed.split()) <= above, name
        above.add(name)


def test_no_module_imports_itself_through_others() -> None:
    graph = {}
    for path in modules():
        dotted = ".".join(("mfmjt", *path.relative_to(PACKAGE).with_suffix("").parts))
        graph[dotted.removesuffix(".__init__")] = at_import(ast.parse(path.read_text()))
    known = {
        name: {n for n in imported(tree) if n in graph and not f"{name}.".startswith(f"{n}.")}
        for name, tree in graph.items()
    }
    assert list(graphlib.TopologicalSorter(known).static_order())  # raises where there is a circle


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "kernels").glob("*.py")), ids=lambda path: path.stem
)
def test_kernels_do_not_know_one_another(path: Path) -> None:
    if path.stem in MADE_OF_OPS:
        return
    known = {n for n in imported(ast.parse(path.read_text())) if n.startswith("mfmjt.kernels.")}
    stems = {name.split(".")[2] for name in known}
    assert {stem for stem in stems if not stem.startswith("_")} <= {"cpu", "precision", "triton"}


def test_only_kernels_know_triton() -> None:
    for path in modules():
        if part(path) not in ("kernels", *TOP):
            names = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
            assert "triton" not in names, path


@pytest.mark.parametrize(
    "path",
    [p for p in modules() if part(p) in TRAINING],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_training_needs_little(path: Path) -> None:
    needed = {name.split(".")[0] for name in imported(at_import(ast.parse(path.read_text())))}
    optional = {"triton"} if part(path) == "kernels" else set()
    assert needed <= TRAINING_NEEDS | optional


def test_bench_and_tests_stay_outside() -> None:
    for path in modules():
        names = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
        assert not names & {"bench", "tests"}, path


def test_the_picture_is_true() -> None:
    """In docs/architecture.md every part stands above all that it may import."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    picture = text.partition("against this picture.")[2].split("```")[1].removeprefix("text\n")
    line = {part: i for i, parts in enumerate(picture.splitlines()) for part in parts.split()}
    assert line.keys() == ALLOWED.keys() | TOP - {"__init__"}
    for part, below in ALLOWED.items():
        assert all(line[part] < line[other] for other in below.split()), part
