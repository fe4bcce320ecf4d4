"""PaSST: a patch transformer over spectra, whose embeddings and logits judge sounds at 32 kHz.

Koutini et al., "Efficient training of audio transformers with patchout", 2022, arXiv:2110.05069:
`passt_s_swa_p16_128_ap476`, in its own parameter names.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mfmjt.checkpoints import PublishedFile, load_published, weights_in
from mfmjt.evaluate.networks._frontend import check_waveform, mel_filters, power, resized
from mfmjt.evaluate.networks._layers import MLP, Attention
from mfmjt.evaluate.networks.cnn14 import Tagged

__all__ = ["PASST_FILES", "PaSST"]

PASST_FILES = (
    PublishedFile(
        "passt-s-f128-p16-s10-ap.476-swa.pt",
        "https://github.com/kkoutini/PaSST/releases/tag/v0.0.1-audioset",
        "328.7M",
        sha256="302903fa8c4aee817b11dc982da0b29aaf8d11a3e722420476d0a12c9db70c2c",
        license="Apache-2.0",
    ),
)
"""The published weights."""

_DIM, _DEPTH, _HEADS = 768, 12, 12
_PATCH, _STRIDE = 16, 10
_ROWS, _COLUMNS = 12, 99  # patches along frequency and along time
_SAMPLES = 320_000
_WINDOW, _FFT, _HOP = 800, 1024, 320
_EPS = 1e-6


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(_DIM, _EPS)
        self.attn = Attention(_DIM, _HEADS)
        self.norm2 = nn.LayerNorm(_DIM, _EPS)
        self.mlp = MLP(_DIM, 4 * _DIM)

    def forward(self, x: Tensor, first: int | None = None) -> Tensor:
        x = x[:, :first] + self.attn(self.norm1(x), first=first)
        return x + self.mlp(self.norm2(x))


class _Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, _DIM, _PATCH, stride=_STRIDE)


class PaSST(nn.Module):
    """A transformer that tags 10 s of sound; shorter clips are followed by silence.

    Attributes:
        sample_rate: 32,000 Hz.
        notes: One line each on what was odd about the file that it was read from.
    """

    sample_rate = 32000
    notes: tuple[str, ...] = ()
    window: Tensor
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, _DIM))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, _DIM))
        self.new_pos_embed = nn.Parameter(torch.zeros(1, 2, _DIM))
        self.freq_new_pos_embed = nn.Parameter(torch.zeros(1, _DIM, _ROWS, 1))
        self.time_new_pos_embed = nn.Parameter(torch.zeros(1, _DIM, 1, _COLUMNS))
        self.patch_embed = _Patches()
        self.blocks = nn.ModuleList(_Block() for _ in range(_DEPTH))
        self.norm = nn.LayerNorm(_DIM, _EPS)
        self.head = nn.Sequential(nn.LayerNorm(_DIM), nn.Linear(_DIM, 527))
        with torch.device("cpu"):
            window = torch.hann_window(_WINDOW, periodic=False, dtype=torch.float64)
            filters = mel_filters(self.sample_rate, _FFT, 128, 0.0, 15000.0, "mel")
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> PaSST:
        """Return the network of a published state dict, in float32 and evaluation mode.

        The second head, `head_dist`, which the published network does not use, is left aside.

        Args:
            state_dict: Names and shapes as in `passt-s-f128-p16-s10-ap.476-swa.pt`, or a checkpoint
                with these inside.

        Raises:
            InputError: Entries are missing, unexpected or of another shape; the first are named.
        """
        state, notes = weights_in(state_dict, "time_new_pos_embed", "PaSST")
        with torch.device("meta"):
            network = cls()
        load_published(network, state, "PaSST", lambda name: name.startswith("head_dist."))
        network.notes = notes
        return network.eval().requires_grad_(False)

    def log_mel(self, waveform: Tensor) -> Tensor:
        """Return log-mel power of the first 10 s, centered and scaled as in training.

        Args:
            waveform: `(B, S)` float in [-1, 1], at 32 kHz; zeros follow up to 10 s.

        Returns:
            `(B, 128, 1000)` float32.

        Raises:
            InputError: Another shape or dtype, no samples, or samples that are not finite.
        """
        check_waveform(waveform, 1, "PaSST", self.sample_rate)
        x = resized(waveform, _SAMPLES).double()
        x = x[:, 1:] - 0.97 * x[:, :-1]
        mel = power(x, self.window, _FFT, _HOP, centered=True) @ self.filters
        return ((mel + 1e-5).log().transpose(1, 2) + 4.5).div(5).float()

    def forward(self, waveform: Tensor) -> Tagged:
        """Embed and tag clips.

        Args:
            waveform: As for `log_mel`.

        Returns:
            `embedding` `(B, 768)` and `logits` `(B, 527)`, float32.

        Raises:
            InputError: As for `log_mel`.
        """
        x = self.patch_embed.proj(self.log_mel(waveform)[:, None])  # (B, 768, 12, 99)
        x = x + self.time_new_pos_embed + self.freq_new_pos_embed
        first = torch.cat([self.cls_token, self.dist_token], dim=1) + self.new_pos_embed
        x = torch.cat([first.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        for block in self.blocks[:-1]:
            x = block(x)
        # Both first tokens are all that is used of the last block.
        embedding = self.norm(self.blocks[-1](x, first=2)).mean(dim=1)
        return Tagged(embedding, self.head(embedding))
