"""MMAudio's codec from end to end: mel spectrogram, autoencoder, vocoder."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.checkpoints import Check, PublishedFile, about, find_all, fingerprint, read_content
from mfmjt.codec.base import Codec
from mfmjt.codec.bigvgan import BigVGAN, BigVGANConfig
from mfmjt.codec.mel import MEL_CONFIGS, MelSpectrogram
from mfmjt.codec.vae import VAE, VAEConfig
from mfmjt.errors import InputError

__all__ = ["MMAudioCodec", "codec_files"]

_RELEASE = "https://github.com/hkchengrex/MMAudio/releases/tag/v0.1"
_VAE_FILES = {
    "16k": PublishedFile(
        "v1-16.pth",
        _RELEASE,
        "655M",
        "69f56803f59a549a1a507c93859fd4d7",
        ("mmaudio_vae_16k",),
    ),
    "44k": PublishedFile(
        "v1-44.pth",
        _RELEASE,
        "1.2G",
        "fab020275fa44c6589820ce025191600",
        ("mmaudio_vae_44k",),
    ),
}
_VOCODER_FILES = {
    "16k": PublishedFile(
        "best_netG.pt",
        _RELEASE,
        "429M",
        "eeaf372a38a9c31c362120aba2dde292",
        ("mmaudio_vocoder_bigvgan_best_netG",),
    ),
    "44k": PublishedFile(
        "bigvgan_generator.pt", "https://huggingface.co/nvidia/bigvgan_v2_44khz_128band_512x"
    ),
}


def codec_files(mode: str) -> list[PublishedFile]:
    """Return the published autoencoder and vocoder of `"16k"` or `"44k"`.

    Raises:
        InputError: No such mode.
    """
    if mode not in MEL_CONFIGS:
        raise InputError(f"No codec {mode!r}: known are {', '.join(MEL_CONFIGS)}. Give one.")
    return [_VAE_FILES[mode], _VOCODER_FILES[mode]]


class MMAudioCodec(Codec):
    """Waveform <-> MMAudio's latents, with the interface of `NanoCodec`.

    Args:
        mode: `"16k"` or `"44k"`.
        vae: Mel autoencoder; None makes an untrained one of the published size.
        vocoder: Mel to waveform; None makes an untrained one of the published size.

    Attributes:
        sample_rate: 16000 or 44100 Hz.
        hop: Samples per latent frame, 512 or 1024.
        latent_dim: Latent channels.

    Raises:
        InputError: No such mode, or parts that do not fit it or each other.
    """

    def __init__(self, mode: str, vae: VAE | None = None, vocoder: BigVGAN | None = None) -> None:
        super().__init__()
        self.mel = MelSpectrogram(mode)
        self.vae = VAE(mode) if vae is None else vae
        self.vocoder = BigVGAN(mode) if vocoder is None else vocoder
        config = MEL_CONFIGS[mode]
        has = {
            "the autoencoder's bands": (self.vae.config.bands, config.bands),
            "the vocoder's bands": (self.vocoder.config.bands, config.bands),
            "the vocoder's samples per frame": (self.vocoder.hop, config.hop),
        }
        for what, (found, needed) in has.items():
            if found != needed:
                raise InputError(
                    f"These parts make no {mode} codec: {what} are {found}, not {needed}. "
                    "Give parts of one mode."
                )
        self.sample_rate = config.sample_rate
        self.hop = 2 * config.hop
        self.latent_dim = self.vae.config.latent_dim

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        mode: str,
        check: Check = "size",
        vae: VAEConfig | None = None,
        vocoder: BigVGANConfig | None = None,
    ) -> MMAudioCodec:
        """Load the published files from where the user keeps them.

        Args:
            folder: Holds `v1-16.pth` and `best_netG.pt`, or `v1-44.pth` and
                `bigvgan_generator.pt`, or these as ComfyUI names them, itself or in folders inside
                it.
            mode: `"16k"` or `"44k"`.
            check: What is compared with the published files: "name", "size" or "md5".
            vae: Sizes of an autoencoder of your own under the published name.
            vocoder: The same of a vocoder.

        Raises:
            InputError: A file is missing, damaged or another one; the message says where its
                publisher keeps it.
        """
        files = codec_files(mode)
        vae_path, vocoder_path = find_all(folder, files, check)
        with about(vae_path, files[0]):
            autoencoder = VAE.from_mmaudio(read_content(vae_path), vae or mode)
        with about(vocoder_path, files[1]):
            generator = BigVGAN.from_state_dict(read_content(vocoder_path), vocoder or mode)
        return cls(mode, autoencoder, generator).eval()

    def cast(self, dtype: torch.dtype) -> MMAudioCodec:
        """Make autoencoder and vocoder calculate in `dtype`; the mels' statistics stay float32."""
        for part in (self.vae.encoder, self.vae.decoder, self.vocoder):
            part.to(dtype)
        return self

    def identity(self) -> str:
        """Return a digest of the autoencoder, which alone decides on latents."""
        return fingerprint(self.vae)

    def encode(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of the latents.

        Args:
            waveform: `(B, S)` float in [-1, 1] at `sample_rate`, S >= 1; padded with zeros to
                whole latent frames.

        Returns:
            Mean and log-variance, each `(B, ceil(S / hop), latent_dim)` float32.

        Raises:
            InputError: Wrong shape or dtype, no samples, or samples that are not finite.
        """
        if waveform.ndim != 2 or not waveform.is_floating_point() or waveform.numel() == 0:
            raise InputError(
                f"Waveform of shape {tuple(waveform.shape)}, {waveform.dtype} cannot be encoded: "
                "float samples (batch, samples >= 1) are needed. Reshape or convert it."
            )
        if not bool(torch.isfinite(waveform).all()):
            raise InputError(
                "Waveform holds NaN or infinity and cannot be encoded. Check its source."
            )
        padded = F.pad(waveform.float(), (0, -waveform.shape[-1] % self.hop))
        posterior = self.vae.encode(self.mel(padded))
        return posterior.mean.transpose(1, 2), posterior.logvar.transpose(1, 2)

    def decode(self, latent: Tensor) -> Tensor:
        """Waveform of latents.

        Args:
            latent: `(B, N, latent_dim)`, N >= 1.

        Returns:
            `(B, N * hop)` float32 in [-1, 1].

        Raises:
            InputError: Wrong shape or no frames.
        """
        if latent.ndim != 3 or latent.shape[-1] != self.latent_dim or latent.shape[1] == 0:
            raise InputError(
                f"Latents of shape {tuple(latent.shape)} cannot be decoded: "
                f"(batch, frames >= 1, {self.latent_dim}) is needed."
            )
        return self.vocoder(self.vae.decode(latent.transpose(1, 2)))[:, 0].float()
