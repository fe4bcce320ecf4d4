"""Launch configurations of the Triton kernels: blocks, warps and pipeline stages.

Functions of sizes and of the GPU's compute capability, checked without a GPU: every configuration
that they can return for the network's shapes compiles for sm_80, sm_90, sm_100 and gfx942 without
spills (`python -m bench aot`). None has been tuned on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from mfmjt.kernels.triton import cdiv, power_of_2, target

__all__ = [
    "REDUCING_PROGRAMS",
    "attention",
    "conv1d_weight",
    "elementwise",
    "heads",
    "norm",
    "norm_chunk",
    "product",
    "product_heads",
    "product_parts",
    "registers",
    "snake",
    "snake_last",
    "sums",
    "vocoder",
]

Options = dict[str, int]  # of a launch: sizes of blocks, warps, stages


def _warps(threads: int) -> int:
    """Return how many warps (wavefronts on AMD) have that many threads."""
    return threads // (64 if target()[0] == "hip" else 32)


def elementwise(rows: int, width: int) -> Options:
    """Return the options of an element-wise kernel on (rows, width).

    A thread has 8 elements of every tensor, 16 bytes of bf16: with 16, five float32 tensors spill
    on sm_80. The block of columns is the one that covers the width with the fewest idle lanes.
    """
    widest = min(1024, power_of_2(width))
    blocks = [b for b in (1024, 512, 256, 128) if b <= widest] or [widest]
    block_cols = min(blocks, key=lambda b: cdiv(width, b) * b)
    block_rows = min(power_of_2(rows), 1024 // block_cols)
    return {"BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols, "num_warps": _warps(128)}


class Tile(NamedTuple):
    """Of a matrix product: blocks of rows, columns and the contraction, warps, stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, "gfx942": 304}
# Tiles that do not spill; by the side, how fast they are assumed to be against the first. None: for
# any other GPU.
_PRODUCTS: dict[Any, dict[Tile, float]] = {
    100: {
        Tile(128, 256, 64, 8, 4): 1.0,
        Tile(128, 128, 64, 8, 3): 0.85,
        Tile(64, 64, 64, 8, 4): 0.5,
        Tile(64, 32, 128, 8, 3): 0.4,
    },
    90: {
        Tile(128, 256, 64, 8, 4): 1.0,
        Tile(128, 128, 64, 8, 3): 0.85,
        Tile(64, 256, 64, 8, 3): 0.8,
        Tile(128, 64, 64, 8, 3): 0.8,
        Tile(64, 64, 64, 4, 4): 0.6,
        Tile(64, 32, 128, 4, 3): 0.4,
    },
    None: {
        Tile(128, 256, 32, 8, 3): 1.0,
        Tile(128, 128, 32, 8, 3): 0.95,
        Tile(64, 64, 64, 4, 3): 0.7,
        Tile(64, 32, 64, 4, 4): 0.5,
    },
    "gfx942": {
        Tile(128, 128, 64, 8, 2): 1.0,
        Tile(64, 64, 64, 4, 2): 0.7,
        Tile(64, 32, 64, 4, 2): 0.5,
    },
}
_PRODUCTS_FLOAT32: dict[Any, dict[Tile, float]] = {
    100: {Tile(128, 128, 32, 8, 3): 1.0, Tile(64, 64, 32, 8, 3): 0.7, Tile(64, 32, 32, 8, 3): 0.6},
    90: {Tile(128, 128, 32, 8, 3): 1.0, Tile(64, 64, 32, 8, 3): 0.7, Tile(64, 32, 32, 4, 3): 0.6},
    None: {Tile(64, 64, 32, 8, 3): 1.0, Tile(64, 32, 32, 4, 3): 0.8},
    "gfx942": {
        Tile(128, 128, 32, 8, 2): 1.0,
        Tile(64, 64, 32, 4, 2): 0.7,
        Tile(64, 32, 32, 4, 2): 0.6,
    },
}
_STEP = 2048  # what a step of the contraction costs besides its area, in elements of a tile
# In multiplications of one processor:
_PART = 12  # what a float32 to write and add up costs
_WRITTEN = 6  # the same at the speed of memory, and without a launch
_LAUNCH = 4e6  # what another launch costs


