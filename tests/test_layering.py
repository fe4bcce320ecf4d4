"""Imports point down only, and training needs nothing but torch, NumPy and safetensors."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mfmjt"

# Part -> what it may import besides itself. `cli` and `info` see everything.
HELPERS = {"errors", "files", "progress"}
WORKERS = {"processes", "memory"}
PARTS = {"codec", "encoders", "model", "meanflow"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "devices": {"errors"},
    "processes": {"devices", "errors"},
    "progress": set(),
    "memory": set(),
    "cuda_graph": set(),
    "checkpoints": HELPERS,
    "kernels": set(),
    "model": {"kernels", "checkpoints", *HELPERS},
    "meanflow": {"cuda_graph", "errors"},
    "codec": {"kernels", "checkpoints", *HELPERS},
    "encoders": {"kernels", "model", "checkpoints", *HELPERS},
    "data": {"plotting", *HELPERS},
    "plotting": {"codec", *HELPERS},
    "media": HELPERS,
    "families": {*PARTS, "checkpoints", "cuda_graph", *HELPERS},
    "features": {"codec", "encoders", "model", "data", *WORKERS, *HELPERS},
    "evaluate": {
        *PARTS,
        "checkpoints",
        "families",
        "features",
        "data",
        "devices",
        "plotting",
        "progress",
        *HELPERS,
    },
    "train": {
        *PARTS,
        "families",
        "data",
        "features",
        "evaluate",
        "devices",
        "cuda_graph",
        "plotting",
        *WORKERS,
        *HELPERS,
    },
    "pipeline": {*PARTS, "families", "media", "devices", "checkpoints", *HELPERS},
    "extract": {"encoders", "families", "features", "media", "devices", *WORKERS, *HELPERS},
    "convert": {"model", "checkpoints", *HELPERS},
    "serve": {"pipeline", "media", "evaluate", "data", "meanflow", "encoders", *HELPERS},
}
TOP = {"cli", "info", "__init__"}
TRAINING = (
    "kernels",
    "model",
    "meanflow",
    "codec",
    "encoders",
    "data",
    "plotting",
    "families",
    "features",
    "evaluate",
    "train",
    "devices",
    *sorted(HELPERS | WORKERS),
)
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
    assert parts_imported(path) <= ALLOWED[here] | {here}


def test_arrows_have_no_circle() -> None:
    left = dict(ALLOWED)
    while left:
        bottom = {name for name, below in left.items() if not below & left.keys()}
        assert bottom, f"a circle in {sorted(left)}"
        for name in bottom:
            del left[name]


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "kernels").glob("*.py")), ids=lambda path: path.stem
)
def test_kernels_do_not_know_one_another(path: Path) -> None:
    if path.stem in ("__init__", "_accelerate"):  # which hand out the ops; no op knows them
        return
    known = {n for n in imported(ast.parse(path.read_text())) if n.startswith("mfmjt.kernels.")}
    assert {name.split(".")[2] for name in known if not name.split(".")[2].startswith("_")} == set()


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
