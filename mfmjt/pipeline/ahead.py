"""An iterator that works while its consumer does."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

__all__ = ["ahead"]

T = TypeVar("T")
_POLL = 0.1  # seconds after which a thread looks whether it is still wanted


def ahead(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Iterate in a thread of its own, at most `depth` items ahead of who takes them.

    Errors come out where the item would have. The thread ends with the iterator, whether it is
    exhausted or left.
    """
    line: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
    left = threading.Event()

    def put(found: bool, item: T | BaseException | None) -> bool:
        while not left.is_set():
            try:
                line.put((found, item), timeout=_POLL)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(True, item):
                    return
        except BaseException as error:  # raised again in the thread that waits
            put(False, error)
        else:
            put(False, None)

    thread = threading.Thread(target=work, name="mfmjt-ahead", daemon=True)
    thread.start()
    try:
        while True:
            found, item = line.get()
            if not found:
                if item is not None:
                    raise item  # type: ignore[misc]
                return
            yield item  # type: ignore[misc]
    finally:
        left.set()
        thread.join()
