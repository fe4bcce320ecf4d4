from __future__ import annotations

import pytest

from mfmjt.errors import InputError
from mfmjt.processes import own_device, rank_and_world, share


def test_which_process_this_is(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert rank_and_world() == (0, 1)
    assert share([1, 2, 3]) == [1, 2, 3]
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(InputError, match="torchrun"):
        rank_and_world()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rank_and_world() == (1, 2)
    assert share([1, 2, 3]) == [2]


def test_the_device_of_a_process():
    assert own_device("cpu") == "cpu"
    with pytest.raises(InputError, match="cannot be used"):
        own_device("cuda:77")
