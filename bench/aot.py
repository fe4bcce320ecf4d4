"""Compile every Triton kernel for GPUs that are not there, and read what the compiler made of it.

The ops are called as a network calls them, value, tangent and gradient, on memory that is never
touched; instead of a launch each kernel is compiled, with the very configuration that would have
been launched, and its machine code is read: registers, spills, shared memory, matrix instructions.

The exit status is 1 if nothing was compiled, or a kernel spills, needs more registers or shared
memory than a block may have, computes a bf16 matrix product without matrix instructions, or (with
--compare) is not as the table of this Triton says; of other Tritons there is none. Norms are also
compiled for the widest rows that they take, which no network has: these must fit their GPUs, may
spill, and are in no table.

With --cost the launches are modelled instead, on sm_90: see `bench.cost.model`, which says what
that is and what it cannot see. Each case then has a row for each kernel it launches.

Examples:
  python -m bench aot                                    all ops and targets: prints a table
  python -m bench aot --op swiglu --target sm_90
  python -m bench aot --out bench/results/aot            write the table of this Triton
  python -m bench aot --quick --compare bench/results/aot   what continuous integration does
  python -m bench aot --cost --op joint_attention           what it would cost on an H200
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "0"  # before Triton and the kernels are imported

import pandas
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import bench.ops
from bench import parser
from bench.case import Case, Shape, cases, shapes
from bench.rows import Row, dtype_name
from mfmjt import kernels
from mfmjt.files import atomic_path
from mfmjt.model.blocks import FrameCondition, JointBlock, Pending
from mfmjt.testing import BACKWARD, JVP_BACKWARD, Function, Operands, as_tuple, runner

__all__ = ["DTYPES", "NETWORKS", "OPS", "TARGETS", "Chip", "Launch", "faults", "main", "offline"]
__all__ += ["compile_launch", "occupancy", "offline_driver", "read_table", "resources"]
__all__ += ["table_of", "write_table"]


@dataclass(frozen=True)
class Chip:
    """What a compiled kernel is held against.

    Attributes:
        target: What Triton compiles for.
        shared: Bytes of shared memory that one block may use.
        registers: 32-bit registers of one multiprocessor, as many as one block may have; or of one
            SIMD on AMD.
        warps: Most warps on one multiprocessor (SIMD).
        matrix: What its matrix instructions begin with, best first.
    """

    target: GPUTarget
    shared: int
    registers: int
    warps: int
    matrix: tuple[str, ...]


TARGETS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024, 65536, 64, ("mma.sync",)),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024, 65536, 64, ("wgmma.mma_async",)),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024, 65536, 64, ("tcgen05.mma",)),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024, 512 * 64, 8, ("v_mfma",)),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUICK, WIDEST = "small_16k", "widest"
WIDE_OPS = ("adaln", "gated_residual_adaln")
TENSOR_MEMORY = 512  # columns, on sm_100
MATRIX_OPS = ("joint_attention", "conv1d")


@contextlib.contextmanager
def offline_driver(target: GPUTarget) -> Iterator[None]:
    """Make Triton take `target` for the current GPU inside."""
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: f"{target.backend}{target.arch}",
        get_current_stream=lambda device: 0,
    )
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    try:
        yield
    finally:
        triton.runtime.driver._active = before


class Launch(NamedTuple):
    """A launch that was compiled and did not happen.

    Attributes:
        kernel: As Triton compiled it.
        grid: Programs along three axes.
        arguments: By the name of the parameter.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]


_compile = JITFunction.run


def compile_launch(function: Any, args: Any, grid: Any, options: dict[str, Any]) -> Launch:
    """Compile what would be launched."""
    kernel = _compile(function, *args, grid=grid, warmup=True, **options)
    x, y, z = (*grid, 1, 1)[:3]
    return Launch(kernel, (x, y, z), dict(zip(function.arg_names, args, strict=False)) | options)


@contextlib.contextmanager
def offline(target: GPUTarget) -> Iterator[list[Launch]]:
    """Compile for `target` in place of a launch inside; yield the launches."""
    compiled: list[Launch] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(compile_launch(self, args, grid, kwargs))
        return compiled[-1].kernel

    with offline_driver(target), patch.object(JITFunction, "run", compile_only):
        yield compiled


