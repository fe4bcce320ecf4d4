"""Condition encoders: frames, motion and text; the shipped model's and MMAudio's."""

from mfmjt.encoders.base import Encoders, FrameSpec, Lengths
from mfmjt.encoders.clip import CLIP, CLIPConfig
from mfmjt.encoders.mmaudio import MMAudioEncoders
from mfmjt.encoders.nano import NanoEncoders, NanoEncodersConfig
from mfmjt.encoders.synchformer import Synchformer, SynchformerConfig
from mfmjt.encoders.tokenizer import Tokenizer

__all__ = [
    "CLIP",
    "CLIPConfig",
    "Encoders",
    "FrameSpec",
    "Lengths",
    "MMAudioEncoders",
    "NanoEncoders",
    "NanoEncodersConfig",
    "Synchformer",
    "SynchformerConfig",
    "Tokenizer",
]
