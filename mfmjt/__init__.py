"""MeanFlow training and one-step generation of multimodal audio transformers, made fast.

Attributes load on first use, so that `import mfmjt` imports neither torch nor Triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mfmjt import codec, data, encoders, evaluate, kernels, meanflow, model, testing
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
    "testing",
]

_ATTRIBUTES = {"MFMJT": "mfmjt.model", "Pipeline": "mfmjt.pipeline"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mfmjt' has no attribute {name!r}")
    try:
        module = importlib.import_module(_ATTRIBUTES.get(name, f"mfmjt.{name}"))
    except AttributeError as error:
        # As an AttributeError it would make Python import the module again and hide the cause.
        raise ImportError(f"mfmjt.{name} cannot be imported: {error}") from error
    return getattr(module, name) if name in _ATTRIBUTES else module


def __dir__() -> list[str]:
    return sorted(__all__)
