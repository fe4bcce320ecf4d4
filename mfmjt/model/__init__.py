"""The multimodal transformer: configurations, network, checkpoints."""

from __future__ import annotations

from mfmjt.model.checkpoint import load, save
from mfmjt.model.conditioning import Conditions
from mfmjt.model.config import CONFIGS, ModelConfig, config_for
from mfmjt.model.published import (
    load_foleydash,
    load_meanaudio,
    load_mmaudio,
    load_network,
    to_meanaudio_state_dict,
    to_mmaudio_state_dict,
)
from mfmjt.model.transformer import MFMJT

__all__ = [
    "CONFIGS",
    "MFMJT",
    "Conditions",
    "ModelConfig",
    "config_for",
    "load",
    "load_foleydash",
    "load_meanaudio",
    "load_mmaudio",
    "load_network",
    "save",
    "to_meanaudio_state_dict",
    "to_mmaudio_state_dict",
]
