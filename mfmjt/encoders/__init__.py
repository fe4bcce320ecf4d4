"""Condition encoders: frames, motion and text; the shipped model's, MMAudio's and MeanAudio's."""

from mfmjt.encoders.base import Encoders, FrameSpec, Lengths
from mfmjt.encoders.clap import CLAPText
from mfmjt.encoders.clip import CLIP, CLIPConfig
from mfmjt.encoders.meanaudio import MeanAudioEncoders
from mfmjt.encoders.mmaudio import MMAudioEncoders
from mfmjt.encoders.nano import NanoEncoders, NanoEncodersConfig
from mfmjt.encoders.synchformer import Synchformer, SynchformerConfig
from mfmjt.encoders.t5 import T5
from mfmjt.encoders.tokenizer import Tokenizer

__all__ = [
    "CLIP",
    "T5",
    "CLAPText",
    "CLIPConfig",
    "Encoders",
    "FrameSpec",
    "Lengths",
    "MMAudioEncoders",
    "MeanAudioEncoders",
    "NanoEncoders",
    "NanoEncodersConfig",
    "Synchformer",
    "SynchformerConfig",
    "Tokenizer",
]
