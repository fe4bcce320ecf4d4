"""Where the Triton kernels run.

Triton comes with a GPU build of PyTorch and serves its GPU. If TRITON_INTERPRET is set, the kernels
also run on the CPU and take precedence over the C++ kernels: with 1 Triton interprets them one
operation at a time, and the tests of the ops judge the Triton kernels; with 0 they are compiled for
GPUs that are not there and do not run (`python -m bench aot`).
"""

from __future__ import annotations

import importlib.util
import os

import torch

__all__ = ["AVAILABLE", "INTERPRETED", "ON_CPU"]

_installed = importlib.util.find_spec("triton") is not None
_gpu_build = bool(torch.version.cuda or torch.version.hip)
_interpret = os.environ.get("TRITON_INTERPRET")
INTERPRETED = _installed and _interpret == "1"
ON_CPU = INTERPRETED or (_installed and _interpret == "0")
AVAILABLE = ON_CPU or (_installed and _gpu_build)
