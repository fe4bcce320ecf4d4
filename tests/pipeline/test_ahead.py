from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from mfmjt.pipeline.ahead import ahead


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("mfmjt-ahead")]


def test_items_come_in_order_from_another_thread() -> None:
    names = []

    def items() -> Iterator[int]:
        for i in range(20):
            names.append(threading.current_thread().name)
            yield i

    assert list(ahead(items(), 3)) == list(range(20))
    assert set(names) == {"mfmjt-ahead_0"}
    assert threads() == []


def test_no_more_than_so_many_are_made_ahead() -> None:
    made = 0

    def items() -> Iterator[int]:
        nonlocal made
        while True:
            made += 1
            yield made

    taken = ahead(items(), 3)
    for expected in range(1, 6):
        assert next(taken) == expected
        time.sleep(0.05)
        assert made <= expected + 3 + 1  # one more waits for its place
    assert made > 5
    taken.close()
    assert threads() == []


def test_errors_come_where_the_item_would() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError("here")

    taken = ahead(items(), 3)
    assert next(taken) == 1
    with pytest.raises(ZeroDivisionError, match="here"):
        next(taken)
    assert threads() == []


def test_leaving_ends_the_source_too() -> None:
    ended = threading.Event()

    def items() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            ended.set()

    taken = ahead(items(), 2)
    next(taken)
    taken.close()
    assert ended.wait(10)
    assert threads() == []
