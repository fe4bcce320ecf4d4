"""What a launch costs on sm_90 by its machine code: a model, and no measurement.

One warp of some programs is followed through the code (`bench.cost.sass`) and what it issues is
counted; all warps of a program are taken to do the same. A launch then takes as long as the
busiest of these, on the multiprocessor that has most programs:

    issue     every instruction takes one of the four issue slots of a cycle
    chain     a warp waits for its own results: it issues at most every other cycle, and matrix
              products that its code waits for at once (all that are not left in flight) come on
              top; programs that a multiprocessor holds do so side by side, the others after them
    units     integer and comparison at 64 lanes a cycle, exponentials, sines, reciprocals and
              scalar conversions at 16, shared memory at 128 bytes, loads from L2 at 64 bytes
    tensor    operations of matrix instructions at 790 TFLOP/s of dense bf16 on all
              multiprocessors, half of that in TF32
    memory    every operand once at 4.3 TB/s, on all multiprocessors

What it cannot see: waiting for memory that too few warps or stages hide, barriers, bank conflicts,
the order of instructions, hits in L2 (an operand that is in L2 costs what memory does), operands
that are read twice or in part, clocks that fall, the launch itself (see `NODE`), and whether any of
the rates is reached. The two ceilings, 790 TFLOP/s and 4.3 TB/s, are those of an H200 under
PyTorch's matmul and copy; the clock is taken to be 1.75 GHz.
"""

from __future__ import annotations

import math
import re
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from bench.aot import TARGETS, Launch, occupancy, resources
from bench.cost.sass import Code, disassemble, follow
from bench.rows import Row

__all__ = ["MEMORY", "NODE", "TENSOR", "arguments", "code_of", "cost", "operand_bytes"]

Counts = defaultdict[str, float]

PROCESSORS, CLOCK = 132, 1.75e9
TENSOR, MEMORY = 790e12, 4.3e12
SHARED_BYTES, PORT_BYTES = 128, 64
ALONE = 2
"""Cycles between two instructions of one warp."""
NODE = {False: 1.3, True: 0.5}
"""Microseconds from the end of a launch to the work of the next, in a graph; with programmatic
dependent launch."""
_PROGRAMS = 4
"""How many programs of a launch are followed."""

_SPECIAL = {"MUFU", "F2F", "F2I", "I2F", "POPC", "FLO"}
_FULL = {"FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2", "MOV", "CS2R", "IMAD", "NOP"}
_SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}
_GLOBAL = {"LDG", "STG", "LDGSTS", "RED", "ATOMG", "ATOM", "UTMALDG", "UTMASTG", "UBLKCP"}
_NO_UNIT = {"BRA", "EXIT", "BAR", "WARPGROUP", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "S2R", "SHFL"}


def _kind(name: str) -> str:
    """Return what an instruction is counted as."""
    base = name.partition(".")[0]
    for kind, bases in (("special", _SPECIAL), ("shared", _SHARED), ("global", _GLOBAL)):
        if base in bases:
            return kind
    if base in ("HGMMA", "HMMA", "IMMA"):
        return "tensor"
    if base in _FULL or base in _NO_UNIT or base[0] == "U":
        return "other"
    return "integer"


