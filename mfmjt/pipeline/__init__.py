"""Video, text or both in, sound out."""

from mfmjt.pipeline.audio import STAGES, Audio
from mfmjt.pipeline.pipeline import Pipeline, generate_together
from mfmjt.pipeline.request import MAX_DURATION, Request

__all__ = ["MAX_DURATION", "STAGES", "Audio", "Pipeline", "Request", "generate_together"]
