"""An op from three formulas: its value, its value with tangent, and its gradient.

`Op(name, fwd, jvp, bwd)` makes them three library ops, `mfmjt::<name>_fwd`, `_jvp` and `_bwd`, and
one function of plain or dual tensors. The names of their parameters say all that PyTorch must know:

    fwd(x, ..., eps) -> results, statistics            the op's inputs
    jvp(x, ..., x_dot, ..., eps) -> y, y_dot, ..., statistics      `x_dot`: x may move
    bwd(y_bar, ..., x, ..., rstd, eps) -> cotangents of fwd's tensors, in order

The parameters of bwd that end in `_bar` name the results; its others name what the tape keeps:
inputs, results, statistics or constants. Schemas come from the annotations.

A device's kernels are found by name. Triton: functions `fwd`, `jvp`, `bwd` of
`mfmjt.kernels.triton.<name>`. CPU: those of `mfmjt.kernels.cpu.<name>`, else the C++ kernels
`mfmjt_cpu::<name>_<part>`. Each may leave a call to the formula, by returning NotImplemented; C++
serves what the op's `takes` says. An op with `streams=True` also takes tuples of streams: the same
three as library ops `mfmjt::<name>_streams_<part>` over lists, which the Triton functions
`fwd_streams`, `jvp_streams` and `bwd_streams` compute in one launch each.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mfmjt.kernels import _backends, _dual, _eager, _native, precision
from mfmjt.kernels._eager import flatten, nest
from mfmjt.kernels._second_order import Graphed

__all__ = [
    "MaybeTensors",
    "Op",
    "Tensors",
    "backend",
    "check",
    "check_tensors",
    "reference",
    "register",
    "use_reference",
    "work_dtype",
]

Tensors = TypeVar("Tensors", Tensor, tuple[Tensor, ...])
"""What an op takes and returns: tensors, or tuples of those of several streams."""
MaybeTensors = Tensor | Sequence[Tensor | None] | None

_library = torch.library.Library("mfmjt", "FRAGMENT")
_forced_reference = False


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """Let every op of this package run its plain PyTorch reference inside the block."""
    global _forced_reference
    before, _forced_reference = _forced_reference, True
    try:
        yield
    finally:
        _forced_reference = before


def use_reference() -> bool:
    """Return True inside a `reference()` block."""
    return _forced_reference


def check(condition: bool, op: str, needs: str, **tensors: Tensor | None) -> None:
    """Raise a ValueError that names the op, what it needs, and the shape and dtype it got."""
    if not condition:
        got = ", ".join(
            f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            for name, tensor in tensors.items()
            if tensor is not None
        )
        raise ValueError(f"mfmjt.kernels.{op} needs {needs}; got {got}.")


def check_tensors(op: str, optional: dict[str, Any] | None = None, /, **tensors: Any) -> None:
    """Raise a TypeError that names what is no tensor, or no tuple of tensors."""
    if optional:
        tensors |= {name: t for name, t in optional.items() if t is not None}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            continue
        for x in value if isinstance(value, tuple) else (value,):
            if not isinstance(x, Tensor):
                what = type(x).__name__
                raise TypeError(f"mfmjt.kernels.{op} needs {name} to be a tensor; got {what}.")


def work_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of statistics and sums: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Op:
    """An op of plain or dual tensors, differentiable in both modes, made of its three formulas.

    Args:
        name: Stem of the library ops and of the files of the kernels.
        fwd: Formula of the value, in PyTorch functions, on any device. Results of formulas are
            contiguous and alias neither an argument nor one another.
        jvp: Formula of value and tangent. Tangents that are None are zero.
        bwd: Formula of the gradient. If it has a parameter `needs: list[bool]`, that says which of
            fwd's tensors want a cotangent; an empty tensor stands for the others.
        check: (fwd's arguments, of one stream) -> None, or raises; called first.
        reference: Plain PyTorch function of fwd's arguments that `reference()` puts in its place.
        takes: (tensors) -> whether the C++ kernels serve them; None if there are none. Given are
            those of fwd's tensors and results that a part has, in its order.
        fake: (fwd's arguments) -> results and statistics without data; then bwd must keep all
            inputs that it gives cotangents of. Default: the formulas, which then must not look at
            values.
        plain: (fwd's arguments) -> the results of a PyTorch function with a gradient of its own,
            used where nothing moves; or NotImplemented.
        passes: Input -> result whose cotangent is the input's too, where bwd returns a tensor of
            another shape than the input's: a library op must not return what it was given.
        autocasts: The op casts under autocast, as PyTorch's matmuls do, and computes in float32
            where a CPU is slow in its dtype (`precision`); then its floating inputs must be "x and
            weight of one dtype", in the words given here.
        streams: Whether tuples of streams are taken too.
        single: Of an op over lists of streams, the op of one.
        jvp_bwd: Formula of the gradient through value and tangent; see `_second_order`. Without one
            a gradient that arrives at a tangent is refused.
    """

    def __init__(
        self,
        name: str,
        fwd: Callable[..., Any],
        jvp: Callable[..., Any],
        bwd: Callable[..., Any],
        *,
        check: Callable[..., None] | None = None,
        reference: Callable[..., Any] | None = None,
        takes: Callable[..., bool] | None = None,
        fake: Callable[..., Any] | None = None,
        plain: Callable[..., Any] | None = None,
        passes: dict[str, str] | None = None,
        autocasts: str = "",
        streams: bool = False,
        single: Op | None = None,
        jvp_bwd: Callable[..., Any] | None = None,
    ) -> None:
        self.name, self.check, self.reference, self.plain = name, check, reference, plain
        self.takes, self.fake, self.autocasts, self.single = takes, fake, autocasts, single
        kinds = {n: str(p.annotation) for n, p in inspect.signature(fwd).parameters.items()}
        self.inputs = list(kinds)
        self.tensors = [n for n, kind in kinds.items() if "Tensor" in kind]
        self.lists = single is not None or any("list[Tensor" in kind for kind in kinds.values())
        names = list(inspect.signature(jvp).parameters)
        both = (*self.inputs, *(f"{n}_dot" for n in self.inputs))
        self.order = list(map(both.index, names))  # of jvp's arguments among values and tangents
        self.fixed = [n for n in self.tensors if f"{n}_dot" not in names]
        self.fixed_places = [self.inputs.index(n) for n in self.fixed]
        bars = {n: p for n, p in inspect.signature(bwd).parameters.items() if n != "needs"}
        self.results = [n[:-4] for n in bars if n[-4:] == "_bar"]
        self.optional = [y for y in self.results if "None" in str(bars[f"{y}_bar"].annotation)]
        kept = [n for n in bars if n[-4:] != "_bar"]
        self.saved = [n for n in kept if n in self.tensors or n not in self.inputs]
        self.constants = [n for n in kept if n not in self.saved]
        own = [f"{y}_bar" for y in self.results]
        of_bwd = (*own, *self.saved, *self.constants, "needs")
        self.bwd_order = [of_bwd.index(n) for n in inspect.signature(bwd).parameters]
        self.passing = [
            (self.tensors.index(x), self.results.index(y), of_bwd.index(x))
            for x, y in (passes or {}).items()
        ]
        self.statistics = [n for n in self.saved if n not in (*self.inputs, *self.results)]
        self.fwd, self.jvp, self.bwd = (
            Part(self, *part) for part in (("fwd", fwd), ("jvp", jvp), ("bwd", bwd))
        )
        self.graphed = None if jvp_bwd is None else Graphed(self, jvp_bwd)
        self.over_streams: Op | None = None
        if streams:
            self.over_streams = Op(
                f"{name}_streams",
                *map(_each, (fwd, jvp, bwd)),
                plain=plain and _each(plain, fwd),
                passes=passes,
                autocasts=autocasts,
                single=self,
            )

    def __call__(self, *args: Any) -> Any:
        """Compute the results of fwd's arguments, dual where an input is; of streams for tuples."""
        if self.over_streams is not None and isinstance(args[0], (tuple, list)):
            return self._of_streams(self.over_streams, args)
        if self.check is not None:
            self.check(*args)
        if _forced_reference and self.reference is not None:
            return self.reference(*args)
        results = None
        if not torch.compiler.is_compiling():
            if self.plain is not None and forward_ad._current_level < 0:  # nothing moves
                results = self.by_pytorch(args)
            if results is None:
                graphed = self.graphed is not None and _dual._graph_of_tangents
                results = _eager.run(self, args, graphed)
        if results is None:
            results = self._dispatched(args)
        return results[0] if len(results) == 1 else results

    def _keeps_tangents(self) -> bool:
        """Return True where a gradient is to reach tangents and can."""
        return _dual.are_differentiable() and self.graphed is not None

    def _of_streams(self, over_streams: Op, args: tuple[Any, ...]) -> Any:
        """Compute the results, each a tuple of streams.

        Raises:
            ValueError: There are not as many streams of one argument as of another.
        """
        count = len(args[0])
        lists, apart = list(args), _forced_reference or count == 1 or self._keeps_tangents()
        for i, n in enumerate(self.inputs):
            if n not in self.tensors:
                continue
            arg = lists[i] = [None] * count if args[i] is None else args[i]
            if not isinstance(arg, (list, tuple)) or len(arg) != count:
                got = len(arg) if isinstance(arg, (list, tuple)) else type(arg).__name__
                needs = f"{n} for each of {count} streams"
                raise ValueError(f"mfmjt.kernels.{self.name} needs {needs}; got {got}.")
            lists[i] = list(arg)
            # A library op has no gradient of a list with gaps
            gaps = len({x is None for x in arg}) > 1
            apart = apart or (gaps and n in self.tensors[: self.bwd.count])
        columns = [x if isinstance(x, list) else [x] * count for x in lists]
        streams = list(zip(*columns, strict=True))
        if apart:
            results = [self(*stream) for stream in streams]
            return tuple(results) if len(self.results) == 1 else tuple(zip(*results, strict=True))
        if self.check is not None:
            for stream in streams:
                self.check(*stream)
        results = over_streams(*lists)
        return tuple(results) if len(self.results) == 1 else tuple(map(tuple, results))

    def _dispatched(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Compute by the library ops, which compilers, modes and transforms see."""
        values: Sequence[Any] = args
        dots: Sequence[Any] | None = None
        if _dual.levels():
            flat, sizes = flatten(args)
            pairs = [_dual.split(x) for x in flat]
            if any(dot is not None for _, dot in pairs):
                if self._keeps_tangents() and self.reference is not None:
                    return _tuple(self.reference(*args))
                values, dots = (nest(half, sizes) for half in zip(*pairs, strict=True))
                self.refuse_tangents(dots)
        if dots is None:
            ys = self.by_pytorch(values)
            if ys is not None:
                return ys
        if self.autocasts:
            values, dots = self.cast(values, dots)
        count = len(self.results)
        if dots is None:
            return _tuple(self.fwd.library(*values))[:count]
        both = (*values, *dots)
        found = self.jvp.library(*[both[i] for i in self.order])[: 2 * count]
        return tuple([_dual.join(*pair) for pair in zip(found[::2], found[1::2], strict=True)])

    def by_pytorch(self, values: Sequence[Any]) -> tuple[Any, ...] | None:
        """Return the results of `plain`; None where it leaves them, or PyTorch is slow."""
        if self.plain is None or (self.autocasts and precision.is_slow(_flat(values[0])[0])):
            return None
        ys = self.plain(*values)
        return None if ys is NotImplemented else _tuple(ys)

    def cast(self, values: Sequence[Any], dots: Any) -> tuple[Sequence[Any], Any]:
        """Cast under autocast, and raise unless floating inputs are then of one dtype."""
        floats = [x for x in flatten(values)[0] if _is_float(x)]
        device = floats[0].device.type if floats else "meta"
        if device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            values, dots = precision.to(values, dtype), precision.to(dots, dtype)
            floats = [x for x in flatten(values)[0] if _is_float(x)]
        if len({x.dtype for x in floats}) > 1:
            named = self._labelled(values).items()
            check(False, self.name, self.autocasts, **{n: x for n, x in named if _is_float(x)})
        return values, dots

    def refuse_tangents(self, dots: Sequence[Any]) -> None:
        """Raise if one of the inputs that must not move has a tangent."""
        for name, dot in self._labelled(dots).items():
            if dot is not None and name.partition("[")[0] in self.fixed:
                raise _dual.no_tangent(self.name, name)

    def _labelled(self, args: Sequence[Any]) -> dict[str, Any]:
        """Return arguments by their names, those of lists by their places too."""
        return {
            f"{name}[{i}]" if isinstance(arg, (list, tuple)) else name: x
            for name, arg in zip(self.inputs, args, strict=True)
            for i, x in enumerate(_flat(arg))
        }


class Part:
    """One of an op's three library ops, with its kernels.

    Attributes:
        library: The library op.
        on_gpu: Computes on a GPU.
        count: How many of its leading results are differentiable; of bwd, how many there are.
    """

    def __init__(self, op: Op, part: str, formula: Callable[..., Any]) -> None:
        self.op, self.part, self.formula = op, part, formula
        self.names, name = list(inspect.signature(formula).parameters), f"{op.name}_{part}"
        pairs = [n for r in op.results for n in (r, f"{r}_dot")]
        self.outputs = (*(pairs if part == "jvp" else op.results), *op.statistics)
        both = (*self.names, *self.outputs)
        if part != "bwd":
            self._saved, self._constants = (
                [both.index(n) for n in kept] for kept in (op.saved, op.constants)
            )
            places = {n: i for i, n in enumerate(op.tensors)}
            self._places = [places.get(n, -1) for n in self.names]
        operands = [i for i, n in enumerate(self.names) if n in (*op.tensors, *op.results)]
        self._operands = operator.itemgetter(*operands, operands[-1])  # a tuple, of one too
        self._native = None
        schema = torch.library.infer_schema(formula, mutates_args=())
        if op.single is None:
            self.on_gpu = backend("triton", op.name, part, formula)
            self._on_cpu = backend("cpu", op.name, part, formula)
            if op.takes is not None:
                self._native = _native.op(name, required=part == "fwd")
        else:
            of_one = getattr(op.single, part)
            one_by_one = _each(of_one.on_gpu, formula)
            self.on_gpu = backend("triton", op.single.name, f"{part}_streams", one_by_one)
            self._on_cpu = _each(of_one.on_cpu, formula)
            schema = re.sub(r"Tensor(\??)", r"Tensor\1[]", schema)
            schema = re.sub(r"Tensor\[\] (\w+_dot\b)", r"Tensor?[] \1", schema)
        if _backends.ON_CPU:
            self._on_cpu, self._native = self.on_gpu, None
        self.library = register(name + schema, formula, self._fake(), self.on_cpu, self.on_gpu)
        returns = len(self.library._schema.returns)
        self.count = returns if part == "bwd" else returns - len(op.statistics)
        if part != "bwd":
            torch.library.register_autograd(
                f"mfmjt::{name}",
                lambda ctx, *bars: self.backward(ctx, bars, ctx.needs_input_grad),
                setup_context=self._keep_of_library,
                lib=_library,
            )

    def pick(self, on_cpu: bool, args: Sequence[Any]) -> Callable[..., Any]:
        """Return what computes this part of these arguments on their device."""
        if not on_cpu:
            return self.on_gpu
        native, takes = self._native, self.op.takes
        if native is not None and _native.in_use and takes(*self._operands(args)[:-1]):  # type: ignore[misc]
            return native
        if self._is_widened(args):
            return self._in_float32
        return self._on_cpu

    def _is_widened(self, args: Sequence[Any]) -> bool:
        """Return True for products without instructions, and float16, which C++ does not take."""
        if _backends.ON_CPU or self.op.single is not None:  # every stream is asked
            return False
        if self.op.autocasts:
            return precision.dtype_of(args) in precision.SLOW
        dtypes = {x.dtype for x in self._operands(args) if _is_float(x)}
        return self._native is not None and _native.in_use and dtypes == {torch.float16}

    def _in_float32(self, *args: Any) -> Any:
        return precision.in_float32(self.on_cpu, args, self.count)

    def on_cpu(self, *args: Any) -> Any:
        """Compute on a CPU."""
        return self.pick(True, args)(*args)

    def _fake(self) -> Callable[..., Any]:
        fake, op = self.op.fake, self.op
        if fake is None or self.part == "fwd":
            return fake or self.formula

        def of_jvp(*args: Any) -> tuple[Any, ...]:
            given = dict(zip(self.names, args, strict=True))
            results = _tuple(fake(*(given[n] for n in op.inputs)))
            ys, statistics = results[: len(op.results)], results[len(op.results) :]
            return *(t for y in ys for t in (y, _empty_like(y))), *statistics

        def nothing(args: Sequence[Any]) -> Tensor:
            return next(x for x in flatten(args)[0] if isinstance(x, Tensor)).new_empty(0)

        def of_bwd(*args: Any) -> Any:
            given = dict(zip(self.names, args, strict=True))
            needs = given.get("needs") or [True] * len(op.tensors)
            bars = tuple(
                _empty_like(given[n]) if wanted or isinstance(given[n], list) else nothing(args)
                for n, wanted in zip(op.tensors[: self.count], needs, strict=False)
            )
            return bars if len(bars) > 1 else bars[0]

        return of_jvp if self.part == "jvp" else of_bwd

    def keep(self, ctx: Any, args: Sequence[Any], outputs: tuple[Any, ...]) -> None:
        """Keep for `backward` what the parameters of bwd name."""
        both = (*args, *outputs)
        kept: Sequence[Any] = [both[i] for i in self._saved]
        ctx.constants = [both[i] for i in self._constants]
        ctx.set_materialize_grads(False)
        if self.op.lists:
            kept, ctx.sizes_kept = flatten(kept)
            results = outputs[: self.count : 1 if self.part == "fwd" else 2]
            ctx.likes = [[(y.shape, y.dtype, y.device) for y in ys] for ys in results]
            # PyTorch wants a None for each tensor of a list, and one for a list with gaps
            ctx.nothing = [
                [None] * len(x) if isinstance(x, list) and all(t is not None for t in x) else None
                for x in args
            ]
        ctx.save_for_backward(*kept)

    def _keep_of_library(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        outputs = _tuple(output)
        ctx.mark_non_differentiable(*flatten(outputs[self.count :])[0])
        self.keep(ctx, inputs, outputs)

    def backward(self, ctx: Any, bars: Sequence[Any], wanted: Sequence[Any]) -> tuple[Any, ...]:
        """Return the cotangents of all arguments from those of all results."""
        op, saved = self.op, ctx.saved_tensors  # once: checkpointing gives them once
        saved = nest(saved, ctx.sizes_kept) if op.lists else saved
        own = list(bars[: self.count])
        step = 1 if self.part == "fwd" else 2
        columns = [own[i::step] for i in range(step)]  # of values, and of their tangents
        if op.lists:
            own = list(map(self._bars_of, op.results, ctx.likes, *columns))
        elif step == 2:
            own = list(map(_dual.refuse_gradient, *columns))
        args = [*own, *saved, *ctx.constants]
        if "needs" in op.bwd.names:
            needs = {n: any(_flat(w)) for n, w in zip(self.names, wanted, strict=False)}
            args.append([needs[n] for n in op.tensors])
        found = list(_tuple(_eager.call(op.bwd, *[args[i] for i in op.bwd_order])))
        for i, y_bar, x in op.passing:
            found[i] = _passed(found[i], args[y_bar], args[x])
        found += [None] * (len(self.names) - len(found))  # the last one for what is no tensor
        if not op.lists:
            pairs = zip(self._places, wanted, strict=False)
            return tuple([found[i] if wants else None for i, wants in pairs])
        # No cotangent of what was None for every stream, such as a bias
        return tuple(
            [
                nothing if found[i] is None or (nothing is None and wants is not True) else found[i]
                for i, nothing, wants in zip(self._places, ctx.nothing, wanted, strict=False)
            ]
        )

    def _bars_of(self, result: str, likes: list[Any], *bars: Any) -> list[Any]:
        """Return the cotangents of a result's streams, zeros for None where bwd takes no None."""
        columns = ([None] * len(likes) if bar is None else bar for bar in bars)
        own = [_dual.refuse_gradient(*each) for each in zip(*columns, strict=True)]
        if result in self.op.optional:
            return own
        return [
            torch.zeros(shape, dtype=dtype, device=device) if bar is None else bar
            for bar, (shape, dtype, device) in zip(own, likes, strict=True)
        ]


def _tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def _flat(x: Any) -> Sequence[Any]:
    return x if isinstance(x, (list, tuple)) else (x,)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _empty_like(x: Any) -> Any:
    return [t.new_empty(t.shape) for t in x] if isinstance(x, list) else x.new_empty(x.shape)


def _passed(bar: Any, y_bar: Any, x: Any) -> Any:
    if isinstance(bar, list):
        return list(map(_passed, bar, y_bar, x))
    as_it_is = x is None or y_bar is None or bar.shape == x.shape
    return bar if as_it_is else y_bar.to(x.dtype)


def _each(
    function: Callable[..., Any], like: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Return a function of lists of streams that calls `function` for every stream.

    A stream whose tangent is None gets zeros where the formula must have one.

    Args:
        function: A formula, or what has the parameters of one.
        like: That formula.
    """
    like = like or function
    kinds = {n: str(p.annotation) for n, p in inspect.signature(like).parameters.items()}
    lists = ["Tensor" in kind for kind in kinds.values()]
    names = list(kinds)
    required = [
        (i, names.index(n[:-4]))
        for i, n in enumerate(names)
        if n[-4:] == "_dot" and "None" not in kinds[n]
    ]

    def of_stream(*args: Any) -> Any:
        filled = list(args)
        for dot, x in required:
            filled[dot] = torch.zeros_like(args[x]) if args[dot] is None else args[dot]
        return function(*filled)

    @functools.wraps(like)
    def each(*args: Any) -> Any:
        count = next(len(arg) for arg, of in zip(args, lists, strict=True) if of)
        columns = [arg if of else [arg] * count for arg, of in zip(args, lists, strict=True)]
        results = list(map(of_stream, *columns))
        if any(result is NotImplemented for result in results):
            return NotImplemented
        if not isinstance(results[0], tuple):
            return results
        return tuple(map(list, zip(*results, strict=True)))

    return each


def backend(
    package: str, module: str, function: str, formula: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a function of `mfmjt.kernels.<package>.<module>`, on the device of its arguments.

    It is imported when it is called first. The formula computes what it does not: where there is no
    such module or function, or it returns NotImplemented.
    """
    full = f"mfmjt.kernels.{package}.{module}"
    if (package == "triton" and not _backends.AVAILABLE) or not importlib.util.find_spec(full):
        return formula

    @functools.cache
    def kernel() -> Callable[..., Any]:
        return getattr(importlib.import_module(full), function, formula)

    def run(*args: Any) -> Any:
        first = next(x for x in flatten(args)[0] if isinstance(x, Tensor))
        with torch.cuda.device_of(first):  # on which Triton launches
            results = kernel()(*args)
            return formula(*args) if results is NotImplemented else results

    return run


def register(
    schema: str,
    formula: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    cpu: Callable[..., Any] | None = None,
    gpu: Callable[..., Any] | None = None,
) -> Any:
    """Register the library op `mfmjt::<schema>`.

    Args:
        schema: Name and signature in PyTorch's schema language.
        formula: Computes the result with ATen operations on any device. Results are contiguous and
            alias neither an argument nor one another.
        fake: Gives results of the right shape without data. Default: the formula, which then must
            not look at values.
        cpu: Takes the place of the formula on a CPU.
        gpu: Takes the place of the formula on a GPU.

    Returns:
        The op, to be called with positional arguments.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.mfmjt, name).default
    names = [argument.name for argument in op._schema.arguments]
    for kernel, key in ((formula, "CompositeExplicitAutograd"), (cpu, "CPU"), (gpu, "CUDA")):
        if kernel is not None:
            _library.impl(name, _guarded(name, names, kernel), key)
    fake = _guarded(name, names, fake or formula)
    torch.library.register_fake(f"mfmjt::{name}", fake, lib=_library)
    return op


def _guarded(op: str, names: list[str], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Check every argument: dense, real, on one device, tangents of their primals' shapes.

    ATen would read out of bounds instead of raising. Autocast acts on what enters an op, in its
    front door; inside, dtypes are chosen.
    """
    tangents = [
        (i, names.index(name[:-4]))
        for i, name in enumerate(names)
        if name.endswith("_dot") and name[:-4] in names
    ]

    @functools.wraps(kernel)
    def guarded(*args: Any) -> Any:
        first = None
        for name, arg in zip(names, args, strict=True):
            for x in _flat(arg):
                if not isinstance(x, Tensor):
                    continue
                first = x if first is None else first
                if x.device != first.device:
                    where = f"on {first.device} as its first argument"
                    raise ValueError(f"mfmjt::{op} needs {name} {where}; got {x.device}.")
                if x.layout is not torch.strided or x.is_complex():
                    got = f"{x.layout}, {x.dtype}".replace("torch.", "")
                    raise ValueError(f"mfmjt::{op} needs {name} dense and real; got {got}.")
        for i, j in tangents:
            for dot, x in zip(_flat(args[i]), _flat(args[j]), strict=True):
                if dot is not None and dot.shape != x.shape:
                    needs = f"{names[i]} of the shape of {names[j]}, {tuple(x.shape)}"
                    raise ValueError(f"mfmjt::{op} needs {needs}; got {tuple(dot.shape)}.")
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return kernel(*args)
        return kernel(*args)

    return guarded