def resources(kernel: Any) -> Row:
    """Return registers, spilled and shared bytes of a kernel, and its matrix instructions."""
    asm = kernel.asm
    if "cubin" in asm:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            text = subprocess.run(
                [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        usage = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", text)}
        found = set(re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", asm["ptx"]))
        row = {"registers": usage["REG"], "spills": usage["STACK"] + usage["LOCAL"]}
    else:
        usage = {k: int(v) for k, v in re.findall(r"\.(\w+_count):\s+(\d+)", asm["amdgcn"])}
        found = set(re.findall(r"\b(v_mfma)", asm["amdgcn"]))
        row = {"registers": usage["vgpr_count"], "spills": usage["vgpr_spill_count"]}
    meta = kernel.metadata
    return {
        "kernel": meta.name,
        "warps": meta.num_warps,
        **row,
        "shared": meta.shared,
        "tensor_memory": getattr(meta, "tmem_size", None) or 0,
        "matrix": " ".join(sorted(found)),
    }


def occupancy(row: Row, chip: Chip) -> int:
    """Return the warps that fit on a multiprocessor (SIMD on AMD), by registers and memory."""
    if chip.target.backend == "hip":
        return min(chip.warps, chip.registers // 64 // max(8, -(-row["registers"] // 8) * 8))
    per_warp = -(-row["registers"] * 32 // 256) * 256
    blocks = chip.registers // (per_warp * row["warps"])
    if row["shared"]:
        blocks = min(blocks, (chip.shared + 1024) // (row["shared"] + 1024))
    return min(chip.warps, blocks * row["warps"])


def _call(function: Function, moving: dict[str, Tensor], fixed: dict[str, Tensor]) -> None:
    """Call for value and gradients, then for these and the tangents."""
    inputs = {name: x.requires_grad_() for name, x in (moving | fixed).items()}
    tangents = {name: torch.empty_like(x) for name, x in moving.items()}
    cotangents = tuple(torch.empty_like(y) for y in as_tuple(function(**inputs)))
    for mode in (BACKWARD, JVP_BACKWARD):
        runner(function, mode)(Operands(inputs, tangents, cotangents))


def _run(case: Case, dtype: torch.dtype) -> None:
    """Call an op in the modes that are compiled, on memory that is never touched."""
    given = case.inputs.items()
    constants = {name: i.constant() for name, i in given if i.constant is not None}
    function = functools.partial(case.function, **constants)
    drawn = {n: torch.empty(i.shape, dtype=dtype) for n, i in given if n not in constants}
    if BACKWARD in case.modes:
        moving = {name: drawn.pop(name) for name in case.moving}
        _call(function, moving, drawn)
    else:
        with torch.no_grad():
            function(**drawn)


@torch.no_grad()
def _streams(s: Shape, dtype: torch.dtype) -> None:
    """Call what a guided step of inference does: blocks of three and of one stream, both ends."""
    batch, width, (latent, video, text) = s.batch, s.dim, s.streams

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype)

    def weight(outs: int, taps: int, channels: int) -> kernels.streams.Packed:
        return kernels.streams.Packed(empty(outs, taps, channels))

    norm, project = kernels.streams.gated_residual_norm, kernels.streams.project
    for n in (3, 1):
        xs = [empty(batch, tokens, width) for tokens in s.streams[:n]]
        units = [weight(2 * s.hidden, k, width)._replace(glu=True) for k in (3, 3, 1)[:n]]
        ys = project(xs, units)
        downs = [weight(width, k, s.hidden) for k in (3, 3, 1)[:n]]
        ropes = [torch.empty(x.shape[1], width // s.heads // 2, 2) for x in xs[:2]]
        qkv = [weight(3 * width, 1, width)] * n, [empty(3 * width)] * n
        norms = [empty(width // s.heads)] * n
        kernels.streams.project_qkv(xs, *qkv, norms, norms, [*ropes, None][:n], s.heads)
        modulations = [empty(batch, rows, 6 * width).chunk(6, -1) for rows in (192, 1, 1)[:n]]
        gates, shifts, scales = ([m[i] for m in modulations] for i in range(3))
        rows = [torch.empty(latent, dtype=torch.int64), None, None][:n]
        modulated = gates, shifts, scales, rows, 1e-5
        norm(xs, xs, *modulated)
        kernels.streams.project_norm(ys, downs, None, xs, *modulated)
    norm(xs, None, None, shifts, scales, rows, 1e-5)
    layers = ((latent, 20, 7), (video, 1024, 1), (192, 768, 7), (text, 1024, 1))
    project(
        [empty(batch, tokens, channels) for tokens, channels, _ in layers],
        [weight(width, taps, channels) for _, channels, taps in layers],
        [empty(width), empty(width), empty(192, width), empty(width)],
        ["selu", "none", "selu", "none"],
    )
    conditions = [empty(batch, 1, width), empty(batch, 192, width)]
    outs = [40 * width, 72 * width]
    project(conditions, [weight(n, 1, width) for n in outs], [empty(n) for n in outs])
    (u,) = project(xs, [weight(20, 7, width)], [empty(20)])
    kernels.streams.guide(empty(batch // 2, *u.shape[1:]), u[: batch // 2 * 2], 1.5)
    kernels.streams.silu_conditions(*conditions)
    kernels.streams.pool([empty(batch, tokens, width) for tokens in (video, text)])


def _joint_block(s: Shape, dtype: torch.dtype) -> None:
    """Train a joint block: its three streams share launches, in value, tangent and gradient."""
    if (s.model, dtype) != ("small_16k", torch.bfloat16):  # it takes minutes for each target
        return
    block = JointBlock(s.dim, s.heads, s.hidden, last=False).to(dtype)
    ropes = [torch.empty(n, s.dim // s.heads // 2, 2) for n in s.streams[:2]]
    shared = torch.empty(s.batch, 1, s.dim, dtype=dtype)
    frames = torch.empty(s.batch, 192, s.dim, dtype=dtype)
    row_of = torch.empty(s.length, dtype=torch.int64)

    def run(**given: Tensor) -> tuple[Tensor, ...]:
        whole = FrameCondition(shared + given["shared"])
        conditions = [FrameCondition(frames + given["shared"], row_of), whole, whole]
        streams = tuple(Pending(given[f"x{i}"]) for i in range(3))
        for _ in range(2):  # the second has a sum to add up first
            streams = block(streams, conditions, [*ropes, None])
        return tuple(stream.h for stream in streams if stream.h is not None)

    given = {f"x{i}": torch.empty(s.batch, n, s.dim, dtype=dtype) for i, n in enumerate(s.streams)}
    _call(run, given | {"shared": shared}, {})


NETWORKS = {"joint_block": _joint_block, "streams": _streams}
"""What is called as networks call it, and not case by case."""
OPS = sorted(NETWORKS | dict.fromkeys(op for op in bench.ops.OPS if op != "linear"))
"""All ops with Triton kernels; the products of `linear` are the vendor's."""


def compile_op(op: str, target: str, quick: bool) -> list[Row]:
    """Return a row for each kernel that an op launches, once where the figures are the same.

    Args:
        op: One of `OPS`.
        target: One of `TARGETS`.
        quick: The first shape only, and the widest, in float32, which takes most registers.
    """
    calls: list[tuple[str, Callable[[torch.dtype], None]]]
    if op in NETWORKS:
        calls = [(s.model, functools.partial(NETWORKS[op], s)) for s in shapes("aot")]
    else:
        every = [*cases(op, "aot"), *(cases(op, "widest") if op in WIDE_OPS else ())]
        calls = [(case.model, functools.partial(_run, case)) for case in every]
    rows: dict[str, Row] = {}
    for dtype in DTYPES:
        for shape, call in calls:
            if shape == WIDEST and dtype != torch.float32:
                continue
            if quick and shape not in (QUICK, WIDEST):
                continue
            with offline(TARGETS[target].target) as compiled:
                call(dtype)
            for kernel, *_ in compiled:
                code = kernel.asm.get("cubin") or kernel.asm["amdgcn"].encode()
                digest = hashlib.sha256(code).hexdigest()
                if digest not in rows:
                    first = {"target": target, "op": op, "shape": shape, "dtype": dtype_name(dtype)}
                    rows[digest] = first | resources(kernel)
                    rows[digest]["occupancy"] = occupancy(rows[digest], TARGETS[target])
    return [dict(items) for items in dict.fromkeys(tuple(row.items()) for row in rows.values())]


def faults(row: Row) -> list[str]:
    """Return what is wrong with a compiled kernel."""
    chip = TARGETS[row["target"]]
    found = []
    if int(row["spills"]) and row.get("shape") != WIDEST:
        found.append(f"spills {row['spills']}")
    needed = 32 * int(row["warps"]) * int(row["registers"])
    if chip.target.backend == "cuda" and needed > chip.registers:
        found.append(f"needs {needed} registers; a block has {chip.registers}")
    if int(row["shared"]) > chip.shared:
        found.append(f"needs {row['shared']} bytes of shared memory; the GPU has {chip.shared}")
    if int(row["tensor_memory"]) > TENSOR_MEMORY:  # Triton then gives an empty kernel, silently
        found.append(f"needs {row['tensor_memory']} of {TENSOR_MEMORY} columns of tensor memory")
    product = row["op"] in MATRIX_OPS and re.search(r"_(fwd|jvp|bwd\w*)_kernel", row["kernel"])
    product = product or row["kernel"].startswith(("_product", "_convolve"))
    if product and row["dtype"] == "bfloat16" and not row["matrix"]:
        found.append("no matrix instruction")
    return found


def _name(row: Row) -> str:
    return " ".join(str(row[key]) for key in ("target", "op", "shape", "dtype", "kernel"))


def table_of(kind: str, folder: str) -> Path:
    """Return the path of a table of this Triton."""
    version = "_".join(triton.__version__.split(".")[:2])
    return Path(folder) / f"{kind}triton_{version}.csv"


def read_table(path: Path) -> pandas.DataFrame:
    """Return a table, all of it text."""
    if not path.exists():
        return pandas.DataFrame(columns=["target", "op"])
    return pandas.read_csv(path, dtype=str, keep_default_na=False)


def write_table(rows: list[Row], path: Path, names: Sequence[str]) -> None:
    """Write rows into a table, in place of those of the same ops and targets; `names` order it."""
    new, old = pandas.DataFrame(rows).astype(str), read_table(path)
    replaced = old.set_index(["op", "target"]).index.isin(new.set_index(["op", "target"]).index)
    table = pandas.concat([old[~replaced], new])
    order = {name: i for i, name in enumerate((*names, *TARGETS))}
    table = table.sort_values(["op", "target"], key=lambda c: c.map(order), kind="stable")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:
        table.to_csv(part, index=False)


def _differences(rows: list[Row], path: Path) -> list[str]:
    """Return the rows that the committed table of this Triton does not have."""
    known = set(read_table(path).itertuples(index=False, name=None))
    if not known:
        print(f"There is no {path}: of this Triton only faults are looked for.")
    return [
        f"{_name(row)} is not as {path} says: " + str({k: row[k] for k in list(row)[5:]})
        for row in rows
        if known and tuple(map(str, row.values())) not in known
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and compile; return the exit status."""
    command = parser("aot", __doc__)
    command.add_argument("--op", action="append", choices=OPS, help="[all]")
    command.add_argument("--target", action="append", choices=[*TARGETS], help="[all]")
    command.add_argument("--quick", action="store_true", help="small_16k's training shapes only")
    command.add_argument("--cost", action="store_true", help="model launches on sm_90")
    command.add_argument(
        "--out", metavar="DIR", help="put the rows into DIR/[cost_]triton_<version>.csv"
    )
    command.add_argument("--compare", metavar="DIR", help="the rows must be in the table there")
    given = command.parse_args(argv)
    rows: list[Row] = []
    wrong: list[str] = []
    if given.cost:
        from bench.cost.table import cost_op, line_of

        for op in given.op or OPS:
            for row in cost_op(op, given.quick):
                print(line_of(row), flush=True)
                rows.append(row)
    for op in () if given.cost else given.op or OPS:
        for target in given.target or TARGETS:
            for row in compile_op(op, target, given.quick):
                bad = faults(row)
                facts = (f"{k} {row[k]}" for k in ("warps", "registers", "shared", "occupancy"))
                line = f"{_name(row):80} {'  '.join(facts)}  {row['matrix']}  {'; '.join(bad)}"
                print(line.rstrip(), flush=True)
                rows += [row] if row["shape"] != WIDEST else []
                wrong += [f"{_name(row)}: {fault}" for fault in bad]
    if not rows:
        sys.stderr.write("No kernel was compiled: the ops did not reach their Triton kernels.\n")
        return 1
    kind = "cost_" if given.cost else ""
    if given.out:
        write_table(rows, table_of(kind, given.out), OPS)
    if given.compare:
        wrong += _differences(rows, table_of(kind, given.compare))
    sys.stderr.writelines(f"{line}\n" for line in wrong)
    return 1 if wrong else 0
