"""Memory of mapped files that is given back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mfmjt.memory import release
from tests.support.pages import resident

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="as only Linux gives back")

PAGES = 64 * 4096  # numbers


@pytest.fixture
def mapped(tmp_path: Path) -> torch.Tensor:
    torch.save({"x": torch.arange(float(PAGES))}, tmp_path / "x.pth")
    value = torch.load(tmp_path / "x.pth", mmap=True, weights_only=True)["x"]
    assert isinstance(value, torch.Tensor)
    return value


def test_a_mapped_tensor_is_given_back_and_read_again(mapped: torch.Tensor) -> None:
    total = mapped.sum()
    assert resident(mapped) == 1
    release(mapped)
    assert resident(mapped) == 0
    assert torch.equal(mapped.sum(), total)
    assert resident(mapped) == 1


def test_what_was_written_is_kept(mapped: torch.Tensor) -> None:
    mapped[PAGES // 2] = -1
    release(mapped)
    assert mapped[PAGES // 2] == -1


def test_memory_of_no_file_is_kept() -> None:
    for value in (torch.ones(PAGES), torch.ones(3), torch.ones(0), torch.ones(2, device="meta")):
        release(value)
        assert value.is_meta or bool((value == 1).all())
