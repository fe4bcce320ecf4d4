from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mfmjt import kernels, testing
from mfmjt.kernels import _backends, precision
from tests import oracle

HALVES = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.skipif(_backends.ON_CPU, reason="Triton's interpreter computes all")


def attention(x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return kernels.joint_attention((x, k), (k, x), (v, x))


PRODUCTS = {
    "linear": (kernels.linear, {"x": (2, 9, 64), "weight": (48, 64), "bias": (48,)}),
    "conv1d": (kernels.conv1d, {"x": (2, 9, 16), "weight": (24, 16, 3), "bias": (24,)}),
    "attention": (attention, {"x": (2, 9, 3, 16), "k": (2, 5, 3, 16), "v": (2, 5, 3, 16)}),
}


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU as one that multiplies float32 only, whichever it is."""
    monkeypatch.setattr(precision, "SLOW", frozenset(HALVES))


@pytest.mark.parametrize("mode", testing.MODES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_rounded_once(name: str, dtype: torch.dtype, mode: str) -> None:
    """Each number is that of float32, rounded; under autocast too, which rounds what enters."""
    if name == "attention" and mode.endswith("bwd"):
        pytest.skip("it keeps a rounded result for its gradient; its own tests judge that")
    op, shapes = PRODUCTS[name]
    inputs = {n: oracle.randn(*shape) for n, shape in shapes.items()}
    given = testing.draw(op, inputs, ["x"], dtype)
    run, cpu = testing.runner(op, mode), torch.device("cpu")
    truth, found = run(given.to(torch.float64, cpu)), run(given)
    with torch.autocast("cpu", dtype):
        casted = run(given.to(torch.float32, cpu)._replace(cotangents=given.cotangents))
    for kind, exact in truth.items():
        in_float32 = max(oracle.allowance(x, torch.float32, terms=64) for x in exact)
        for y, under_autocast, x in zip(found[kind], casted[kind], exact, strict=True):
            assert y.dtype == dtype
            limit = torch.finfo(dtype).eps / 2 * x.abs() + in_float32
            assert ((y - x).abs() <= limit).all(), kind
            assert torch.equal(under_autocast.to(dtype), y), kind


@pytest.mark.parametrize("name", ["linear", "attention"])
def test_products_compile(name: str) -> None:
    op, shapes = PRODUCTS[name]
    given = {n: torch.randn(shape).bfloat16() for n, shape in shapes.items()}
    oracle.check_compiled(op, given, ["x"], terms=64, backend="aot_eager")


@pytest.mark.parametrize("dtype", HALVES)
def test_float32_itself_is_left_alone(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    assert torch.equal(kernels.linear(x, weight), torch.nn.functional.linear(x, weight))
    assert not precision.is_slow(x)
    assert precision.is_slow(x.to(dtype))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86's own variable")
def test_a_run_limited_to_avx2_has_none() -> None:
    code = "from mfmjt.kernels import precision; print(len(precision.SLOW))"
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.strip() == "2"
