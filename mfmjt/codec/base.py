"""What every codec does, whoever made it."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from mfmjt.checkpoints import fingerprint

__all__ = ["Codec"]


class Codec(nn.Module):
    """Waveform <-> latents.

    Attributes:
        sample_rate: Hz.
        hop: Samples per latent.
        latent_dim: Latent channels.
    """

    sample_rate: int
    hop: int
    latent_dim: int

    @abstractmethod
    def encode(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """Give mean and log-variance, each `(B, ceil(S / hop), latent_dim)`, of samples `(B, S)`.

        Raises:
            InputError: Wrong shape or dtype, no samples, or samples that are not finite.
        """

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """Give samples `(B, N · hop)`, float32 and nominally in [-1, 1], of `(B, N, latent_dim)`.

        Raises:
            InputError: Wrong shape, or no latents.
        """

    def identity(self) -> str:
        """Return a digest of what decides on latents."""
        return fingerprint(self)
