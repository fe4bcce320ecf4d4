"""What the integer instructions of sm_90 compute: registers, constants and predicates by name."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence

__all__ = ["State", "Value", "names", "predicate", "step", "understood"]

Value = int | None
State = dict[str, Value]
"""What registers, predicates, constants and special registers hold; None or absent: unknown."""
Read = Callable[[State], Value]
Results = tuple[Value, ...]
Step = Callable[[State, bool], None]
"""Runs an instruction; where it is not known whether it runs (False), its results are unknown."""

_MASK, _MASK64 = 2**32 - 1, 2**64 - 1
_FLAG = r"U?P(?:T|\d+)"


def predicate(text: str) -> Read:
    """Return what reads a predicate, 1 or 0."""
    name, flip = text.lstrip("!"), text.startswith("!")
    if name in ("PT", "UPT"):
        return lambda state: int(not flip)
    return lambda state: None if (x := state.get(name)) is None else int(bool(x) != flip)


def step(name: str, operands: Sequence[str]) -> Step:
    """Return what runs an instruction; of one that is not known, the results are unknown."""
    registers, flags, sources = _written(name, operands)
    base, *kinds = name.split(".")
    operation = _OPERATIONS.get(base) or _OPERATIONS.get(base.removeprefix("U"))
    function = operation(frozenset(kinds), sources) if operation else None

    def run(state: State, known: bool) -> None:
        results: Results = function(state) if function and known else ()
        value = results[0] if results else None
        for i, register in enumerate(registers):
            state[register] = None if value is None else value >> 32 * i & _MASK
        for flag, bit in zip(flags, (*results[1:], None, None), strict=False):
            state[flag] = bit

    return run


def understood(name: str) -> bool:
    """Return whether what an instruction computes is known here."""
    base = name.partition(".")[0]
    return base in _OPERATIONS or base.removeprefix("U") in _OPERATIONS


def names(name: str, operands: Sequence[str]) -> tuple[set[str], set[str]]:
    """Return the registers and predicates that an instruction writes, and those that it reads."""
    registers, flags, sources = _written(name, operands)
    if name == "P2R":
        return set(registers), {f"P{i}" for i in range(7)}
    read = {x for text in sources for x in re.findall(r"\bU?[RP]\d+\b", text)}
    return {*registers, *flags}, read | {_next(x) for x in read if "R" in x}


def _written(name: str, operands: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the registers and the predicates that an instruction writes, and what it reads."""
    left = list(operands)
    registers: list[str] = []
    flags: list[str] = []
    if left and (first := re.match(r"U?R(Z|\d+)", left[0])):
        left.pop(0)
        wide = ".WIDE" in name or re.search(r"\.64\b", name) or name == "CS2R" or name[0] == "D"
        width = 4 if re.search(r"\.128|88\.4", name) else 2 if wide or "88.2" in name else 1
        register = first[0]
        for _ in range(width):
            registers.append(register)
            register = _next(register)
    while left[1:] and re.fullmatch(_FLAG, left[0]) and len(flags) < 2:
        flags.append(left.pop(0))
        if registers and name.startswith(("SEL", "USEL", "VIMNMX", "FSEL")):
            left.insert(0, flags.pop())
            break
    if not registers and left and left[0] in ("RZ", "URZ") and "LOP3" in name:
        left.pop(0)
    return registers, flags, left


def _next(name: str) -> str:
    """Return the register, or constant, behind another."""
    parts = re.fullmatch(r"(\D+)(\d+)", name)
    if not parts:
        return name
    return f"{parts[1]}{int(parts[2]) + (4 if parts[1] == 'c' else 1)}"


