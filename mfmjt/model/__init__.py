"""The multimodal transformer: configurations, network, checkpoints."""

from __future__ import annotations

from mfmjt.model.checkpoint import load, load_mmaudio, save, to_mmaudio_state_dict
from mfmjt.model.conditioning import Conditions
from mfmjt.model.config import CONFIGS, ModelConfig, config_for
from mfmjt.model.transformer import MFMJT

__all__ = [
    "CONFIGS",
    "MFMJT",
    "Conditions",
    "ModelConfig",
    "config_for",
    "load",
    "load_mmaudio",
    "save",
    "to_mmaudio_state_dict",
]
