"""Devices and precisions that users name, and the CPU's own name."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from mfmjt.errors import InputError, reason

__all__ = ["choose_device", "cpu_info", "cpu_name", "parse_dtype", "parse_dtype_or_auto"]


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


def parse_dtype(
    name: str, choices: Sequence[str] = ("float32", "bfloat16", "float16")
) -> torch.dtype:
    """Return the dtype of a name.

    Args:
        name: One of `choices`.
        choices: The dtypes that can be had, by their names in PyTorch.

    Raises:
        InputError: The name is none of them.
    """
    if name not in choices:
        raise InputError(f"There is no dtype {name!r}. Choose one of {', '.join(choices)}.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def parse_dtype_or_auto(name: str) -> torch.dtype | None:
    """Return the dtype of a name, None for "auto", which leaves the choice to `Pipeline`.

    Raises:
        InputError: The name is neither "auto" nor a dtype.
    """
    choices = ("auto", "float32", "bfloat16", "float16")
    return None if name == "auto" else parse_dtype(name, choices)


def cpu_info() -> dict[str, str]:
    """Return the fields of a processor in Linux' /proc/cpuinfo; elsewhere nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    parts = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in parts}


def cpu_name() -> str:
    """Return the CPU's model, or its architecture where the system does not tell the model."""
    return cpu_info().get("model name") or platform.machine()
