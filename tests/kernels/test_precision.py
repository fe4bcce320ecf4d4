from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mfmjt import kernels
from mfmjt.kernels import _backends, precision
from tests import oracle

HALVES = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.skipif(_backends.ON_CPU, reason="Triton's interpreter computes all")


def attention(x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return kernels.joint_attention((x, k), (k, x), (v, x))


def heads(n: int) -> tuple[int, ...]:
    return (2, n, 3, 16)


PRODUCTS = {
    "linear": (kernels.linear, {"x": (2, 9, 64), "weight": (48, 64), "bias": (48,)}),
    "conv1d": (kernels.conv1d, {"x": (2, 9, 16), "weight": (24, 16, 3), "bias": (24,)}),
    "attention": (attention, {"x": heads(9), "k": heads(5), "v": heads(5)}),
}


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU as one that multiplies float32 only, whichever it is."""
    monkeypatch.setattr(precision, "SLOW", frozenset(HALVES))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_rounded_once(name: str, dtype: torch.dtype, autocast: bool) -> None:
    """In all modes, each number is that of float32, rounded."""
    op, shapes = PRODUCTS[name]
    rounded = {n: oracle.randn(*shape).to(dtype) for n, shape in shapes.items()}
    dots = {"x": oracle.randn(*shapes["x"]).to(dtype)}
    results = op(**rounded)
    bars = [torch.randn(y.shape).to(dtype) for y in results] if name == "attention" else []
    bars = bars or [torch.randn(results.shape).to(dtype)]

    def run(given: dict[str, Tensor]) -> oracle.Results:
        return oracle.run(op, given, ["x"], dots, bars)

    truth = run({n: x.double() for n, x in rounded.items()})
    if autocast:
        with torch.autocast("cpu", dtype):
            found = run({n: x.float() for n, x in rounded.items()})
    else:
        found = run(rounded)
    for kind, exact in truth.items():
        of_autocast = autocast and kind.startswith("gradient")  # of what was cast: float32
        assert found[kind].dtype == (torch.float32 if of_autocast else dtype), kind
        in_float32 = oracle.allowance(exact, torch.float32, terms=1000)
        limit = torch.finfo(dtype).eps / 2 * exact.abs() + in_float32
        assert ((found[kind].double() - exact).abs() <= limit).all(), kind


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
