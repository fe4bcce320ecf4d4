"""Time every op on a CPU: ours, its PyTorch formula, and the reference, eager and compiled.

`python -m bench.cpu --out DIR` appends to `DIR/cpu.jsonl`; rows that are there are not made again.
Set OMP_NUM_THREADS, and GOMP_SPINCOUNT=100 so that idle threads are not counted as work. Memory
that eager PyTorch gives back between operations costs page faults, half its time at some sizes: run
also with MALLOC_TOP_PAD_ and MALLOC_MMAP_THRESHOLD_ at 1073741824, and judge by both.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import SHAPES, SMOKE, Case, op_cases
from bench.harness import Rows, environment, measure
from mfmjt.codec.bigvgan import BIGVGAN_CONFIGS
from mfmjt.kernels import _ext
from mfmjt.kernels.conv1d import conv1d, conv1d_ref
from mfmjt.kernels.snake import snake, snake_ref

__all__ = ["main", "vocoder_cases"]

MODES = ("value", "value_bwd", "jvp")
MEMORY = "MALLOC_MMAP_THRESHOLD_"
KEY = ("op", "shape", "dtype", "mode", "memory", "threads", "provider")


def vocoder_cases(frames: int) -> Iterator[Case]:
    """Activations and dilated convolutions of BigVGAN-16k, channels-first, for `frames` of mel."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    config = BIGVGAN_CONFIGS["16k"]
    channels, samples = config.width, frames
    for rate in config.rates:
        channels, samples = channels // 2, samples * rate
        shape = f"bigvgan_16k {channels}x{samples}"
        x = randn(1, channels, samples)
        log = {"alpha": 0.1 * randn(channels), "beta": 0.1 * randn(channels)}
        yield Case("snake", shape, snake, snake_ref, {"x": x, **log}, (), 24)
        if channels > 96:
            continue
        for taps, dilation in ((3, 1), (3, 5), (7, 3), (11, 1), (11, 5)):
            function, reference = (_turned(op, dilation) for op in (conv1d, conv1d_ref))
            weight = randn(channels, channels, taps) / (channels * taps) ** 0.5
            inputs = {"x": x, "weight": weight, "bias": randn(channels)}
            name = f"{shape} k{taps} d{dilation}"
            yield Case("conv1d", name, function, reference, inputs, (), channels * taps)


def _turned(op: Callable[..., Tensor], dilation: int) -> Callable[..., Tensor]:
    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return op(x.transpose(1, 2), weight, bias, dilation).transpose(1, 2)

    return function


def main() -> None:
    """Parse the command line, check and time."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each comparison [1]")
    parser.add_argument("--frames", type=int, default=500, help="of mel for the vocoder [500: 8 s]")
    parser.add_argument("--op", action="append", help="only this one; may be repeated")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (minutes)")
    parser.add_argument("--smoke", action="store_true", help="everything tiny")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(given.out / "cpu.jsonl", KEY)
    stamp = environment(torch.device("cpu")) | {"extension": _ext.status()}
    print(stamp)
    cases = [case for shape in (SMOKE if given.smoke else SHAPES) for case in op_cases(shape)]
    cases = [case for case in cases if case.op != "snake"]  # no network but a vocoder has it
    cases += vocoder_cases(2 if given.smoke else given.frames)
    for case in cases:
        if given.op and case.op not in given.op:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            _check(case, dtype)
            for mode in MODES if case.moving else ("value",):
                _time(case, dtype, mode, rows, given.seconds, given.compile, stamp)


def _tuple(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (y,) if isinstance(y, Tensor) else tuple(y)


def _check(case: Case, dtype: torch.dtype) -> None:
    """No time is taken of a wrong result: twice the reference's error and a few roundings."""
    inputs = {name: x.to(dtype) for name, x in case.inputs.items()}
    with torch.no_grad():
        truth = _tuple(case.reference(**{name: x.double() for name, x in inputs.items()}))
        theirs, ours = _tuple(case.reference(**inputs)), _tuple(case.function(**inputs))
    for exact, their, our in zip(truth, theirs, ours, strict=True):
        error, reference = (float((y.double() - exact).abs().max()) for y in (our, their))
        rounding = (4 + case.terms**0.5) * torch.finfo(dtype).eps * float(exact.abs().max())
        if not error <= 2 * reference + rounding:
            raise AssertionError(f"{case.op} {case.shape} {dtype} is wrong: error {error:.3g}")


def _time(
    case: Case,
    dtype: torch.dtype,
    mode: str,
    rows: Rows,
    seconds: float,
    compiled: bool,
    stamp: dict[str, object],
) -> None:
    fields = {
        "op": case.op,
        "shape": case.shape,
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
        "memory": os.environ.get(MEMORY, "default"),
        "threads": torch.get_num_threads(),
    }
    if rows.has(**fields, provider="ours"):
        return
    leaves = {k: x.to(dtype).requires_grad_(mode == "value_bwd") for k, x in case.inputs.items()}
    ours = _call(case.function, leaves, case.moving, mode)

    def formula() -> object:
        with _ext.formulas():
            return ours()

    calls: dict[str, Callable[[], object]] = {
        "ours": ours,
        "formula": formula,
        "eager": _call(case.reference, leaves, case.moving, mode),
    }
    if compiled:
        torch.compiler.reset()
        calls["compile"] = _compiled(case.reference, leaves, case.moving, mode)
    taken = measure(calls, torch.device("cpu"), seconds)
    for provider, timing in taken.items():
        rows.add(timing, **fields, provider=provider, commit=stamp["commit"], utc=stamp["utc"])
    own = taken["ours"].cpu_ms_p50
    ratios = ", ".join(f"{k} x{v.cpu_ms_p50 / own:.2f}" for k, v in taken.items() if k != "ours")
    print(" ".join(map(str, fields.values())), f"{own:.3f} ms of CPU;", ratios, flush=True)


def _call(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    leaves: dict[str, Tensor],
    moving: tuple[str, ...],
    mode: str,
) -> Callable[[], object]:
    xs = tuple(leaves[name] for name in moving)
    dots = tuple(torch.ones_like(x) for x in xs)

    def moved(*at: Tensor) -> tuple[Tensor, ...]:
        return _tuple(function(**(leaves | dict(zip(moving, at, strict=True)))))

    def call() -> object:
        if mode == "value_bwd":
            ys = _tuple(function(**leaves))
            bars = [torch.ones_like(y) for y in ys]
            return torch.autograd.grad(ys, list(leaves.values()), bars)
        with torch.no_grad():
            if mode == "jvp":
                return torch.func.jvp(moved, xs, dots)
            return function(**leaves)

    return call


def _compiled(
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    leaves: dict[str, Tensor],
    moving: tuple[str, ...],
    mode: str,
) -> Callable[[], object]:
    if mode == "jvp":  # forward mode inside the graph, as in training; tangents are not constants

        def both(
            inputs: dict[str, Tensor], xs: tuple[Tensor, ...], dots: tuple[Tensor, ...]
        ) -> Any:
            def moved(*at: Tensor) -> tuple[Tensor, ...]:
                return _tuple(reference(**(inputs | dict(zip(moving, at, strict=True)))))

            return torch.func.jvp(moved, xs, dots)

        graph = torch.compile(both, fullgraph=True, dynamic=False)
        moved_inputs = tuple(leaves[name] for name in moving)
        tangents = tuple(torch.ones_like(x) for x in moved_inputs)

        def call() -> object:
            with torch.no_grad():
                return graph(leaves, moved_inputs, tangents)

        return call
    return _call(torch.compile(reference, dynamic=False), leaves, moving, mode)


if __name__ == "__main__":
    main()
