"""Condition encoders: frames, motion and text."""

from mfmjt.encoders.nano import NanoEncoders, NanoEncodersConfig

__all__ = ["NanoEncoders", "NanoEncodersConfig"]
