"""The device that a user names, or the best there is; and the CPU's name."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from mfmjt.errors import InputError, reason

__all__ = ["choose_device", "cpu_name"]


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """Return the device, after a try that it works.

    Args:
        name: Such as "cpu" or "cuda:1"; None takes CUDA where there is one, else the CPU.

    Raises:
        InputError: There is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"The device {name} cannot be used: {reason(error)}. Leave it out, or give cpu."
        ) from error
    return device


def cpu_name() -> str:
    """Return the CPU's model as the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
