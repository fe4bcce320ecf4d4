"""One judge for every op: value, tangent and gradients against a float64 run of its reference.

An op may err twice as much as its plain PyTorch reference does in the same dtype, plus a few
roundings of the result: err <= 2 err_ref + (4 + sqrt(terms)) eps max|truth|, where `terms` is the
length of the longest sum that feeds an element, and the maximum runs over all results of the kind
(values, tangents or gradients), because an exact zero may be a difference of two such numbers. No
test states a tolerance of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mfmjt.kernels import _triton

DTYPES: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
if _triton.INTERPRETED:  # Triton's interpreter has no working bfloat16
    DTYPES = tuple(dtype for dtype in DTYPES if dtype != torch.bfloat16)

Results = dict[str, Tensor]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def strided(x: Tensor) -> Tensor:
    """The same numbers in memory that is neither contiguous nor dense."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def allowance(truth: Tensor, dtype: torch.dtype, terms: int) -> float:
    scale = float(truth.detach().abs().max()) if truth.numel() else 0.0
    return (4 + math.sqrt(terms)) * torch.finfo(dtype).eps * scale


def error(result: Tensor, truth: Tensor) -> float:
    assert result.shape == truth.shape, (result.shape, truth.shape)
    difference = result.detach().double() - truth.detach().double()
    return float(difference.abs().max()) if truth.numel() else 0.0


def _tuple(y: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (y,) if isinstance(y, Tensor) else tuple(y)


def run(
    op: Callable, inputs: Mapping[str, Tensor], moving: Sequence[str], dots: Mapping, bars: Sequence
) -> Results:
    """Everything that can be asked of an op: plain, and through `torch.func.jvp`."""
    leaves = {
        name: x.detach().clone(memory_format=torch.preserve_format) for name, x in inputs.items()
    }
    # clone() packs what is not dense; the op shall meet the strides it was given
    leaves = {n: strided(x) if not inputs[n].is_contiguous() else x for n, x in leaves.items()}
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    results: Results = {}

    def gradients(kind: str, ys: tuple[Tensor, ...]) -> None:
        loss = sum((y * bar.to(y.dtype)).sum() for y, bar in zip(ys, bars, strict=False))
        found = torch.autograd.grad(loss, list(leaves.values()))
        results.update({f"{kind} of {n}": g for n, g in zip(leaves, found, strict=True)})

    ys = _tuple(op(**leaves))
    results.update({f"value {i}": y.detach() for i, y in enumerate(ys)})
    gradients("gradient", ys)
    if moving:
        primals = tuple(leaves[name] for name in moving)
        tangents = tuple(dots[name].to(leaves[name].dtype) for name in moving)
        still = {name: x for name, x in leaves.items() if name not in moving}
        ys, y_dots = torch.func.jvp(
            lambda *xs: _tuple(op(**dict(zip(moving, xs, strict=True)), **still)), primals, tangents
        )
        results.update({f"value {i} under jvp": y.detach() for i, y in enumerate(ys)})
        results.update({f"tangent {i}": y.detach() for i, y in enumerate(y_dots)})
        gradients("gradient under jvp", ys)
    return results


def check_op(
    op: Callable,
    op_ref: Callable,
    inputs: Mapping[str, Tensor],
    moving: Sequence[str],
    dtype: torch.dtype,
    terms: int,
    fused: Callable | None = None,
) -> None:
    """Judge an op in all modes.

    Args:
        op: Takes `inputs` by name; returns a tensor or several.
        op_ref: Its reference.
        inputs: float64 tensors; all get gradients. They are rounded to `dtype` first, so that all
            runs start from the same numbers.
        moving: Names of those that carry a tangent; none for no forward mode.
        dtype: What the op is run in.
        terms: Length of the longest sum.
        fused: PyTorch's own kernel for the same, where gradients may lose what that one loses
            because a kernel keeps less for them than the reference does.
    """
    dots = {name: torch.randn_like(inputs[name]).to(dtype) for name in moving}
    rounded = {
        name: strided(x.to(dtype)) if not x.is_contiguous() else x.to(dtype)
        for name, x in inputs.items()
    }
    with torch.no_grad():
        shapes = [y.shape for y in _tuple(op_ref(**rounded))]
    bars = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]

    exact = {name: x.double() for name, x in rounded.items()}
    truth = run(op_ref, exact, moving, dots, bars)
    reference = run(op_ref, rounded, moving, dots, bars)
    found = run(op, rounded, moving, dots, bars)
    losses = {name: error(value, truth[name]) for name, value in reference.items()}
    for name, value in ({} if fused is None else run(fused, rounded, (), {}, bars)).items():
        if name.startswith("gradient"):
            loss = error(value, truth[name])
            for kind in {name, name.replace("gradient", "gradient under jvp")} & losses.keys():
                losses[kind] = max(losses[kind], loss)
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert value.dtype == dtype, f"{name} is {value.dtype}"
        slack = max(
            allowance(other, dtype, terms) for n, other in truth.items() if n[:5] == name[:5]
        )
        limit = 2 * losses[name] + slack
        got = error(value, truth[name])
        assert got <= limit, f"{name}: error {got:.3g} exceeds {limit:.3g}"


def check_compiled(
    op: Callable, inputs: Mapping[str, Tensor], moving: Sequence[str], terms: int, backend: str
) -> None:
    """A compiled MeanFlow-like step, forward mode and loss inside, must equal the eager one."""
    dots = {name: torch.randn_like(inputs[name]) for name in moving}

    def step(*xs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        given = dict(zip(inputs, xs, strict=True))
        still = {name: x for name, x in given.items() if name not in moving}
        ys, y_dots = torch.func.jvp(
            lambda *m: _tuple(op(**dict(zip(moving, m, strict=True)), **still)),
            tuple(given[name] for name in moving),
            tuple(dots[name] for name in moving),
        )
        loss = sum((y * (y + y_dot.detach())).sum() for y, y_dot in zip(ys, y_dots, strict=True))
        return loss, y_dots

    def gradients(function: Callable) -> Results:
        leaves = [x.detach().clone().requires_grad_() for x in inputs.values()]
        loss, y_dots = function(*leaves)
        found = {f"tangent {i}": d.detach() for i, d in enumerate(y_dots)}
        found["loss"] = loss.detach()
        for name, g in zip(inputs, torch.autograd.grad(loss, leaves), strict=True):
            found[f"gradient of {name}"] = g
        return found

    torch.compiler.reset()
    eager, compiled = (
        gradients(step),
        gradients(torch.compile(step, fullgraph=True, backend=backend)),
    )
    for name, value in compiled.items():
        limit = allowance(eager[name], value.dtype, terms)
        got = error(value, eager[name])
        assert got <= limit, f"{name}: compiled differs from eager by {got:.3g} > {limit:.3g}"


# The dual ops refuse gradients of their tangents, and this check of PyTorch's asks for them all.
OPCHECKS_OF_A_DUAL = ("test_schema", "test_autograd_registration", "test_faketensor")
