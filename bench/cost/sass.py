"""Follow one warp through a kernel's machine code for sm_90, with the arguments of a launch.

A kernel's control flow hangs on integers: sizes among its arguments, and the program's number.
These are computed, instruction by instruction, as the GPU would; everything else (what memory has,
floating point, other warps) is unknown, and what is computed of it too. So every loop runs as often
as on a GPU, unrolled and peeled as the assembler left it, and each instruction is counted.

Where data decide, a forward branch is taken, which skips what it guards: rare cases such as a
rescaled sum or a sine's far range. A loop that ends where data say is followed twice.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import triton

from bench.cost.integers import State, Step, Value, names, predicate, step, understood
from mfmjt.errors import RunError

__all__ = ["Code", "Instruction", "Loop", "disassemble", "follow"]

_LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?)(U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*(.*?)\s*;")
_LABEL = re.compile(r"(\.L_\w+):")
_PARAMETERS = 0x210
"""Where a kernel's arguments begin in its bank of constants, on sm_90."""
_MOST_STEPS = 2_000_000


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        guard: The predicate that it depends on, or "".
        negated: It runs where the predicate does not hold.
        name: Its name with all suffixes.
        operands: As text; destinations first.
        target: Index of the instruction that a branch goes to, or -1.
    """

    guard: str
    negated: bool
    name: str
    operands: tuple[str, ...]
    target: int = -1


class Loop(NamedTuple):
    """A loop: its instructions by index, the first and the last, which branches back."""

    first: int
    last: int


class Code(NamedTuple):
    """A kernel's instructions, its innermost loops, and what its branches hang on.

    Attributes:
        instructions: In the order of their addresses.
        loops: Those that have no loop inside.
        steps: For each instruction what computes it, or None where no branch needs it.
    """

    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]
    steps: tuple[Step | None, ...]


def disassemble(cubin: bytes) -> Code:
    """Return the instructions of a kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in done.stdout.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif parts := _LINE.match(line):
            operands = tuple(x.strip() for x in parts[4].split(",")) if parts[4] else ()
            found.append(Instruction(parts[2] or "", parts[1] == "!", parts[3], operands))
    for i, one in enumerate(found):
        if one.name.startswith("BRA") and (to := re.search(r"\.L_\w+", one.operands[-1])):
            found[i] = one._replace(target=labels[to[0]])
    # A branch to itself ends every kernel's code and never runs
    back = [Loop(x.target, i) for i, x in enumerate(found) if 0 <= x.target < i]
    inner = [
        a for a in back if not any(a != b and a.first <= b.first < b.last <= a.last for b in back)
    ]
    return Code(tuple(found), tuple(inner), _steps(found))


def _steps(instructions: Sequence[Instruction]) -> tuple[Step | None, ...]:
    needed = {x.guard for x in instructions if x.target >= 0 or x.name == "EXIT"}
    needed |= {text.lstrip("!") for x in instructions if x.target >= 0 for text in x.operands}
    about = [(x, *names(x.name, x.operands)) for x in instructions]
    before = -1
    while before != len(needed):
        before = len(needed)
        for one, written, read in about:
            if written & needed and understood(one.name):
                needed |= read | {one.guard}
    return tuple(step(x.name, x.operands) if to & needed else None for x, to, _ in about)


def follow(code: Code, program: Sequence[int], grid: Sequence[int], arguments: bytes) -> list[int]:
    """Return how often the first warp of a program issues each instruction.

    A loop that ends where data say is followed twice: such is the one over the tokens of a row of
    modulations, of which the networks' lengths have one or two.

    Args:
        code: The kernel.
        program: Its number along each axis of the grid.
        grid: Programs along each axis.
        arguments: As they lie in memory.

    Raises:
        RunError: A loop does not end.
    """
    state: State = {}
    for axis, number, programs in zip("XYZ", program, grid, strict=True):
        state |= {f"SR_CTAID.{axis}": number, f"SR_NCTAID.{axis}": programs, f"SR_TID.{axis}": 0}
    state |= {"SR_CgaCtaId": 0, "SR_LANEID": 0, "SR_VIRTID": None}
    for offset in range(0, len(arguments) - 3, 4):
        state[f"c{_PARAMETERS + offset}"] = int.from_bytes(arguments[offset : offset + 4], "little")
    for i, programs in enumerate(grid):
        state[f"c{12 + 4 * i}"] = programs
    times, at, left = [0] * len(code.steps), 0, _MOST_STEPS
    while at < len(times):
        times[at] += 1
        left -= 1
        one, run = code.instructions[at], code.steps[at]
        jump = one.target
        if run is None and jump < 0 and one.name != "EXIT":
            at += 1
            continue
        holds = _guard(one, state)
        if one.name == "EXIT" and holds:
            return times
        if jump >= 0:
            if one.name.startswith("BRA.U") and len(one.operands) == 2:
                holds = predicate(one.operands[0])(state) if holds else holds
            skipped = any(at < loop.first and loop.last < jump for loop in code.loops)
            if left <= 0:
                raise RunError(f"A loop at instruction {at} does not end.")
            if holds is None and (jump <= at or skipped):
                holds = int(jump <= at and times[at] % 2)
            at = jump if holds or holds is None else at + 1
            continue
        if run and holds != 0:
            run(state, holds is not None)
        at += 1
    return times


def _guard(one: Instruction, state: State) -> Value:
    if not one.guard or one.guard in ("PT", "UPT"):
        return int(not one.negated)
    value = state.get(one.guard)
    return None if value is None else int(bool(value) != one.negated)
