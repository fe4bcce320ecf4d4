"""Check an op against its plain PyTorch twin: value, tangent and gradients, in any dtype.

An op may err twice as much as its twin does in the same dtype, and by a few roundings. For the
largest error of every tensor that is

    err <= 2 err_ref + (4 + sqrt(terms)) eps max|truth|

where the truth is the twin in float64, `terms` is the length of the longest sum behind an element,
and the maximum runs over all tensors of a kind (values, tangents or gradients), because an exact
zero may be a difference of two such numbers. The root mean square over all tensors of a kind has

    rms <= 2 rms_ref + (4 eps + sqrt(terms) min(eps, eps of float32)) rms(truth)

which is blind to a single wrong element and far stricter with all of them. So no test states a
tolerance of its own.

Example:
    >>> import torch
    >>> from mfmjt import kernels
    >>> from mfmjt.testing import check_op
    >>> def swiglu_ref(gate, up):
    ...     return torch.nn.functional.silu(gate) * up
    >>> inputs = {name: torch.randn(2, 5, 16, dtype=torch.float64) for name in ("gate", "up")}
    >>> check_op(kernels.swiglu, swiglu_ref, inputs, ("gate", "up"), torch.float32, terms=1)
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "BACKWARD",
    "JVP",
    "JVP_BACKWARD",
    "MODES",
    "VALUE",
    "Function",
    "Operands",
    "Results",
    "Truth",
    "Verdict",
    "allowance",
    "as_tuple",
    "check_compiled",
    "check_op",
    "draw",
    "error",
    "poisoned",
    "runner",
    "strided",
]

VALUE, JVP, BACKWARD, JVP_BACKWARD = MODES = ("value", "jvp", "value+bwd", "jvp+bwd")
"""Value; value and tangent; value and gradients; all three."""

Function = Callable[..., Tensor | Sequence[Tensor]]
Results = dict[str, tuple[Tensor, ...]]
"""Tensors of each kind: `value`, `tangent`, `gradient`."""


class Operands(NamedTuple):
    """The numbers that a call of an op is made with.

    Attributes:
        inputs: Arguments by name. Those that require gradients get them.
        tangents: Tangents by the name of their input; the others are fixed.
        cotangents: Cotangents of the results.
    """

    inputs: dict[str, Tensor]
    tangents: dict[str, Tensor]
    cotangents: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype, device: torch.device) -> Operands:
        """Return the same numbers elsewhere; inputs without gradients keep their dtype."""
        inputs = {
            n: x.detach().to(device, dtype).requires_grad_() if x.requires_grad else x.to(device)
            for n, x in self.inputs.items()
        }
        tangents = {n: x.to(device, dtype) for n, x in self.tangents.items()}
        return Operands(inputs, tangents, tuple(y.to(device, dtype) for y in self.cotangents))

    @property
    def bytes(self) -> int:
        """Memory that they take."""
        every = (*self.inputs.values(), *self.tangents.values(), *self.cotangents)
        return sum(x.nbytes for x in every)


def as_tuple(y: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return one result or several as a tuple."""
    return (y,) if isinstance(y, Tensor) else tuple(y)