def _product_tiles(element_size: int, widest: bool = True) -> tuple[dict[Tile, float], int]:
    """Return tiles for this GPU and a dtype of so many bytes, and about how many processors."""
    arch = target()[1]
    table = _PRODUCTS if element_size == 2 else _PRODUCTS_FLOAT32
    tiles = table.get(arch, table[None])
    if not widest:
        tiles = {t: v for t, v in tiles.items() if t.rows * t.columns * element_size <= 2**15}
    return tiles, _MULTIPROCESSORS.get(arch, 108)


def product(
    rows: Sequence[int], outs: Sequence[int], element_size: int, gated: bool = False
) -> Options:
    """Return the options of products of streams.

    The tile with the least time, by the waves of programs and what a step of one takes. The widest
    tiles leave no registers for activations and a choice among more streams than a value and its
    tangent; on sm_80 none for a gated unit.
    """
    widest = target()[1] in (90, 100) if gated else len(rows) <= 2
    tiles, processors = _product_tiles(element_size, widest)

    def time(tile: Tile) -> float:
        pairs = zip(rows, outs, strict=True)
        programs = sum(cdiv(n, tile.rows) * cdiv(o, tile.columns) for n, o in pairs)
        area = tile.rows * tile.columns / tiles[tile]
        return cdiv(programs, processors) * (area + _STEP * 64 / tile.depth)

    return _blocks(min(tiles, key=time))


