"""What an import costs, asked of fresh interpreters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ["torch", "triton", "numpy", "av", "typer", "rich"]
    print_loaded = f"import sys, mfmjt; print([m for m in {heavy} if m in sys.modules])"
    assert python(print_loaded).strip() == "[]"


def test_names_of_the_package_are_complete_before_they_are_loaded() -> None:
    python("import mfmjt; assert set(mfmjt.__all__) <= set(dir(mfmjt))")


@pytest.mark.parametrize(
    "module",
    ["mfmjt.train.stages", "mfmjt.evaluate.run", "mfmjt.data.foley"],
)
def test_training_runs_where_only_torch_is_installed(module: str) -> None:
    absent = ["av", "soundfile", "soxr", "scipy", "typer", "rich", "tensorboard", "matplotlib"]
    python(f"import sys; sys.modules.update(dict.fromkeys({absent})); import {module}")


def test_importing_the_model_touches_no_device() -> None:
    python(
        "import torch, sys, mfmjt\n"
        "mfmjt.MFMJT, mfmjt.Pipeline\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
