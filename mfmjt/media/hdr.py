"""Pictures of high dynamic range (HDR) as a screen of the ordinary one (SDR) shows them.

BT.2100's transfer functions give the light of each color, in units of SDR's white; BT.2020's
primaries become BT.709's; what is brighter than white is rolled off; BT.1886's gamma ends it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

__all__ = ["Hdr", "find_hdr", "to_sdr"]

WHITE = 203.0
"""Light of SDR's white in HDR, in cd/m² (BT.2408)."""
PEAK = 1000.0 / WHITE
"""Brightest light that is told from brighter ones, and the peak of HLG's screen."""
KNEE = 0.8
"""Light up to which nothing is changed."""
_TRANSFERS: dict[int, Literal["PQ", "HLG"]] = {16: "PQ", 18: "HLG"}  # numbers of H.273
_BT709 = 1
_TO_709 = np.array(
    [
        [1.660491, -0.587641, -0.072850],
        [-0.124550, 1.132900, -0.008349],
        [-0.018151, -0.100579, 1.118730],
    ],
    np.float32,
)
_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)  # of BT.2020's primaries
_STEPS = 4096  # of the tables: twelve bits, which HDR is made for


@dataclass(frozen=True)
class Hdr:
    """How a stream's HDR is coded.

    Attributes:
        transfer: Of BT.2100.
        wide: Whether the primaries are BT.2020's.
    """

    transfer: Literal["PQ", "HLG"]
    wide: bool

    @property
    def note(self) -> str:
        """Return what to tell who made sound for it."""
        return f"HDR ({self.transfer}) is mapped to SDR for the network; the copy keeps it."


def find_hdr(codec_context: Any) -> Hdr | None:
    """Return how an open stream's HDR is coded, None for SDR."""
    transfer = _TRANSFERS.get(int(codec_context.color_trc))
    wide = int(codec_context.color_primaries) != _BT709
    return None if transfer is None else Hdr(transfer, wide)


def to_sdr(pixels: np.ndarray, hdr: Hdr) -> np.ndarray:
    """Map uint16 pictures `(..., 3)` of R'G'B' over the full range to uint8 of the same shape."""
    light = _light(hdr.transfer)[pixels >> 4]
    if hdr.transfer == "HLG":  # from the scene's light to that of the screen
        luminance = light @ _LUMINANCE
        light *= PEAK * np.maximum(luminance, 1e-6)[..., None] ** np.float32(0.2)
    if hdr.wide:
        light = light @ _TO_709.T
    place = np.sqrt(light.clip(0, PEAK) / np.float32(PEAK)) * (_STEPS - 1) + np.float32(0.5)
    return _codes()[place.astype(np.uint16)]


@functools.cache
def _light(transfer: str) -> np.ndarray:
    """Light of each R'G'B' value: in units of white for PQ, of the brightest scene for HLG."""
    value = np.linspace(0, 1, _STEPS)
    if transfer == "PQ":
        root = value ** (32 / 2523)
        light = np.maximum(root - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * root)
        return (10_000 / WHITE * light ** (8192 / 1305)).astype(np.float32)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    light = np.where(value <= 0.5, value**2 / 3, (np.exp((value - c) / a) + b) / 12)
    return light.astype(np.float32)


@functools.cache
def _codes() -> np.ndarray:
    """Values of SDR for light from 0 to PEAK, by its square root: even steps to the eye."""
    light = PEAK * np.linspace(0, 1, _STEPS) ** 2
    over, most = ((x - KNEE) / (1 - KNEE) for x in (light, PEAK))
    rolled = KNEE + (1 - KNEE) * over * (1 + over / most**2) / (1 + np.abs(over))
    shown = np.where(light <= KNEE, light, rolled).clip(0, 1)
    return (255 * shown ** (1 / 2.4)).round().astype(np.uint8)