def product_parts(
    rows: Sequence[int],
    outs: Sequence[int],
    depths: Sequence[int],
    element_size: int,
    finished: bool,
) -> Options:
    """Return the options of products of streams, in PARTS along the depth that are added up later.

    Parts pay where the programs of one are fewer than processors. A part has eight blocks of the
    depth or more.

    Args:
        rows: Of each stream.
        outs: Of each stream.
        depths: Of each stream: a window's numbers.
        element_size: Bytes.
        finished: Whether another launch adds up, and not the next one that is there anyway.
    """
    whole = product(rows, outs, element_size)
    tiles, processors = _product_tiles(element_size, widest=False)
    numbers = sum(n * o for n, o in zip(rows, outs, strict=True))

    def time(tile: Tile, parts: int) -> float:
        pairs = zip(rows, outs, strict=True)
        programs = parts * sum(cdiv(n, tile.rows) * cdiv(o, tile.columns) for n, o in pairs)
        work = tile.rows * tile.columns / tiles[tile] + _STEP * 64 / tile.depth
        steps = cdiv(cdiv(max(depths), tile.depth), parts)
        more = parts * numbers * _WRITTEN + (_LAUNCH if finished else 0) if parts > 1 else 0
        return cdiv(programs, processors) * steps * tile.depth * work + more

    most = max(1, max(depths) // 512)
    choices = ((time(tile, parts), parts, tile) for tile in tiles for parts in range(1, most + 1))
    _, parts, tile = min(choices)
    # One part is as it was; the widest tiles have programs enough
    return {**(_blocks(tile) if parts > 1 else whole), "PARTS": parts}


def _blocks(tile: Tile) -> Options:
    blocks = {"BLOCK_ROWS": tile.rows, "BLOCK_OUTS": tile.columns, "BLOCK_DEPTH": tile.depth}
    return {**blocks, "num_warps": tile.warps, "num_stages": tile.stages}


def product_heads(rows: Sequence[int], parts: int, width: int, element_size: int) -> Options:
    """Return those of a projection to whole heads, `parts` of that width, one to a program."""
    columns = max(16, power_of_2(width))
    tiles, processors = _product_tiles(element_size, widest=False)
    large, *_, least = tiles

    def time(tile: Tile) -> int:
        programs = parts * sum(cdiv(n, tile.rows) for n in rows)
        return cdiv(programs, processors) * (tile.rows + columns)

    tile = large if columns <= 64 and time(large) <= time(least) else least
    blocks = {"BLOCK_ROWS": tile.rows, "BLOCK_WIDTH": columns, "BLOCK_DEPTH": tile.depth}
    warps = 8 if columns > 64 else tile.warps
    return {**blocks, "num_warps": warps, "num_stages": tile.stages}


def conv1d_weight(rows: int, outs: int, depth: int, element_size: int) -> tuple[Options, int]:
    """Return the options of a weight's gradient, and splits of its rows.

    The tile and the splits with the least time, by the waves of programs and the memory of parts,
    of which each adds up eight blocks of rows or more. The widest tiles spill but on sm_90.
    """
    tiles, processors = _product_tiles(element_size)
    widest = 256 if target()[1] == 90 else 128
    choices = []
    for tile, speed in tiles.items():
        if not tile.rows <= tile.columns <= min(widest, 2 * tile.rows):
            continue
        programs, steps = cdiv(outs, tile.rows) * cdiv(depth, tile.columns), cdiv(rows, tile.depth)
        work = tile.rows * tile.columns / speed + _STEP * 64 / tile.depth
        for waves in range(1, 7):
            splits = max(1, min(waves * processors // programs, steps // 8))
            in_turn = cdiv(programs * splits, processors) * cdiv(steps, splits) * tile.depth
            choices.append((in_turn * work + splits * outs * depth * _PART, splits, tile))
    _, splits, best = min(choices)
    blocks = {"BLOCK_OUTS": best.rows, "BLOCK_DEPTH": best.columns, "BLOCK_ROWS": best.depth}
    launch = {"num_warps": best.warps, "num_stages": best.stages, **registers(best.warps)}
    if best.columns == 256:
        launch["maxnreg"] = 255
    return {**blocks, **launch}, splits


def heads(width: int, element_size: int) -> Options:
    """Return the options of a kernel over heads of that width.

    A thread has 16 bytes of every tensor, 32 in heads of 256 in float32: what the gradient's
    registers hold without spills on every GPU with every Triton.
    """
    block_width = max(16, power_of_2(width))
    elements = 1024 if element_size <= 2 or block_width == 256 else 512
    block_rows = max(1, elements // block_width)
    blocks = {"BLOCK_ROWS": block_rows, "BLOCK_WIDTH": block_width}
    return {**blocks, "num_warps": _warps(128), **registers(_warps(128))}


REDUCING_PROGRAMS = 1024
"""Most programs of a kernel that leaves one row of partial sums each: 8 per multiprocessor and
more, and so few rows that adding them up takes no time."""


def registers(warps: int) -> Options:
    """Return the most registers of a thread in kernels that hold rows, as an option of a launch.

    More than they need: NVIDIA's assembler, left alone, takes fewer for the sake of occupancy and
    spills 8 bytes here and there. A program has 65536, which 16 warps would exceed.
    """
    return {"maxnreg": min(208, 65536 // (32 * warps))} if target()[0] == "cuda" else {}


def norm(width: int, tokens: int, element_size: int, teams: int) -> Options:
    """Return the options of a kernel that holds whole rows in registers.

    A block is (K, R, V): R rows of K segments of V columns. V is what a team of warps reads in one
    go, 16 bytes a thread; a team is as many as 16 elements a thread ask for. Rows up to 512 wide
    (1024 on AMD) stay within a warp, whose sums need neither barrier nor shared memory.

    Args:
        width: Columns.
        tokens: Rows that a program may take: of a sample, or of all.
        element_size: Bytes of an element.
        teams: Groups of warps per program, each on its own rows. Use 1 if rows share no data.
    """
    lanes = 64 if target()[0] == "hip" else 32
    cols = power_of_2(width)
    team = max(1, cols // (16 * lanes))
    teams = min(teams, max(1, 4 // team))
    block_cols = min(cols, team * lanes * 16 // element_size)
    rows = min(power_of_2(tokens), max(1, teams * team * 16 * lanes // cols))
    blocks = {"SEGMENTS": cols // block_cols, "BLOCK_ROWS": rows, "BLOCK_COLS": block_cols}
    warps = max(1, rows * cols // (16 * lanes))
    return {**blocks, "num_warps": warps, **registers(warps)}


def norm_chunk(rows: int, block_rows: int, summed: bool) -> int:
    """Return the most rows of one program, of all `rows` there are.

    Where it sums cotangents of modulations there are enough programs to fill a GPU several times
    over, and no more than 128 rows each, which bounds the rounding. Elsewhere a block is enough.
    """
    return max(block_rows, min(128, power_of_2(rows // 1024))) if summed else block_rows


def sums(rows: int, width: int) -> Options:
    """Return the options of a sum over rows of parts."""
    block_rows = min(128, power_of_2(rows))
    block_cols = min(64, 2048 // block_rows, power_of_2(width))
    return {"BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols, "num_warps": 4}


def snake() -> tuple[int, int]:
    """Return lanes, of 8 outputs each, and warps of the anti-aliased activation.

    Few, because a program at an end of a row does more work.
    """
    return 64, _warps(64)


def snake_last(rows: int, elements: int) -> Options:
    """Return the options of the activation channels last: a thread has two channels of a run.

    A run costs about 300 instructions before its first output and 44 for each. The run is the one
    with the least work for the busiest scheduler.

    Args:
        rows: Samples in a row.
        elements: Of all tensors.
    """
    schedulers = 4 * _MULTIPROCESSORS.get(target()[1], 108)

    def work(run: int) -> int:
        warps = cdiv(elements // rows * cdiv(rows, run), 64)
        return cdiv(warps, schedulers) * (300 + 44 * run)

    run = min(range(8, 65, 8), key=work)
    return {"RUN": run, "STEP": 8, "LANES": 256, "num_warps": _warps(128)}


# Convolutions of a vocoder, by the most outputs: blocks of rows, of outputs, of further outputs and
# of the contraction, warps, stages. 3/4 of a power of two are two blocks.
_VOCODER: dict[Any, dict[int, tuple[int, int, int, int, int, int]]] = {
    90: {
        32: (128, 32, 0, 64, 4, 3),
        64: (128, 64, 0, 64, 4, 3),
        96: (128, 64, 32, 64, 8, 3),
        192: (128, 128, 64, 64, 8, 4),
    },
    None: {
        32: (128, 32, 0, 64, 4, 3),
        64: (128, 64, 0, 64, 4, 3),
        96: (128, 64, 32, 32, 8, 3),
        192: (128, 128, 64, 32, 8, 3),
    },
    "gfx942": {
        32: (128, 32, 0, 64, 4, 2),
        64: (128, 64, 0, 64, 4, 2),
        96: (128, 64, 32, 32, 4, 2),
        192: (128, 128, 64, 32, 8, 2),
    },
}
_VOCODER_FLOAT32: dict[Any, dict[int, tuple[int, int, int, int, int, int]]] = {
    None: {32: (64, 32, 0, 32, 4, 3), 64: (64, 64, 0, 32, 8, 3)},
    "gfx942": {32: (64, 32, 0, 32, 4, 2), 64: (64, 64, 0, 32, 4, 2)},
}


def vocoder(outs: int, element_size: int) -> Options:
    """Return the options of a convolution of a vocoder's blocks."""
    arch = 90 if target()[1] == 100 else target()[1]
    tables = _VOCODER if element_size == 2 else _VOCODER_FLOAT32
    table = tables.get(arch, tables[None])
    tile = table[next((most for most in table if outs <= most), max(table))]
    names = ("BLOCK_ROWS", "BLOCK_OUTS", "BLOCK_MORE", "BLOCK_DEPTH", "num_warps", "num_stages")
    # The assembler, left alone, spills 8 bytes of the mean of 96 channels; given 208, of 192
    more = registers(tile[4]) if arch not in tables and tile[1] < 128 else {}
    return {**dict(zip(names, tile, strict=True)), **more}


# Attention: blocks of queries and of keys, warps, stages. By kernel: for heads up to 64 wide, the
# same where many rows of a block would be idle or few blocks would run, and for heads up to 128.
_ATTENTION: dict[Any, dict[str, tuple[tuple[int, int, int, int], ...]]] = {
    100: {
        "value": ((128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3)),
        "tangent": ((64, 32, 8, 2), (64, 32, 8, 2), (64, 64, 8, 2)),
        "bwd_q": ((128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2)),
        "bwd_kv": ((64, 128, 8, 2), (64, 64, 4, 2), (64, 128, 8, 2)),
    },
    90: {
        "value": ((128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3)),
        "tangent": ((128, 64, 8, 3), (64, 64, 4, 3), (128, 32, 8, 3)),
        "bwd_q": ((128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2)),
        "bwd_kv": ((64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
    },
    None: {
        "value": ((128, 64, 8, 3), (64, 32, 4, 3), (64, 64, 4, 2)),
        "tangent": ((128, 64, 8, 3), (64, 32, 4, 2), (64, 32, 8, 2)),
        "bwd_q": ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        "bwd_kv": ((32, 128, 8, 2), (32, 64, 4, 2), (64, 64, 8, 2)),
    },
    "hip": {
        "value": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        "tangent": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
        "bwd_q": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        "bwd_kv": ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2)),
    },
}
# In place of these where keys are hidden, which takes registers, and memory for a tile of the mask
_ATTENTION_HIDING: dict[Any, dict[str, tuple[tuple[int, int, int, int], ...]]] = {
    100: {
        "bwd_kv": ((64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
    },
    90: {
        "tangent": ((128, 64, 8, 3), (64, 64, 4, 2), (128, 16, 8, 3)),
        "bwd_kv": ((64, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    },
    None: {
        "value": ((128, 64, 8, 3), (64, 32, 4, 3), (64, 64, 8, 2)),
        "tangent": ((128, 64, 8, 3), (64, 32, 4, 2), (64, 16, 8, 2)),
        "bwd_q": ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
    },
    "hip": {},
}
# What registers do not hold as a whole goes by some columns at a time, on every GPU: of those that
# go into the scores, and of the result of one program.
_ATTENTION_WIDE = {
    "value": ((64, 64, 64, 128), 4, 2),
    "tangent": ((64, 32, 64, 64), 8, 2),
    "bwd_q": ((64, 32, 64, 128), 4, 2),
    "bwd_kv": ((32, 64, 64, 64), 4, 2),
}
_ATTENTION_FLOAT32 = {
    "value": ((64, 32, 32, 32), 4, 2),
    "tangent": ((64, 16, 32, 32), 4, 2),
    "bwd_q": ((64, 32, 32, 32), 4, 2),
    "bwd_kv": ((16, 64, 32, 32), 4, 2),
}


def attention(
    part: str,
    pairs: int,
    tokens: tuple[int, ...],
    width: int,
    element_size: int,
    hides: bool = False,
) -> Options:
    """Return the options of an attention kernel.

    BLOCK_N and BLOCK_M are blocks of queries and of keys, BLOCK_IN of the columns that go into the
    scores, BLOCK_OUT of those of the result in one program, EVERY the keys with one center.

    Args:
        part: "value", "tangent", "bwd_q" or "bwd_kv".
        pairs: Samples times heads.
        tokens: Of each stream that is cut into blocks: queries, or keys for "bwd_kv".
        width: Of a head.
        element_size: Bytes.
        hides: Whether keys are hidden from some queries.
    """
    columns = max(16, power_of_2(width))
    backend, arch = target()
    kind = "hip" if backend == "hip" else {9: 90, 10: 100}.get(arch // 10)
    # 99 KiB of shared memory, or too few registers
    crowded = (kind is None and arch != 80) or kind == 100
    crowded = crowded and part == "tangent" and columns > 64
    if element_size == 4 or columns > 128 or crowded:
        table = _ATTENTION_FLOAT32 if element_size == 4 else _ATTENTION_WIDE
        (queries, keys, ins, outs), warps, stages = table[part]
        outs = 32 if hides and kind == 100 and part == "tangent" else outs
    else:
        hiding = _ATTENTION_HIDING[kind] if hides else {}
        large, small, wide = hiding.get(part) or _ATTENTION[kind][part]
        block = large[1] if part == "bwd_kv" else large[0]
        large_blocks = sum(cdiv(n, block) for n in tokens)
        small_blocks = sum(cdiv(n, 64) for n in tokens)
        idle = large_blocks * block > 1.125 * small_blocks * 64
        few = large_blocks * pairs < _MULTIPROCESSORS.get(kind, 108)
        queries, keys, warps, stages = wide if columns > 64 else small if idle or few else large
        ins = outs = columns
    blocks = {"BLOCK_N": queries, "BLOCK_M": keys}
    blocks |= {"BLOCK_IN": min(ins, columns), "BLOCK_OUT": min(outs, columns)}
    if part in ("value", "tangent"):  # AMD's compiler fails on that branch
        blocks["EVERY"] = keys if backend == "hip" or hides else 128
    more = registers(warps) if kind == 100 and part == "bwd_kv" and element_size == 4 else {}
    return {**blocks, "num_warps": warps, "num_stages": stages, **more}