def strided(x: Tensor) -> Tensor:
    """Return the same numbers in memory that is neither contiguous nor dense, NaN in between."""
    memory = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
    memory[..., 1::2] = x
    return memory[..., 1::2]


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a dtype with the very strides of x, over memory that holds NaN elsewhere.

    What is expanded gets memory of its own: forward mode writes tangents of the same strides.
    """
    if 0 in x.stride() or not x.numel():
        return x.to(dtype).contiguous()
    steps = ((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    memory = x.new_full((1 + sum(steps),), torch.nan, dtype=dtype)
    return memory.as_strided(x.shape, x.stride()).copy_(x)


def draw(
    function: Function, inputs: Mapping[str, Tensor], moving: Sequence[str], dtype: torch.dtype
) -> Operands:
    """Round the inputs to a dtype, strides kept, and draw tangents and cotangents.

    Args:
        function: Gives the shapes of its results.
        inputs: Arguments by name; all get gradients.
        moving: Names of those that carry a tangent.
        dtype: What all are rounded to, so that every run starts from the same numbers.
    """
    tangents = {name: torch.randn_like(inputs[name]).to(dtype) for name in moving}
    rounded = {name: _round(x.detach(), dtype) for name, x in inputs.items()}
    with torch.no_grad():
        ys = as_tuple(function(**rounded))
    cotangents = [torch.randn(y.shape, dtype=torch.float64, device=y.device).to(dtype) for y in ys]
    leaves = {name: x.requires_grad_() for name, x in rounded.items()}
    return Operands(leaves, tangents, tuple(cotangents))


def runner(
    function: Function, mode: str, compiler: Callable[[Any], Any] | None = None
) -> Callable[[Operands], Results]:
    """Return one call of a function in a mode, which is what is judged and what is timed.

    Forward mode is `torch.func.jvp`. With gradients the tangents are detached, as in a MeanFlow
    target. All that was computed leaves the call, so that a compiler can drop none of it.

    Args:
        function: Takes `Operands.inputs` by name.
        mode: One of `MODES`.
        compiler: What the forward pass goes through, such as `torch.compile`.
    """

    def forward(inputs: dict[str, Tensor], tangents: dict[str, Tensor]) -> tuple[Any, Any]:
        if not mode.startswith(JVP):
            return as_tuple(function(**inputs)), ()

        def moved(*xs: Tensor) -> tuple[Tensor, ...]:
            return as_tuple(function(**(inputs | dict(zip(tangents, xs, strict=True)))))

        primals = tuple(inputs[name] for name in tangents)
        ys, y_dots, *_ = torch.func.jvp(moved, primals, tuple(tangents.values()))
        return ys, tuple(y.detach() for y in y_dots) if mode == JVP_BACKWARD else y_dots

    run = compiler(forward) if compiler else forward

    def call(given: Operands) -> Results:
        with torch.set_grad_enabled(mode.endswith("bwd")):
            ys, y_dots = run(given.inputs, given.tangents)
        found = {"value": ys, "tangent": y_dots} if y_dots else {"value": ys}
        if mode.endswith("bwd"):
            leaves = [x for x in given.inputs.values() if x.requires_grad]
            found["gradient"] = torch.autograd.grad(ys, leaves, given.cotangents)
        return found

    return call


def allowance(truth: Tensor, dtype: torch.dtype, terms: int) -> float:
    """Return what the roundings of sums of `terms` numbers may come to at the largest of them."""
    scale = float(truth.detach().abs().max()) if truth.numel() else 0.0
    return (4 + math.sqrt(terms)) * torch.finfo(dtype).eps * scale


def error(result: Tensor, truth: Tensor) -> float:
    """Return the largest absolute difference, in float64; NaN if there is any.

    Raises:
        AssertionError: The shapes differ.
    """
    assert result.shape == truth.shape, (result.shape, truth.shape)
    difference = result.detach().to(truth.device).double() - truth.detach().double()
    return float(difference.abs().max()) if truth.numel() else 0.0


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a result, or how near the truth it is.

    Attributes:
        wrong: What is wrong; empty where all is well.
        error: The largest error over its limit; NaN where something is wrong.
        errors: For each kind whether it is `ok`, its largest `error` and that of the `reference`,
            the largest true number (`scale`), and the root mean squares of both errors.
    """

    wrong: str
    error: float
    errors: dict[str, dict[str, float | bool]]


class Truth:
    """The right results of a call, and how far plain PyTorch is from them.

    Args:
        reference: The plain PyTorch twin.
        given: Rounded operands.
        terms: Length of the longest sum behind one element of a result.
        mode: What the twin computes; `JVP_BACKWARD` serves to judge every mode.
        device: Where the exact run takes place; the operands' by default.
        exact: In which dtype.
        fused: PyTorch's own kernel for the same. Gradients may lose what its gradients lose,
            because a kernel keeps less for them than the twin does.
    """

    def __init__(
        self,
        reference: Function,
        given: Operands,
        terms: int,
        mode: str = JVP_BACKWARD,
        device: torch.device | None = None,
        exact: torch.dtype = torch.float64,
        fused: Function | None = None,
    ) -> None:
        self.dtype, self.terms = given.cotangents[0].dtype, terms
        self.names = [name for name, x in given.inputs.items() if x.requires_grad]
        call = runner(reference, mode)
        found = call(given.to(exact, device or given.cotangents[0].device))
        self.exact = {kind: tuple(y.detach() for y in ys) for kind, ys in found.items()}
        self.losses = self._errors(call(given))
        if fused is not None:
            gradients = {"gradient": runner(fused, BACKWARD)(given)["gradient"]}
            pairs = zip(self.losses["gradient"], self._errors(gradients)["gradient"], strict=True)
            self.losses["gradient"] = [(max(a[0], b[0]), max(a[1], b[1])) for a, b in pairs]

    def _errors(self, found: Results) -> dict[str, list[tuple[float, float]]]:
        """Return (largest error, sum of squares) of each tensor; infinite at another shape."""
        return {
            kind: [
                _size(y.detach().to(x) - x) if y.shape == x.shape else (math.inf, math.inf)
                for y, x in zip(ys, self.exact[kind], strict=True)
            ]
            for kind, ys in found.items()
        }

    def judge(self, found: Results) -> Verdict:
        """Compare results, of some kinds or all, with the truth."""
        eps = torch.finfo(self.dtype).eps
        of_sums = self.terms**0.5 * min(eps, torch.finfo(torch.float32).eps)
        wrong: list[str] = []
        ratios, report = [0.0], {}

        def check(what: str, got: float, limit: float) -> None:
            if not got <= limit:  # NaN is not
                wrong.append(f"{what} {got:.3g} exceeds {limit:.3g}")
            elif limit > 0:
                ratios.append(got / limit)

        for kind, errors in self._errors(found).items():
            exact, losses, known = self.exact[kind], self.losses[kind], len(wrong)
            sizes = [_size(x) for x in exact]
            scale = max((largest for largest, _ in sizes), default=0.0)
            slack = (4 + self.terms**0.5) * eps * scale
            for i, y in enumerate(found[kind]):
                name = f"gradient of {self.names[i]}" if kind == "gradient" else f"{kind} {i}"
                if y.dtype != self.dtype or y.shape != exact[i].shape:
                    wrong.append(f"{name} is {tuple(y.shape)}, {y.dtype}: not as the reference")
                check(f"{name}: error", errors[i][0], 2 * losses[i][0] + slack)
            count = max(1, sum(x.numel() for x in exact))
            rms, their_rms, size = (
                (sum(squares for _, squares in every) / count) ** 0.5
                for every in (errors, losses, sizes)
            )
            check(f"{kind}: mean square error", rms, 2 * their_rms + (4 * eps + of_sums) * size)
            report[kind] = {
                "ok": len(wrong) == known,
                "error": max((largest for largest, _ in errors), default=0.0),
                "reference": max((largest for largest, _ in losses), default=0.0),
                "scale": scale,
                "rms": rms,
                "reference_rms": their_rms,
            }
        return Verdict("; ".join(wrong), math.nan if wrong else max(ratios), report)


