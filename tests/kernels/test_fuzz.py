"""Bad arguments of every public function: an exception, or what the reference gives; never a crash.

Each function runs in a process of its own, so that a crash is a test that fails.
"""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mfmjt import kernels

ROOT = Path(__file__).parents[2]
REFUSALS = (
    ValueError,
    TypeError,
    RuntimeError,
    MemoryError,
)  # NotImplementedError is a RuntimeError


def good() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Every public function with arguments that it takes."""
    randn = torch.randn
    x, row, head = randn(2, 3, 8), randn(2, 1, 8), randn(2, 3, 2, 4)
    norm = {"shift": row, "scale": row, "eps": 1e-6}
    weights = {"q_weight": randn(4), "k_weight": randn(4)}
    attention = {"q": head, "k": head, "v": head, "scale": 0.5, "lengths": torch.tensor([2, 3])}
    return {
        "adaln": (kernels.adaln, {"x": x, **norm}),
        "gated_residual_adaln": (
            kernels.gated_residual_adaln,
            {"x": x, "h": x, "gate": row, **norm},
        ),
        "qk_norm_rope": (
            kernels.qk_norm_rope,
            {"qkv": randn(2, 3, 3, 2, 4), **weights, "rope": randn(3, 2, 2), "eps": 1e-6},
        ),
        "joint_attention": (kernels.joint_attention, attention),
        "swiglu": (kernels.swiglu, {"gate": x, "up": x}),
        "linear": (kernels.linear, {"x": x, "weight": randn(5, 8), "bias": randn(5)}),
        "conv1d": (
            kernels.conv1d,
            {"x": x, "weight": randn(5, 8, 3), "bias": randn(5), "dilation": 1},
        ),
        "snake": (kernels.snake, {"x": x, "alpha": randn(3), "beta": randn(3)}),
    }


def last_axis(x: torch.Tensor, size: int) -> torch.Tensor:
    """One number for all of a longer last axis."""
    return x[..., :1].expand(*x.shape[:-1], size)


DAMAGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "integers": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "one axis more": lambda t: t[None],
    "one axis less": lambda t: t[0],
    "a scalar": lambda t: t.flatten()[0],
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "no rows": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "twice as wide": lambda t: torch.cat((t, t), -1),
    "twice as long": lambda t: torch.cat((t, t), 0),
    "shorter": lambda t: t[:-1],
    "narrower": lambda t: t[..., :-1],
    "transposed": lambda t: t.transpose(0, -1),
    "every other": lambda t: torch.cat((t, t), -1)[..., ::2],
    "one number": lambda t: last_axis(t, t.shape[-1]),
    "2^40 columns": lambda t: last_axis(t, 2**40),
    "2^40 rows": lambda t: t[:1].expand(2**40, *t.shape[1:]),
    "2^60 elements": lambda t: t.new_zeros(()).expand((2 ** (60 // t.ndim),) * t.ndim),
    "NaN": lambda t: torch.full_like(t, math.nan) if t.is_floating_point() else t,
    "a list": lambda t: [[t]],
    "a string": lambda t: "x",
}
NUMBERS = {
    "eps": (math.nan, math.inf, -1.0, 0.0, 1e300, "x", None),
    "scale": (math.nan, math.inf, 0.0, 1e300, "x"),
    "dilation": (0, -1, 2**31, 2**40, 2**62, 2**63 - 1, 2**70, 1.5, "x", None),
}


def outcome(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Its results, or the exception."""
    try:
        results = function(**given)
    except Exception as error:
        return error
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


def complaint(function: Callable[..., Any], given: dict[str, Any]) -> str:
    """What is wrong about how a function takes its arguments, or nothing."""
    found = outcome(function, given)
    if isinstance(found, Exception):
        return "" if isinstance(found, REFUSALS) else f"{type(found).__name__}: {found}"
    with kernels.reference():
        truth = outcome(function, given)
    if isinstance(truth, Exception):
        return f"has a result where the reference raises {type(truth).__name__}: {truth}"
    dtypes = [t.dtype for t in (*found, *given.values()) if isinstance(t, torch.Tensor)]
    near = max(torch.finfo(d).eps for d in dtypes if d.is_floating_point) ** 0.5
    for a, b in zip(found, truth, strict=True):
        if a.shape != b.shape:
            return f"has a result {tuple(a.shape)}, the reference {tuple(b.shape)}"
        if not torch.allclose(a.double(), b.double(), rtol=near, atol=near, equal_nan=True):
            return "has another result than the reference"
    return ""


def main(name: str) -> None:
    """Try every damage to every argument of one function; print what was wrong."""
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # which maps terabytes, and has a limit
        resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("error")
    torch.manual_seed(0)
    function, arguments = good()[name]
    assert not complaint(function, arguments)
    for key, value in arguments.items():
        damaged: dict[str, Any] = {repr(number): number for number in NUMBERS.get(key, ())}
        if isinstance(value, torch.Tensor):
            damaged = {what: damage(value) for what, damage in DAMAGES.items()}
        for what, bad in damaged.items():
            sys.stdout.write(f"{name}: {key}: {what}")
            sys.stdout.flush()
            wrong = complaint(function, {**arguments, key: bad})
            sys.stdout.write(f" -- {wrong}\n" if wrong else "\n")


@pytest.mark.parametrize("name", good())
def test_bad_arguments(name):
    command = [sys.executable, "-m", "tests.kernels.test_fuzz", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout[-200:], done.stderr)
    wrong = [line for line in done.stdout.splitlines() if " -- " in line]
    assert not wrong, "\n".join(wrong)


if __name__ == "__main__":
    main(sys.argv[1])