def _bytes(name: str) -> int:
    """Return the bytes that a warp moves with a load or a store."""
    if name.startswith(("LDSM", "STSM")):
        return 128 * int(name[-1]) if name[-2] == "." else 128
    size = re.search(r"\.(128|64|U?16|[US]8)\b", name)
    return 32 * (int(size[1].lstrip("US")) // 8 if size else 4)


def _flops(name: str) -> float:
    """Return the operations of a matrix instruction, of one of the warps that issue it."""
    if warpgroup := re.search(r"\.(\d+)x(\d+)x(\d+)", name):
        return 2 * math.prod(map(int, warpgroup.groups())) / 4
    tile = re.search(r"\.16(8)(\d+)", name)
    return 2 * 16 * 8 * int(tile[2]) if tile else 0


def _tensor_rate(name: str) -> float:
    """Return how fast a matrix instruction is against bf16; those of a warp reach some 62 %."""
    return (0.5 if "TF32" in name else 1.0) * (1.0 if name.startswith("HGMMA") else 0.62)


def _waited(code: Code, at: int) -> bool:
    """Return whether all matrix products are waited for after one, before anything else of use."""
    for one in code.instructions[at:]:
        if one.name.startswith("WARPGROUP.DEPBAR"):
            return one.operands[-1] == "0x0"
    return True  # those of a warp deliver as any instruction does


def _counts(code: Code, times: Sequence[float], span: range | None = None) -> Counts:
    """Return what a warp issues, by kind; of a loop, what it issues each time around."""
    found: Counts = defaultdict(float)
    for i in span or range(len(times)):
        one, n = code.instructions[i], times[i]
        if not n:
            continue
        kind, base = _kind(one.name), one.name.partition(".")[0]
        found["instructions"] += n
        found[kind] += n
        if base == "MUFU" or base.startswith("F2F"):
            found[base] += n
        if kind in ("shared", "global"):
            found[f"{kind}_bytes"] += n * _bytes(one.name)
            if base in ("LDG", "LDGSTS"):
                found["loaded_bytes"] += n * _bytes(one.name)
        if kind == "tensor":
            flops = n * _flops(one.name)
            waited = "waited_flops" if _waited(code, i) else "flying_flops"
            found[waited] += flops / _tensor_rate(one.name)
            found["flops"] += flops
            found["bf16_flops"] += flops / _tensor_rate(one.name)
            if base == "HGMMA":  # B, and A unless it is in registers, come from shared memory
                m, k, size = (int(x) for x in re.findall(r"\d+", one.name)[:3])
                width = 4 if "TF32" in one.name else 2
                both = "gdesc" in one.operands[1]
                found["shared_bytes"] += n * width * size * (k + (m if both else 0)) / 4
    return found


def arguments(launch: Launch) -> bytes:
    """Return a launch's arguments as they lie in memory; tensors are at made-up addresses."""
    packed, tensors = b"", 0
    signature = launch.kernel.src.signature
    for kind, value in _leaves(
        list(signature.values()), [launch.arguments.get(n) for n in signature]
    ):
        if kind[0] == "*":
            tensors += 1
            form, number = "Q", tensors << 40
        elif kind.startswith("tensordesc"):
            raise NotImplementedError("A tensor descriptor among the arguments of a kernel")
        elif kind in ("fp32", "f32"):
            form, number = "f", value
        else:
            form = {"8": "b", "1": "b", "16": "h", "32": "i", "64": "q"}[kind.lstrip("iu")]
            form = form.upper() if kind[0] == "u" else form
            number = int(value)
        size = struct.calcsize(form)
        packed += b"\0" * (-len(packed) % size) + struct.pack(f"<{form}", number)
    return packed + b"\0" * (-len(packed) % 8 + 16)  # and two pointers of Triton's own


def _leaves(kinds: Any, values: Any) -> Iterator[tuple[str, Any]]:
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple | list):
            yield from _leaves(kind, value)
        elif kind != "constexpr":
            yield kind, value


def operand_bytes(launch: Launch) -> int:
    """Return the bytes of a launch's tensors, each once."""
    seen: dict[Any, int] = {}
    signature = launch.kernel.src.signature
    for kind, x in _leaves(list(signature.values()), [launch.arguments.get(n) for n in signature]):
        if kind[0] == "*" and isinstance(x, Tensor):
            place = id(x.untyped_storage()), x.storage_offset(), x.shape, x.stride()
            sizes = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
            seen[place] = math.prod(sizes) * x.element_size()
    return sum(seen.values())


@lru_cache(None)
def code_of(cubin: bytes) -> Code:
    """Return a kernel's code, read once."""
    return disassemble(cubin)


