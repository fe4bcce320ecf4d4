"""The device that a user names, or the best there is."""

from __future__ import annotations

import torch

from mfmjt.errors import InputError, reason

__all__ = ["choose_device"]


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
