"""Video, text or both in, sound out."""

from mfmjt.pipeline.audio import STAGES, Audio
from mfmjt.pipeline.pipeline import MAX_DURATION, Pipeline
from mfmjt.pipeline.together import Request, generate_together

__all__ = ["MAX_DURATION", "STAGES", "Audio", "Pipeline", "Request", "generate_together"]
