"""Complete models of random weights, small enough to be run in every test."""

from __future__ import annotations

from pathlib import Path

import torch

from mfmjt.codec import NanoCodec, NanoCodecConfig
from mfmjt.encoders import NanoEncoders, NanoEncodersConfig
from mfmjt.model import MFMJT

CODEC = NanoCodecConfig(
    encoder_dim=16, encoder_depth=2, decoder_dims=(32, 24, 16), decoder_depths=(1, 1, 1)
)
TINY_CODEC = NanoCodecConfig(
    latent_dim=4, encoder_dim=16, encoder_depth=2, decoder_dims=(16, 16, 16),
    decoder_depths=(1, 1, 1),
)  # fmt: skip
TINY_ENCODERS = NanoEncodersConfig(
    dim=16, frame_channels=(4, 4, 8, 8), sync_channels=(4, 4, 8, 8), buckets=64, bucket_dim=8,
    text_heads=2,
)  # fmt: skip


def write_model(folder: Path, **overrides: object) -> Path:
    """Save network, codec and encoders that belong together; `overrides` are the network's."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MFMJT.from_config("nano", **{"depth": 3, "fused_depth": 2, **overrides})
        # Fresh networks give zero: what is zero at the start is what training would have moved.
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad and not bool(parameter.any()):
                    parameter.normal_(std=0.1)
        network.save(folder / "network.safetensors")
        write_ends(folder)
    return folder


def write_ends(folder: Path) -> None:
    """Save small codec and encoders, drawn from the global seed."""
    NanoCodec(CODEC).save(folder / "codec.safetensors")
    NanoEncoders().save(folder / "encoders.safetensors")
