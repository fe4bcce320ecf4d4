"""Compile every Triton kernel for GPUs that are not there, and read what the compiler made of it.

The ops are called as a network calls them, value, tangent and gradient, on memory that is never
touched; instead of a launch each kernel is compiled, with the very configuration that would have
been launched, and its machine code is read: registers, spills, shared memory, matrix instructions.

The exit status is 1 if nothing was compiled, or a kernel spills, needs more registers or shared
memory than a block may have, computes a bf16 matrix product without matrix instructions, or (with
--compare) is not as the table of this Triton says; of other Tritons there is none. Norms are also
compiled for the widest rows that they take, which no network has: these must fit their GPUs, may
spill, and are in no table.

Examples:
  python -m bench aot                                    all ops and targets: prints a table
  python -m bench aot --op swiglu --target sm_90
  python -m bench aot --out bench/results/aot            write the table of this Triton
  python -m bench aot --quick --compare bench/results/aot   what continuous integration does
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before Triton and the kernels are imported

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench import parser
from mfmjt import kernels
from mfmjt.files import atomic_path
from mfmjt.kernels.triton.norm import MAX_WIDTH
from mfmjt.model.blocks import FrameCondition, JointBlock, Pending
from mfmjt.testing import BACKWARD, JVP_BACKWARD, Function, Operands, as_tuple, runner

__all__ = [
    "OPS",
    "TARGETS",
    "Chip",
    "compile_op",
    "compile_widest",
    "faults",
    "main",
    "offline",
    "offline_driver",
    "resources",
]

Row = dict[str, Any]


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
# network, batch, latent tokens, all tokens, C, heads, width of the feed-forward
SHAPES = {
    "small_16k": (64, 250, 391, 448, 7, 1280),
    "small_16k_one": (2, 250, 391, 448, 7, 1280),
    "large_44k_v2": (8, 345, 486, 896, 14, 2560),
    "nano": (16, 250, 346, 128, 2, 256),
}
QUICK = {"small_16k"}
WIDEST = {"widest": (2, 64, 64, MAX_WIDTH, 1, MAX_WIDTH)}
WIDE_OPS = ("adaln", "gated_residual_adaln")
TENSOR_MEMORY = 512  # columns, on sm_100
MATRIX_OPS = ("joint_attention", "conv1d")


class _Offline:
    """A driver for a GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def offline_driver(target: GPUTarget) -> Iterator[None]:
    """Make Triton take `target` for the current GPU inside."""
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_Offline(target))
    try:
        yield
    finally:
        driver._active = before


