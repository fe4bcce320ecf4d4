"""A small network in every part, and what it reads."""

from __future__ import annotations

import torch

from mfmjt.model import MFMJT

SMALL = {"hidden_dim": 32, "num_heads": 2, "depth": 3, "fused_depth": 1, "latent_dim": 4}
DIMS = {"video_dim": 6, "sync_dim": 5, "text_dim": 7, "text_length": 3}
TERMS = 3 * 3 * 256  # blocks times the widest product
MEANAUDIO = {
    "video": "none", "text_rope": True, "pooled_dim": 9, "second_time": "r", "towards_data": False,
}  # fmt: skip
"""Makes the small network one of MeanAudio's."""


def network(dtype=torch.float64, **overrides) -> MFMJT:
    """A small network with no weight at zero."""
    net = MFMJT.from_config("nano", **{**SMALL, **DIMS, **overrides}).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        net.latent_std.abs_()
    return net


def inputs(batch=2, length=10, video=4, sync=8, text=3, dtype=torch.float64):
    features = {
        "video": torch.randn(batch, video, 6, dtype=dtype),
        "sync": torch.randn(batch, sync, 5, dtype=dtype),
        "text": torch.randn(batch, text, 7, dtype=dtype),
    }
    t = torch.rand(batch, dtype=dtype)
    return torch.randn(batch, length, 4, dtype=dtype), 0.5 * t, t, features


def pooled(batch=2, dtype=torch.float64):
    return torch.randn(batch, MEANAUDIO["pooled_dim"], dtype=dtype)
