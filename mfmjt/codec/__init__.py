"""Codecs, waveform <-> latents: the shipped model's and MMAudio's; mel spectrograms."""

from mfmjt.codec.base import Codec
from mfmjt.codec.bigvgan import BigVGAN, BigVGANConfig
from mfmjt.codec.mel import MelSpectrogram
from mfmjt.codec.mmaudio import MMAudioCodec
from mfmjt.codec.nano import NanoCodec, NanoCodecConfig
from mfmjt.codec.vae import VAE, VAEConfig

__all__ = [
    "VAE",
    "BigVGAN",
    "BigVGANConfig",
    "Codec",
    "MMAudioCodec",
    "MelSpectrogram",
    "NanoCodec",
    "NanoCodecConfig",
    "VAEConfig",
]