@contextlib.contextmanager
def offline(target: GPUTarget) -> Iterator[list[Any]]:
    """Compile for `target` in place of a launch inside; yield the compiled kernels."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    with offline_driver(target):
        JITFunction.run = compile_only
        try:
            yield compiled
        finally:
            JITFunction.run = run


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


def _occupancy(row: Row, chip: Chip) -> int:
    """Return the warps that fit on a multiprocessor (SIMD on AMD), by registers and memory."""
    if chip.target.backend == "hip":
        return min(chip.warps, chip.registers // 64 // max(8, -(-row["registers"] // 8) * 8))
    per_warp = -(-row["registers"] * 32 // 256) * 256
    blocks = chip.registers // (per_warp * row["warps"])
    if row["shared"]:
        blocks = min(blocks, (chip.shared + 1024) // (row["shared"] + 1024))
    return min(chip.warps, blocks * row["warps"])


def _modes(function: Function, moving: dict[str, Tensor], fixed: dict[str, Tensor]) -> None:
    """Call for value and gradients, then for these and the tangents."""
    inputs = {name: x.requires_grad_() for name, x in (moving | fixed).items()}
    tangents = {name: torch.empty_like(x) for name, x in moving.items()}
    cotangents = tuple(torch.empty_like(y) for y in as_tuple(function(**inputs)))
    for mode in (BACKWARD, JVP_BACKWARD):
        runner(function, mode)(Operands(inputs, tangents, cotangents))


def _adaln(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, length, _, width, _, _ = shape
    x = torch.empty(batch, length, width, dtype=dtype)
    for tokens in (1, length):  # modulation per sample, and per token, as chunks of one tensor
        shift, scale, _ = torch.empty(batch, tokens, 3 * width, dtype=dtype).chunk(3, dim=-1)
        _modes(kernels.adaln, {"x": x, "shift": shift.detach(), "scale": scale.detach()}, {})


def _gated_residual_adaln(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, length, _, width, _, _ = shape
    x, h = (torch.empty(batch, length, width, dtype=dtype) for _ in range(2))
    for tokens in (1, length):
        chunks = torch.empty(batch, tokens, 3 * width, dtype=dtype).chunk(3, dim=-1)
        gate, shift, scale = (chunk.detach() for chunk in chunks)
        moving = {"x": x, "h": h, "gate": gate, "shift": shift, "scale": scale}
        _modes(kernels.gated_residual_adaln, moving, {})


def _qk_norm_rope(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, length, _, width, heads, _ = shape
    qkv = torch.empty(batch, length, 3, heads, width // heads, dtype=dtype)
    weights = {f"{n}_weight": torch.empty(width // heads, dtype=dtype) for n in "qk"}
    for rope in (None, torch.empty(length, width // heads // 2, 2)):
        _modes(functools.partial(kernels.qk_norm_rope, rope=rope), {"qkv": qkv}, weights)


def _joint_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, length, tokens, width, heads, _ = shape
    streams = (length, tokens - length)

    def attend(**given: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (tuple(given[f"{name}{i}"] for i in range(2)) for name in "qkv")
        return kernels.joint_attention(q, k, v)

    given = {
        f"{name}{i}": torch.empty(batch, n, heads, width // heads, dtype=dtype)
        for i, n in enumerate(streams)
        for name in "qkv"
    }
    _modes(attend, given, {})
    alone = {name: given[f"{name}0"].detach() for name in "qkv"}
    _modes(kernels.joint_attention, alone, {})
    wide = {name: torch.empty(2, 512, 12, 128, dtype=dtype) for name in "qkv"}
    _modes(kernels.joint_attention, wide, {})


def _swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, length, _, _, _, hidden = shape
    gate, up = torch.empty(batch, length, 2 * hidden, dtype=dtype).chunk(2, dim=-1)
    _modes(kernels.swiglu, {"gate": gate.detach(), "up": up.detach()}, {})


def _conv1d(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, length, _, width, _, hidden = shape
    for channels, out in ((width, 2 * hidden), (hidden, width)):
        x = torch.empty(batch, length, channels, dtype=dtype)
        weight = torch.empty(out, channels, 3, dtype=dtype)
        _modes(kernels.conv1d, {"x": x}, {"weight": weight, "bias": torch.empty(out, dtype=dtype)})


def _snake(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.empty(1, shape[3], 8 * shape[1], dtype=dtype)
    with torch.no_grad():  # the vocoder's only: its tangent and gradient are PyTorch formulas
        kernels.snake(x, *(torch.empty(shape[3], dtype=dtype) for _ in range(2)))


def _streams(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Call what a guided step of inference does: blocks of three and of one stream, both ends."""
    batch, length, tokens, width, heads, hidden = shape
    lengths = (length, 64, tokens - length - 64)

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype)

    def weight(outs: int, taps: int, channels: int) -> kernels.streams.Packed:
        return kernels.streams.Packed(empty(outs, taps, channels))

    norm = kernels.streams.gated_residual_norm
    with torch.no_grad():
        for n in (3, 1):
            xs = [empty(batch, tokens, width) for tokens in lengths[:n]]
            units = [weight(2 * hidden, taps, width)._replace(glu=True) for taps in (3, 3, 1)[:n]]
            ys = kernels.streams.project(xs, units)
            kernels.streams.project(ys, [weight(width, taps, hidden) for taps in (3, 3, 1)[:n]])
            ropes = [torch.empty(x.shape[1], width // heads // 2, 2) for x in xs[:2]]
            weights, biases = [weight(3 * width, 1, width)] * n, [empty(3 * width)] * n
            norms = [empty(width // heads)] * n
            kernels.streams.project_qkv(
                xs, weights, biases, norms, norms, [*ropes, None][:n], heads
            )
            modulations = [empty(batch, rows, 6 * width).chunk(6, -1) for rows in (192, 1, 1)[:n]]
            gates, shifts, scales = ([m[i] for m in modulations] for i in range(3))
            rows = [torch.empty(length, dtype=torch.int64), None, None][:n]
            norm(xs, xs, gates, shifts, scales, rows, 1e-5)
        norm(xs, None, None, shifts, scales, rows, 1e-5)
        biases = [empty(width), empty(width), empty(192, width), empty(width)]
        layers = ((length, 20, 7), (64, 1024, 1), (192, 768, 7), (tokens - length - 64, 1024, 1))
        kernels.streams.project(
            [empty(batch, tokens, channels) for tokens, channels, _ in layers],
            [weight(width, taps, channels) for _, channels, taps in layers],
            biases,
            ["selu", "none", "selu", "none"],
        )
        conditions = [empty(batch, 1, width), empty(batch, 192, width)]
        weights = [weight(outs * width, 1, width) for outs in (40, 72)]
        kernels.streams.project(conditions, weights, [empty(outs * width) for outs in (40, 72)])
        kernels.streams.project(xs, [weight(20, 7, width)], [empty(20)])


def _joint_block(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Train a joint block: its three streams share launches, in value, tangent and gradient."""
    batch, length, tokens, width, heads, hidden = shape
    if (shape, dtype) != (SHAPES["small_16k"], torch.bfloat16):  # it takes minutes for each target
        return
    lengths = (length, 64, tokens - length - 64)
    block = JointBlock(width, heads, hidden, last=False).to(dtype)
    ropes = [torch.empty(n, width // heads // 2, 2) for n in lengths[:2]]
    rows = (
        torch.empty(batch, length, width, dtype=dtype),
        *[torch.empty(batch, 1, width, dtype=dtype)] * 2,
    )

    def run(**given: Tensor) -> tuple[Tensor, ...]:
        conditions = [FrameCondition(row + given["shared"]) for row in rows]
        streams = tuple(Pending(given[f"x{i}"]) for i in range(3))
        for _ in range(2):  # the second has a sum to add up first
            streams = block(streams, conditions, [*ropes, None])
        return tuple(stream.h for stream in streams if stream.h is not None)

    given = {f"x{i}": torch.empty(batch, n, width, dtype=dtype) for i, n in enumerate(lengths)}
    _modes(run, given | {"shared": torch.empty(batch, 1, width, dtype=dtype)}, {})


OPS: dict[str, Callable[[tuple[int, ...], torch.dtype], None]] = {
    "adaln": _adaln,
    "conv1d": _conv1d,
    "gated_residual_adaln": _gated_residual_adaln,
    "joint_block": _joint_block,
    "joint_attention": _joint_attention,
    "qk_norm_rope": _qk_norm_rope,
    "snake": _snake,
    "streams": _streams,
    "swiglu": _swiglu,
}
"""All ops with Triton kernels; the products of `linear` are the vendor's."""


def compile_op(op: str, target: str, shapes: tuple[str, ...] | None = None) -> list[Row]:
    """Return a row for each different kernel that `op` launches for the networks' shapes."""
    return _compiled(op, target, {name: SHAPES[name] for name in shapes or SHAPES}, DTYPES)


def compile_widest(op: str, target: str) -> list[Row]:
    """Return the same for rows of `MAX_WIDTH`, in float32, which takes most registers."""
    return _compiled(op, target, WIDEST, (torch.float32,)) if op in WIDE_OPS else []


def _compiled(
    op: str, target: str, shapes: Mapping[str, tuple[int, ...]], dtypes: tuple[torch.dtype, ...]
) -> list[Row]:
    """Return a row for each kernel, once where kernels of different code have the same figures."""
    rows: dict[str, Row] = {}
    for dtype in dtypes:
        for shape, sizes in shapes.items():
            with offline(TARGETS[target].target) as compiled:
                OPS[op](sizes, dtype)
            for kernel in compiled:
                code = kernel.asm.get("cubin") or kernel.asm["amdgcn"].encode()
                digest = hashlib.sha256(code).hexdigest()
                if digest not in rows:
                    found = resources(kernel)
                    first = {"op": op, "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
                    occupancy = _occupancy(found, TARGETS[target])
                    rows[digest] = {"target": target, **first, **found, "occupancy": occupancy}
    return [dict(items) for items in dict.fromkeys(tuple(row.items()) for row in rows.values())]


def faults(row: Row) -> list[str]:
    """Return what is wrong with a compiled kernel."""
    chip = TARGETS[row["target"]]
    found = []
    if int(row["spills"]) and row.get("shape") not in WIDEST:
        found.append(f"spills {row['spills']}")
    needed = 32 * int(row["warps"]) * int(row["registers"])
    if chip.target.backend == "cuda" and needed > chip.registers:
        found.append(f"needs {needed} registers; a block has {chip.registers}")
    if int(row["shared"]) > chip.shared:
        found.append(f"needs {row['shared']} bytes of shared memory; the GPU has {chip.shared}")
    if int(row["tensor_memory"]) > TENSOR_MEMORY:  # Triton then gives an empty kernel, silently
        found.append(f"needs {row['tensor_memory']} of {TENSOR_MEMORY} columns of tensor memory")
    product = row["op"] in MATRIX_OPS and re.search(r"_(fwd|jvp|bwd\w*)_kernel", row["kernel"])
    product = product or row["kernel"].startswith("_product")
    if product and row["dtype"] == "bfloat16" and not row["matrix"]:
        found.append("no matrix instruction")
    return found


def _name(row: Row) -> str:
    return " ".join(str(row[key]) for key in ("target", "op", "shape", "dtype", "kernel"))


def _print(rows: list[Row]) -> None:
    for row in rows:
        wrong = faults(row)
        facts = [f"{key} {row[key]}" for key in ("warps", "registers", "shared", "occupancy")]
        print(f"{_name(row):80} {'  '.join(facts)}  {row['matrix']}  {'; '.join(wrong)}".rstrip())


def _table(folder: str) -> Path:
    return Path(folder) / f"triton_{'_'.join(triton.__version__.split('.')[:2])}.csv"


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(rows: list[Row], path: Path) -> None:
    """Write rows into a table, in place of those of the same ops and targets."""
    replaced = {(row["op"], row["target"]) for row in rows}
    table = [row for row in _read(path) if (row["op"], row["target"]) not in replaced] + rows
    table.sort(key=lambda row: ([*OPS].index(row["op"]), [*TARGETS].index(row["target"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def _differences(rows: list[Row], path: Path) -> list[str]:
    """Return the rows that the committed table of this Triton does not have."""
    known = {tuple(row.values()) for row in _read(path)}
    if not known:
        print(f"There is no {path}: of this Triton only faults are looked for.")
    return [
        f"{_name(row)} is not as {path} says: " + str({k: row[k] for k in list(row)[5:]})
        for row in rows
        if known and tuple(str(value) for value in row.values()) not in known
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and compile; return the exit status."""
    command = parser("aot", __doc__)
    command.add_argument("--op", action="append", choices=sorted(OPS), help="[all]")
    command.add_argument("--target", action="append", choices=list(TARGETS), help="[all]")
    command.add_argument("--quick", action="store_true", help="small_16k's training shapes only")
    command.add_argument("--out", metavar="DIR", help="put the rows into DIR/triton_<version>.csv")
    command.add_argument("--compare", metavar="DIR", help="the rows must be in the table there")
    given = command.parse_args(argv)
    rows: list[Row] = []
    widest: list[Row] = []
    for op in given.op or OPS:
        for target in given.target or TARGETS:
            more = compile_op(op, target, tuple(QUICK) if given.quick else None)
            wide = compile_widest(op, target)
            _print(more + wide)
            sys.stdout.flush()
            rows, widest = rows + more, widest + wide
    if not rows:
        sys.stderr.write("No kernel was compiled: the ops did not reach their Triton kernels.\n")
        return 1
    if given.out:
        _write(rows, _table(given.out))
    wrong = [f"{_name(row)}: {fault}" for row in rows + widest for fault in faults(row)]
    if given.compare:
        wrong += _differences(rows, _table(given.compare))
    sys.stderr.writelines(f"{line}\n" for line in wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
