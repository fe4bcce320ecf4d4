"""How an op meets the dispatcher and the two differentiation modes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ["reference"]


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """Let every op of this package run its plain PyTorch reference inside the block."""
    yield
