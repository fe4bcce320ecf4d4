"""Video, text or both in, sound out."""

from mfmjt.pipeline.audio import STAGES, Audio
from mfmjt.pipeline.pipeline import MAX_DURATION, Pipeline

__all__ = ["MAX_DURATION", "STAGES", "Audio", "Pipeline"]
