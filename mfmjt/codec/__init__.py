"""Audio front and back ends: mel spectrograms and the codec of the shipped model."""

from mfmjt.codec.mel import MelSpectrogram
from mfmjt.codec.nano import NanoCodec, NanoCodecConfig

__all__ = ["MelSpectrogram", "NanoCodec", "NanoCodecConfig"]
