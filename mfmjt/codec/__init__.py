"""Audio front and back ends: mel spectrograms, the shipped model's codec and MMAudio's."""

from mfmjt.codec.bigvgan import BigVGAN, BigVGANConfig
from mfmjt.codec.mel import MelSpectrogram
from mfmjt.codec.mmaudio import MMAudioCodec
from mfmjt.codec.nano import NanoCodec, NanoCodecConfig
from mfmjt.codec.vae import VAE, VAEConfig

__all__ = [
    "VAE",
    "BigVGAN",
    "BigVGANConfig",
    "MMAudioCodec",
    "MelSpectrogram",
    "NanoCodec",
    "NanoCodecConfig",
    "VAEConfig",
]