def _operand(text: str, wide: bool = False) -> Read:
    """Return what reads an integer operand, or the 64 bits of a pair.

    A negative is 2**32 less the number, not reduced: the carry of a sum is right.
    """
    bits = 64 if wide else 32
    invert, negate = text.startswith("~"), text.startswith("-")
    bare = text.lstrip("-~")
    if re.fullmatch(r"0x[0-9a-f]+|\d+", bare):
        number = int(bare, 0) * (-1 if negate else 1) & 2**bits - 1
        return lambda state: number
    place = re.match(r"c\[0x0\]\[(?:(U?R\d+)\+?)?(0x[0-9a-f]+)?\]", bare)
    offset = int(place[2] or "0", 16) if place else 0
    name = re.sub(r"\..*", "", bare)
    if name in ("RZ", "URZ", "SRZ"):
        zero = 2**bits if negate else 2**bits - 1 if invert else 0
        return lambda state: zero

    following = _next(name)
    register = place[1] if place else None
    if place:
        name, following = f"c{offset}", f"c{offset + 4}"

    def read(state: State) -> Value:
        if register:
            at = state.get(register)
            return None if at is None or wide else state.get(f"c{at + offset}")
        x = state.get(name)
        if x is not None and wide:
            high = state.get(following)
            x = None if high is None else x | high << 32
        if x is None:
            return None
        return 2**bits - 1 - x if invert else 2**bits - x if negate else x

    return read


def _signed(x: int, bits: int = 32) -> int:
    x &= 2**bits - 1
    return x - (x >> bits - 1 << bits)


def _all(function: Callable[..., Results], *reads: Read) -> Callable[[State], Results]:
    """Return a function of values that are known; if one is not, neither is the result."""

    def run(state: State) -> Results:
        values = [read(state) for read in reads]
        return () if None in values else function(*values)

    return run


Kinds = frozenset[str]
Compute = Callable[[State], Results]


def _sum(kinds: Kinds, x: list[str]) -> Compute:
    wide = "64" in kinds
    bits, carries = 64 if wide else 32, [predicate(p) for p in x[3:]] if "X" in kinds else []
    terms = [_operand(t, wide) for t in x[:3]]
    return _all(
        lambda *v: ((s := sum(v)) & 2**bits - 1, s >> bits & 1, s >> bits + 1), *terms, *carries
    )


def _product(kinds: Kinds, x: list[str]) -> Compute:
    wide, high, unsigned = "WIDE" in kinds, "HI" in kinds, "U32" in kinds
    sign = (lambda v: v & _MASK) if unsigned else _signed
    carries = [predicate(p) for p in x[3:]] if "X" in kinds else []

    def multiply(a: int, b: int, c: int, *carry: int) -> Results:
        if high:  # the third is a pair here, too
            return (sign(a) * sign(b) + c >> 32 & _MASK,)
        product = sign(a) * sign(b) & (_MASK64 if wide else _MASK)
        total = product + c + sum(carry)
        return total & _MASK64, total >> (64 if wide else 32) & 1

    terms = _operand(x[0]), _operand(x[1]), _operand(x[2], wide or high)
    return _all(multiply, *terms, *carries)


def _scaled_sum(kinds: Kinds, x: list[str]) -> Compute:
    """Compute LEA: a shifted number and another; with HI, the upper half of the 64 bits shifted."""
    carries = [predicate(x.pop())] if "X" in kinds else []
    extend = "SX32" in kinds
    high = "HI" in kinds
    above = [_operand(x[2])] if high and not extend else []
    shift = int(x[-1], 0) if len(x) > (3 if above else 2) else 0

    def add(a: int, b: int, *more: int) -> Results:
        upper = more[0] if above else -1 if extend and a & 2**31 else 0
        a = (a & _MASK | upper << 32) << shift
        total = (a >> 32 if high else a) & _MASK
        total += b + sum(more[len(above) :])
        return total & _MASK, total >> 32 & 1

    return _all(add, _operand(x[0]), _operand(x[1]), *above, *carries)


def _shift(kinds: Kinds, x: list[str]) -> Compute:
    signed = bool(kinds & {"S32", "S64"})
    left, high = "L" in kinds, "HI" in kinds
    double = bool(kinds & {"U64", "S64"})

    def shift(a: int, by: int, c: int) -> Results:
        by &= 63 if double else 31 if "W" in kinds else 255
        by = min(by, 64)
        if left:
            return (((c << 32 | a) << by) >> (32 if high else 0) & _MASK,)
        pair = (_signed(c) if signed else c) << 32 | a
        if high and not double:
            return ((_signed(c) if signed else c) >> min(by, 32) & _MASK,)
        return (pair >> by >> (32 if high else 0) & _MASK,)

    return _all(shift, *map(_operand, x[:3]))


