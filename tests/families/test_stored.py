"""Networks from files of any dtype to any dtype."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mfmjt.families import bundle as bundles
from mfmjt.families import open_bundle
from mfmjt.memory import release
from mfmjt.model import MFMJT
from tests.support.bundles import write_model
from tests.support.pages import resident

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """The same model with its network stored in each dtype."""
    found = {}
    for dtype in DTYPES:
        folder = write_model(tmp_path_factory.mktemp("stored"))
        MFMJT.load(folder / "network.safetensors").save(folder / "network.safetensors", dtype)
        found[dtype] = folder
    return found


class Made(TorchDispatchMode):
    """Notes the dtypes of tensors of values that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and not found.is_meta:
            self.dtypes.add(found.dtype)
        return found


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("asked", [None, *DTYPES])
@pytest.mark.parametrize("stored", DTYPES)
def test_as_if_read_in_float32_and_converted(
    folders: dict[torch.dtype, Path],
    stored: torch.dtype,
    asked: torch.dtype | None,
    low_memory: bool,
) -> None:
    bundle = open_bundle(folders[stored], low_memory=low_memory).to("cpu", asked)
    bundle.need("network")
    expected = MFMJT.load(folders[stored] / "network.safetensors").to(asked or torch.float32)
    assert bundle.network.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        found = bundle.network.state_dict()[name]
        assert found.dtype == value.dtype, name
        assert torch.equal(found, value), name


@pytest.mark.parametrize("asked", HALF)
@pytest.mark.parametrize("stored", HALF)
def test_from_16_to_16_bits_nothing_is_made_in_float32(
    folders: dict[torch.dtype, Path], stored: torch.dtype, asked: torch.dtype
) -> None:
    bundle = open_bundle(folders[stored], low_memory=True).to("cpu", asked)
    with Made() as made:
        bundle.need("network")
    with Made() as whole:
        MFMJT.load(folders[stored] / "network.safetensors")
    assert torch.float32 in whole.dtypes
    assert asked in made.dtypes or asked == stored
    assert not made.dtypes & {torch.float32, torch.float64}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives memory back")
def test_what_was_read_of_a_file_is_given_back(
    folders: dict[torch.dtype, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(folders[torch.float32])
    largest = max(bundle.network.parameters(), key=Tensor.numel).detach()
    left: list[float] = []

    def watched(value: Tensor) -> None:
        here = value.data_ptr() == largest.data_ptr()
        before = resident(value) if here else 0.0
        release(value)
        if here:
            left.extend((before, resident(value)))

    monkeypatch.setattr(bundles, "release", watched)
    bundle.to("cpu", torch.bfloat16)
    assert left == [1.0, 0.0]
