"""Damaged files."""

from __future__ import annotations

import numpy as np


def mutate(content: bytes, seed: int) -> bytes:
    """Flip, overwrite, cut or repeat parts, in the header as often as anywhere."""
    rng = np.random.default_rng(seed)
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 12))):
        reach = min(len(data), 1500) if rng.random() < 0.5 else len(data)
        at = int(rng.integers(0, reach))
        length = int(rng.integers(1, 64))
        kind = rng.integers(0, 5)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            data[at : at + length] = rng.bytes(length)
        elif kind == 2:
            data[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"])
        elif kind == 3:
            del data[at : at + length]
        else:
            data[at:at] = data[at : at + length]
    if rng.random() < 0.2:
        del data[int(rng.integers(len(data) // 4, len(data))) :]
    if rng.random() < 0.1:
        data += content[int(rng.integers(0, len(content))) :]  # a second file, or its end
    return bytes(data)