def _logic(kinds: Kinds, x: list[str]) -> Compute:
    table = int(x[3], 16)

    def combine(a: int, b: int, c: int) -> Results:
        out = 0
        for i in range(8):
            if table >> i & 1:
                out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return out & _MASK, int(out & _MASK != 0)

    return _all(combine, *map(_operand, x[:3]))


def _logic_of_flags(kinds: Kinds, x: list[str]) -> Compute:
    tables = [int(t, 16) for t in x[3:5]]
    reads = [predicate(p) for p in x[:3]]

    def combine(state: State) -> Results:
        a, b, c = (read(state) for read in reads)
        found: list[Value] = []
        for table in tables:
            # One that is unknown may not matter
            places = {
                i * 4 + j * 2 + k
                for i in ((0, 1) if a is None else (a,))
                for j in ((0, 1) if b is None else (b,))
                for k in ((0, 1) if c is None else (c,))
            }
            bits = {table >> place & 1 for place in places}
            found.append(bits.pop() if len(bits) == 1 else None)
        return None, *found

    return combine


_COMPARED: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def _compare(kinds: Kinds, x: list[str]) -> Compute:
    holds = next(test for kind, test in _COMPARED.items() if kind in kinds)
    how = next(kind for kind in ("AND", "OR", "XOR") if kind in kinds)
    sign = (lambda v: v & _MASK) if "U32" in kinds else _signed
    a, b, other = _operand(x[0]), _operand(x[1]), predicate(x[2])
    low = predicate(x[3]) if "EX" in kinds else None

    def compare(state: State) -> Results:
        left, right, second = a(state), b(state), other(state)
        first: Value = None
        if left is not None and right is not None:
            left, right = sign(left), sign(right)
            equal = low is not None and left == right
            first = low(state) if low and equal else int(holds(left, right))
        return None, _joined(how, first, second), _joined(how, first and 1 - first, second)

    def negated(state: State) -> Results:
        _, both, _ = compare(state)
        return None, both, None

    return negated


def _joined(how: str, a: Value, b: Value) -> Value:
    """Return two predicates combined; one that is unknown may not matter."""
    if how == "AND" and 0 in (a, b):
        return 0
    if how == "OR" and 1 in (a, b):
        return 1
    if a is None or b is None:
        return None
    return {"AND": a & b, "OR": a | b, "XOR": a ^ b}[how]


def _choose(kinds: Kinds, x: list[str]) -> Compute:
    a, b, flag = _operand(x[0]), _operand(x[1]), predicate(x[2])

    def choose(state: State) -> Results:
        first = flag(state)
        return () if first is None else ((a if first else b)(state),)

    return choose


def _extreme(kinds: Kinds, x: list[str]) -> Compute:
    sign = (lambda v: v & _MASK) if "U32" in kinds else _signed
    reads = [_operand(t) for t in x[:-1]]
    least = predicate(x[-1])

    def pick(least: int, *values: int) -> Results:
        if values[2:]:  # VIADDMNMX: the first two are added before
            values = (values[0] + values[1], values[2])
        return ((min if least else max)(map(sign, values)) & _MASK,)

    return _all(pick, least, *reads)


def _move(kinds: Kinds, x: list[str]) -> Compute:
    return _all(lambda a: (a,), _operand(x[0], "64" in kinds))


def _special(kinds: Kinds, x: list[str]) -> Compute:
    return _all(
        lambda a: (a,), (lambda state: 0) if x[0] == "SRZ" else (lambda state: state.get(x[0]))
    )