def _size(x: Tensor) -> tuple[float, float]:
    """Return the largest absolute number of a tensor and its sum of squares; NaN stays."""
    return (float(x.abs().max()), float(x.square().sum())) if x.numel() else (0.0, 0.0)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill new memory with NaN inside, so that what is left unwritten shows."""
    before = torch.get_deterministic_debug_mode()
    # torch.utils.deterministic.fill_uninitialized_memory is wanted, and nothing else of it.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def check_op(
    op: Function,
    reference: Function,
    inputs: Mapping[str, Tensor],
    moving: Sequence[str],
    dtype: torch.dtype,
    terms: int,
    fused: Function | None = None,
    repeat: bool = True,
) -> None:
    """Judge an op in all modes: values and gradients, plain and under `torch.func.jvp`, tangents.

    It meets the strides of its inputs, and memory that holds NaN wherever it writes nothing.

    Args:
        op: Takes `inputs` by name; returns a tensor or several.
        reference: Its plain PyTorch twin.
        inputs: float64 tensors; all get gradients.
        moving: Names of those that carry a tangent; none for no forward mode.
        dtype: What the op is run in; the inputs are rounded to it.
        terms: Length of the longest sum behind one element of a result.
        fused: See `Truth`.
        repeat: A second call must give the same bits.

    Raises:
        AssertionError: A result is off by more than it may be, of another shape or dtype, or
            another one the second time.
    """
    given = draw(reference, inputs, moving, dtype)
    modes = (BACKWARD, JVP_BACKWARD) if moving else (BACKWARD,)
    truth = Truth(reference, given, terms, modes[-1], fused=fused)
    for mode in modes:
        call = runner(op, mode)
        with poisoned():
            found = call(given)
            again = call(given) if repeat else found
        verdict = truth.judge(found)
        assert not verdict.wrong, f"{mode}: {verdict.wrong}"
        for kind, ys in found.items():
            for y, other in zip(ys, again[kind], strict=True):
                assert torch.equal(y, other), f"{mode}: {kind} differs between two equal calls"


def check_compiled(
    op: Function, inputs: Mapping[str, Tensor], moving: Sequence[str], terms: int, backend: str
) -> None:
    """Hold a compiled call of an op, forward mode inside, to the eager one, gradients too.

    Args:
        op: Takes `inputs` by name.
        inputs: Tensors of one dtype; all get gradients.
        moving: Names of those that carry a tangent.
        terms: Length of the longest sum behind one element of a result.
        backend: Of `torch.compile`.

    Raises:
        AssertionError: They differ by more than roundings.
    """
    given = draw(op, inputs, moving, next(iter(inputs.values())).dtype)
    torch.compiler.reset()
    compiler = functools.partial(torch.compile, fullgraph=True, backend=backend)
    eager, compiled = (runner(op, JVP_BACKWARD, by)(given) for by in (None, compiler))
    for kind, ys in eager.items():
        for i, (y, other) in enumerate(zip(ys, compiled[kind], strict=True)):
            got, limit = error(other, y), allowance(y, y.dtype, terms)
            assert got <= limit, f"{kind} {i}: compiled differs by {got:.3g} > {limit:.3g}"
