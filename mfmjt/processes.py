"""Which of the processes that torchrun started this is, and its share of independent work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

from mfmjt.devices import choose_device
from mfmjt.errors import InputError

__all__ = ["own_device", "rank_and_world", "share"]

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) without torchrun.

    Raises:
        InputError: The environment variables RANK and WORLD_SIZE contradict each other.
    """
    try:
        rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    except ValueError:
        rank, world = -1, 0
    if not 0 <= rank < world:
        raise InputError(
            f"RANK={os.environ.get('RANK')} and WORLD_SIZE={os.environ.get('WORLD_SIZE')} are no "
            "process of a group. Start with torchrun, or unset both."
        )
    return rank, world


def share(items: Sequence[T]) -> Sequence[T]:
    """Return this process's part of a list of independent jobs: every `world`-th from its rank."""
    rank, world = rank_and_world()
    return items[rank::world]


def own_device(asked: str | None) -> str:
    """Return the device of this process: of several on one machine, each has a GPU of its own.

    Args:
        asked: `cpu`, `cuda` or `cuda:N`; None takes CUDA where there is one.

    Raises:
        InputError: The device cannot be used.
    """
    device = choose_device(asked)
    if device.type == "cuda" and device.index is None:
        device = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    return str(device)