@lru_cache(None)
def _times(cubin: bytes, grid: tuple[int, int, int], given: bytes) -> tuple[list[int], ...]:
    programs = math.prod(grid)
    picked = sorted({i * (programs - 1) // max(1, _PROGRAMS - 1) for i in range(_PROGRAMS)})
    found = []
    for p in picked:
        program = p % grid[0], p // grid[0] % grid[1], p // (grid[0] * grid[1])
        found.append(follow(code_of(cubin), program, grid, given))
    return tuple(found)


def cost(launch: Launch) -> Row:
    """Return the figures of a launch on sm_90."""
    return dict(_cost(launch.kernel, launch.grid, arguments(launch), operand_bytes(launch)))


@lru_cache(None)
def _cost(kernel: Any, grid: tuple[int, int, int], given: bytes, moved: int) -> Row:
    chip, used = TARGETS["sm_90"], resources(kernel)
    warps, programs = used["warps"], math.prod(grid)
    code = code_of(kernel.asm["cubin"])
    followed = _times(kernel.asm["cubin"], grid, given)
    mean = [sum(column) / len(followed) for column in zip(*followed, strict=True)]
    longest = max(map(sum, followed))
    total = _counts(code, mean)
    resident = occupancy(used, chip) // warps
    busiest, waves = math.ceil(programs / PROCESSORS), programs / (PROCESSORS * resident)

    def microseconds(cycles: float) -> float:
        return cycles / CLOCK * 1e6

    slots = {
        "issue": total["instructions"] / 4,
        "integer": total["integer"] * 2 / 4,
        "special": total["special"] * 8 / 4,
        "shared": total["shared_bytes"] / SHARED_BYTES,
        "port": total["loaded_bytes"] / PORT_BYTES,
    }
    slots = {unit: microseconds(busiest * warps * n) for unit, n in slots.items()}
    rate = TENSOR / PROCESSORS / CLOCK
    flying, waited = (total[f"{k}_flops"] * warps / rate for k in ("flying", "waited"))
    chain = max(longest * ALONE, flying) + waited
    slots["chain"] = microseconds(math.ceil(busiest / resident) * chain)
    slots["tensor"] = busiest * PROCESSORS * warps * total["bf16_flops"] / TENSOR * 1e6
    slots["memory"] = moved / MEMORY * 1e6
    # A product that nothing holds up is bound by the tensor cores, and its chain as long
    bound = max(slots, key=lambda unit: (float(f"{slots[unit]:.4g}"), unit != "chain"))
    units = max(slots[unit] for unit in ("integer", "special", "shared", "port"))

    def issued(span: range) -> float:
        return sum(mean[i] for i in span)

    spans = [range(loop.first, loop.last + 1) for loop in code.loops]
    span = max(spans, key=issued, default=range(0))
    turns = mean[span[-1]] if span else 0.0
    each = _counts(code, [n / turns for n in mean], span) if turns else defaultdict(float)
    cycles = each["bf16_flops"] * warps / rate
    row = {
        "kernel": used["kernel"],
        "grid": "x".join(map(str, grid)),
        "warps": warps,
        "registers": used["registers"],
        "shared": used["shared"],
        "occupancy": resident * warps,
        "waves": round(waves, 2),
        "turns": round(turns, 1),
        "loop_instructions": each["instructions"],
        "loop_mufu": each["MUFU"],
        "loop_f2f": each["F2F"],
        "loop_f2fp": each["F2FP"],
        "loop_shared": each["shared"],
        "loop_global": each["global"],
        "loop_tensor_cycles": cycles,
        "instructions": total["instructions"],
        "gflop": total["flops"] * warps * programs / 1e9,
        "megabytes": moved / 1e6,
        "issue_us": slots["issue"],
        "chain_us": slots["chain"],
        "units_us": units,
        "tensor_us": slots["tensor"],
        "memory_us": slots["memory"],
        "us": slots[bound],
        "bound": bound,
    }
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
