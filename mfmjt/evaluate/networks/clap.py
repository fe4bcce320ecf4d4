"""LAION's CLAP: sounds and captions in one space, for the CLAP score.

Wu et al., "Large-scale contrastive language-audio pretraining", 2023, arXiv:2211.06687, without
fusion, in its parameter names. Sounds go through HTSAT (Chen et al., 2022, arXiv:2202.00874): a
spectrum, folded into a square, is read by a transformer over windows of 8 x 8 patches.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.checkpoints import load_published, weights_in
from mfmjt.encoders.clap import CLAP_FILE, CLAPText
from mfmjt.encoders.text_model import import_transformers
from mfmjt.errors import InputError
from mfmjt.evaluate.networks._frontend import StoredLogMel, check_waveform, resized
from mfmjt.evaluate.networks._layers import MLP, Attention, BatchNorm

__all__ = ["CLAP", "CLAP_FILES"]

CLAP_FILES = (CLAP_FILE,)
"""The published weights."""

_SAMPLES = 480_000
_BANDS = 64
_SIDE = 256  # of the square that a spectrum is folded into
_PATCH = 4
_WINDOW = 8  # patches along a side
_SHARED = 512  # width of the space of sounds and captions
_AUDIO = "audio_branch."
_TEXT = ("text_branch.", "text_projection.")
_UNUSED = ("audio_branch.tscam_conv.", "audio_branch.head.", "audio_transform.", "text_transform.")


class _WindowAttention(Attention):
    """Attention within a window, with a bias for each way from one patch to another."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * _WINDOW - 1) ** 2, heads))

    def bias(self) -> Tensor:
        """Bias of the scores, `(heads, 64, 64)`."""
        table = self.relative_position_bias_table
        place = torch.arange(_WINDOW**2, device=table.device)
        row, column = (x[:, None] - x + _WINDOW - 1 for x in (place // _WINDOW, place % _WINDOW))
        return table[row * (2 * _WINDOW - 1) + column].permute(2, 0, 1)


class _Block(nn.Module):
    """A pre-norm transformer layer over windows; where shifted, over those half a window on."""

    def __init__(self, dim: int, heads: int, shifted: bool) -> None:
        super().__init__()
        self.shift = _WINDOW // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _WindowAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, side, side, D)` -> the same."""
        y, shift = self.norm1(x), self.shift
        bias = self.attn.bias()[None]
        if shift:
            y = y.roll((-shift, -shift), (1, 2))
            bias = bias + self._apart(x.shape[1], x.device)[:, None]  # (windows, heads, 64, 64)
            bias = bias.repeat(len(x), 1, 1, 1)
        y = _joined(self.attn(_windows(y), bias), x.shape[1])
        if shift:
            y = y.roll((shift, shift), (1, 2))
        x = x + y
        return x + self.mlp(self.norm2(x))

    def _apart(self, side: int, device: torch.device) -> Tensor:
        """-100 between patches that shifting brought into one window from opposite edges."""
        place = torch.arange(side, device=device)
        part = (place >= side - _WINDOW).int() + (place >= side - self.shift).int()
        part = _windows((3 * part[:, None] + part)[None, :, :, None])[..., 0]  # (windows, 64)
        return torch.where(part[:, :, None] == part[:, None], 0.0, -100.0)


def _windows(x: Tensor) -> Tensor:
    """`(B, side, side, D)` -> `(B * windows, 64, D)`."""
    x = x.unflatten(2, (-1, _WINDOW)).unflatten(1, (-1, _WINDOW)).transpose(2, 3)
    return x.flatten(3, 4).flatten(0, 2)


def _joined(x: Tensor, side: int) -> Tensor:
    """`(B * windows, 64, D)` -> `(B, side, side, D)`."""
    x = x.unflatten(1, (_WINDOW, _WINDOW)).unflatten(0, (-1, side // _WINDOW, side // _WINDOW))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class _Downsample(nn.Module):
    """Four neighbors become one patch of twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = ((0, 0), (1, 0), (0, 1), (1, 1))
        x = torch.cat([x[:, row::2, column::2] for row, column in corners], dim=-1)
        return self.reduction(self.norm(x))


class _Stage(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, last: bool) -> None:
        super().__init__()
        # The last stage is one window.
        self.blocks = nn.Sequential(
            *(_Block(dim, heads, shifted=i % 2 == 1 and not last) for i in range(depth))
        )
        self.downsample = None if last else _Downsample(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x if self.downsample is None else self.downsample(x)


class _PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, dim, _PATCH, stride=_PATCH)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 256, 256)` -> `(B, 64, 64, D)`."""
        return self.norm(self.proj(x[:, None]).permute(0, 2, 3, 1))


class _HTSAT(nn.Module):
    """Log-mel spectra in dB -> one state a sound."""

    def __init__(self, dim: int, depths: Sequence[int], heads: Sequence[int]) -> None:
        super().__init__()
        self.bn0 = BatchNorm(_BANDS)
        self.patch_embed = _PatchEmbed(dim)
        sizes = list(zip(depths, heads, strict=True))
        self.layers = nn.Sequential(
            *(
                _Stage(dim * 2**i, depth, head, last=i == len(sizes) - 1)
                for i, (depth, head) in enumerate(sizes)
            )
        )
        self.norm = nn.LayerNorm(dim * 2 ** (len(sizes) - 1))

    def forward(self, log_mel: Tensor) -> Tensor:
        """`(B, frames, 64)` -> `(B, D)`."""
        scale, shift = self.bn0.affine
        x, columns = (log_mel * scale + shift)[:, None], _SIDE // _BANDS
        size = (columns * _SIDE, _BANDS)
        x = F.interpolate(x, size, mode="bicubic", align_corners=True)[:, 0]
        # Four stretches of time lie above one another, each with its frequencies along the rows.
        x = x.unflatten(1, (columns, _SIDE)).transpose(2, 3).flatten(1, 2)
        return self.norm(self.layers(self.patch_embed(x))).mean(dim=(1, 2))


class CLAP(nn.Module):
    """Sounds, and captions, as unit vectors whose cosine says how well they fit.

    Args:
        dim: Width of the first stage of HTSAT.
        depths: Blocks of each stage.
        heads: Attention heads of each stage.

    Attributes:
        sample_rate: 48,000 Hz.
        text: The half for captions, `mfmjt.encoders.CLAPText`; None until the first caption.
        notes: One line each on what was odd about the file that it was read from.
    """

    sample_rate = 48000
    text: CLAPText | None
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        dim: int = 128,
        depths: Sequence[int] = (2, 2, 12, 2),
        heads: Sequence[int] = (4, 8, 16, 32),
    ) -> None:
        super().__init__()
        self.text = None
        self._text_state: dict[str, Tensor] = {}
        self.spectrum = StoredLogMel(self.sample_rate, 1024, 480, _BANDS, 50.0, 14000.0)
        self.audio_branch = _HTSAT(dim, depths, heads)
        self.audio_projection = nn.Sequential(
            nn.Linear(dim * 2 ** (len(depths) - 1), _SHARED), nn.ReLU(), nn.Linear(_SHARED, _SHARED)
        )

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> CLAP:
        """Return the network of a published state dict, in float32 and evaluation mode.

        The sizes of HTSAT are those of the tensors. What the score does not need (`tscam_conv`,
        `head`, `*_transform`, `logit_scale_*` and tables that are computed) is left aside.

        Args:
            state_dict: Names and shapes as in `music_speech_audioset_epoch_15_esc_89.98.pt`, or a
                checkpoint with these inside.

        Raises:
            InputError: Entries are missing, unexpected or of another shape, and the first are
                named; or the Fourier matrices are another transform's.
        """
        mark = f"{_AUDIO}patch_embed.proj.weight"
        state, notes = weights_in(state_dict, mark, "CLAP")
        dim = state[mark].shape[0]
        depths, heads = zip(*(_stage_sizes(state, i, dim * 2**i) for i in range(4)), strict=True)
        with torch.device("meta"):
            network = cls(dim, depths, heads)
        state = network.spectrum.take(state, _AUDIO, "CLAP")
        load_published(network, state, "CLAP", _unused)
        network._text_state = {k: v for k, v in state.items() if k.startswith(_TEXT)}
        network.notes = notes
        return network.eval().requires_grad_(False)

    def log_mel(self, waveform: Tensor) -> Tensor:
        """Return log-mel power in dB of 10 s.

        Shorter sounds are repeated as often as they fit in whole, and zeros follow; of longer ones
        the first 10 s are taken, where the public code takes 10 s at random.

        Args:
            waveform: `(B, S)` float in [-1, 1], at 48 kHz.

        Returns:
            `(B, 1001, 64)` float32.

        Raises:
            InputError: Another shape or dtype, no samples, or samples that are not finite.
        """
        check_waveform(waveform, 1, "CLAP", self.sample_rate)
        times = max(1, _SAMPLES // waveform.shape[1])
        return self.spectrum(resized(waveform.repeat(1, times), _SAMPLES))

    def hidden(self, waveform: Tensor) -> Tensor:
        """Return states `(B, 1024)`, before the projection, of `(B, S)` as for `log_mel`."""
        return self.audio_branch(self.log_mel(waveform))

    def encode_audio(self, waveform: Tensor) -> Tensor:
        """Embed sounds.

        Args:
            waveform: As for `log_mel`.

        Returns:
            `(B, 512)` float32 of unit length.

        Raises:
            InputError: As for `log_mel`.
        """
        return F.normalize(self.audio_projection(self.hidden(waveform)), dim=-1)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embed captions, with RoBERTa as it is in transformers, which the extra `text` brings.

        Args:
            ids: Token ids `(B, N)`: `<s>`, the caption's, `</s>`, and 1 as padding, up to 77.
            mask: `(B, N)`, 1 for tokens and 0 for padding.

        Returns:
            `(B, 512)` float32 of unit length.

        Raises:
            InputError: The state dict has no half for captions or a wrong one, or transformers is
                not installed.
        """
        if self.text is None:
            text = _captions(self._text_state).requires_grad_(False)
            self.text = text.to(self.spectrum.window.device)
        return self.text.encode(ids.long(), mask.long())


def _captions(state: Mapping[str, Tensor]) -> CLAPText:
    """Return the half for captions, of the sizes of its tensors."""
    words, places = (
        state.get(f"text_branch.embeddings.{name}_embeddings.weight")
        for name in ("word", "position")
    )
    if words is None or places is None:
        raise InputError("This CLAP has no half for captions: there were no text_branch.*.")
    depth = next(
        i
        for i in itertools.count()
        if f"text_branch.encoder.layer.{i}.attention.self.query.weight" not in state
    )
    config = import_transformers().RobertaConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        num_hidden_layers=max(1, depth),
        num_attention_heads=max(1, words.shape[1] // 64),
        intermediate_size=4 * words.shape[1],
        max_position_embeddings=places.shape[0],
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
    )
    tokenizer: Any = None  # captions come as ids
    return CLAPText.from_state_dict(state, config, tokenizer)


def _stage_sizes(state: Mapping[str, Tensor], stage: int, dim: int) -> tuple[int, int]:
    """Blocks and heads of a stage of width `dim`, one at least."""
    name = f"{_AUDIO}layers.{stage}.blocks.{{}}.attn.relative_position_bias_table"
    depth = next(i for i in itertools.count() if name.format(i) not in state)
    heads = state[name.format(0)].shape[-1] if depth else 1
    return max(depth, 1), heads if heads and dim % heads == 0 else 1


def _unused(name: str) -> bool:
    return name.startswith((*_UNUSED, *_TEXT, "logit_scale_")) or name.endswith(
        ("num_batches_tracked", "relative_position_index", "attn_mask")
    )
