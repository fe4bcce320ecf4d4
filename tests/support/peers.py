"""Other people's packages, where they are installed."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import pytest
import torch

__all__ = ["load_peft", "load_torchvision"]


@functools.cache
def load_torchvision() -> Any:
    """Let others import torchvision beside a CPU build of PyTorch.

    PyPI's torchvision is built for CUDA and fails there for want of two operators that nobody calls
    here: it gets their names.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return None
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
        return library  # its names last as long as it does
    return None


def load_peft() -> Any:
    """The package peft; the test is skipped without it."""
    load_torchvision()  # which it imports by way of transformers
    return pytest.importorskip("peft")