def _extend(kinds: Kinds, x: list[str]) -> Compute:
    def extend(a: int, bits: int) -> Results:
        a &= 2**bits - 1
        return ((a if "U32" in kinds else _signed(a, bits)) & _MASK,)

    return _all(extend, _operand(x[0]), _operand(x[1]))


def _permute(kinds: Kinds, x: list[str]) -> Compute:
    def permute(a: int, order: int, b: int) -> Results:
        pair = a & _MASK | (b & _MASK) << 32
        out = 0
        for i in range(4):
            way = order >> 4 * i & 15
            byte = pair >> 8 * (way & 7) & 255
            out |= ((255 if byte & 128 else 0) if way & 8 else byte) << 8 * i
        return (out,)

    return _all(permute, *map(_operand, x[:3])) if not kinds else _unknown


def _pack(kinds: Kinds, x: list[str]) -> Compute:
    mask = int(x[-1], 16)
    places = [i for i in range(7) if mask >> i & 1]

    def pack(*bits: int) -> Results:
        return (sum(bit << i for bit, i in zip(bits, places, strict=True)),)

    return _all(pack, *(predicate(f"P{i}") for i in places))


def _halves(kinds: Kinds, x: list[str]) -> Compute:
    """Compute HFMA2 of zeros and a pair of halves: how the assembler makes constants."""
    if x[0].lstrip("-") != "RZ" or x[1] != "RZ" or len(x) < 4:
        return _unknown
    try:
        high, low = (int.from_bytes(struct.pack("<e", float(t)), "little") for t in x[2:4])
    except ValueError:
        return _unknown
    return lambda state: (high << 16 | low,)


def _float(bits: int) -> float:
    value: float = struct.unpack("<f", (bits & _MASK).to_bytes(4, "little"))[0]
    return value


def _bits(x: float) -> int:
    return int.from_bytes(struct.pack("<f", x), "little")


def _to_float(kinds: Kinds, x: list[str]) -> Compute:
    sign = (lambda v: v) if "U32" in kinds else _signed
    if kinds & {"F64", "F16", "S64", "U64"}:
        return _unknown
    return _all(lambda a: (_bits(float(sign(a))),), _operand(x[0]))


def _to_integer(kinds: Kinds, x: list[str]) -> Compute:
    known = kinds == {"FTZ", "U32", "TRUNC", "NTZ"}
    return _all(lambda a: (int(_float(a)),), _operand(x[0])) if known else _unknown


def _reciprocal(kinds: Kinds, x: list[str]) -> Compute:
    def reciprocal(a: int) -> Results:
        value = _float(a)
        return (_bits(1 / value),) if 1e-30 < abs(value) < 1e30 else ()

    return _all(reciprocal, _operand(x[0])) if kinds == {"RCP"} else _unknown


def _unknown(state: State) -> Results:
    return ()


def _absolute(kinds: Kinds, x: list[str]) -> Compute:
    return _all(lambda a: (abs(_signed(a)),), _operand(x[0]))


def _vote(kinds: Kinds, x: list[str]) -> Compute:
    return _all(lambda a: (None, a), predicate(x[-1]))


_OPERATIONS: dict[str, Callable[[Kinds, list[str]], Compute]] = {
    "IADD3": _sum,
    "VIADD": lambda kinds, x: _sum(kinds, [*x, "RZ"]),
    "IMAD": _product,
    "LEA": _scaled_sum,
    "SHF": _shift,
    "LOP3": _logic,
    "PLOP3": _logic_of_flags,
    "ISETP": _compare,
    "SEL": _choose,
    "VIMNMX": _extreme,
    "VIADDMNMX": _extreme,
    "IMNMX": _extreme,
    "MOV": _move,
    "LDC": _move,
    "R2UR": _move,
    "S2R": _special,
    "S2UR": _special,
    "CS2R": _special,
    "SGXT": _extend,
    "PRMT": _permute,
    "P2R": _pack,
    "HFMA2": _halves,
    "I2F": _to_float,
    "F2I": _to_integer,
    "MUFU": _reciprocal,
    "IABS": _absolute,
    "VOTE": _vote,
    "VOTEU": _vote,
}
