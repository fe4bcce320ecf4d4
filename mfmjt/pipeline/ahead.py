"""An iterator that works while its consumer does."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["ahead"]

T = TypeVar("T")
_END: Any = object()


def ahead(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Iterate in a thread of its own, at most `depth` items ahead of who takes them, and one more.

    Errors come out where the item would have. The thread ends with the iterator, whether it is
    exhausted or left.
    """
    source = iter(items)
    thread = ThreadPoolExecutor(1, "mfmjt-ahead")
    line = deque(thread.submit(next, source, _END) for _ in range(depth + 1))
    try:
        while (item := line.popleft().result()) is not _END:
            line.append(thread.submit(next, source, _END))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
