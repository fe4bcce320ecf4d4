"""Clips: the procedural Foley set."""

from __future__ import annotations

from mfmjt.data.foley import CLASSES, FPS, IMPACT_CLASSES, SAMPLE_RATE, Clip, clip

__all__ = ["CLASSES", "FPS", "IMPACT_CLASSES", "SAMPLE_RATE", "Clip", "clip"]
