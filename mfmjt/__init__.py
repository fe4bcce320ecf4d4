"""MeanFlow training and one-step generation of multimodal audio transformers, made fast.

Attributes load on first use, so that `import mfmjt` imports neither torch nor Triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mfmjt import codec, data, encoders, evaluate, kernels, meanflow, model
    from mfmjt.model import MFMJT
    from mfmjt.pipeline import Pipeline

__version__ = "0.1.0"

__all__ = [
    "MFMJT",
    "Pipeline",
    "__version__",
    "codec",
    "data",
    "encoders",
    "evaluate",
    "kernels",
    "meanflow",
    "model",
]

_ATTRIBUTES = {"MFMJT": "mfmjt.model", "Pipeline": "mfmjt.pipeline"}


def __getattr__(name: str) -> Any:
    if name in _ATTRIBUTES:
        return getattr(importlib.import_module(_ATTRIBUTES[name]), name)
    if name in __all__:
        return importlib.import_module(f"mfmjt.{name}")
    raise AttributeError(f"module 'mfmjt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
