"""ImageBind's towers for vision and for sound, whose cosine is the IB-score.

Girdhar et al., 2023, arXiv:2305.05665: vision transformers (Dosovitskiy et al., 2021) over pairs of
frames and over spectra, in the published parameter names. Written from the paper; the published
weights are for noncommercial use only.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.checkpoints import PublishedFile, load_published, weights_in
from mfmjt.errors import InputError
from mfmjt.evaluate.networks._frontend import check_waveform, mel_filters
from mfmjt.evaluate.networks._layers import MLP, attend

__all__ = ["IMAGEBIND_FILES", "ImageBind"]

IMAGEBIND_FILES = (
    PublishedFile(
        "imagebind_huge.pth",
        "https://dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth",
        "4581.1M",
        sha256="d6f6c22bedcc90708448d5d2fbb7b2db9c73f505dc89bd0b2e09b23af1b62157",
        license="CC-BY-NC-SA 4.0",
    ),
)
"""The published weights."""

_SIDE, _PATCH, _FRAMES = 224, 14, 2
_SECONDS, _CLIPS = 2, 3  # of sound
_WINDOW, _FFT, _HOP = 400, 512, 160
_BANDS, _COLUMNS = 128, 204
_ROWS, _STEPS = 12, 19  # patches of a spectrum along frequency and time
_MEAN, _SCALE = -4.268, 9.138
_FLOOR = torch.finfo(torch.float32).eps
_EPS = 1e-6
_MARKS = {
    "vision": "modality_preprocessors.vision.cls_token",
    "audio": "modality_preprocessors.audio.cls_token",
}
_OTHERS = ("text", "depth", "thermal", "imu")


class _Attention(nn.Module):
    """Self-attention in the names of `nn.MultiheadAttention`, perhaps with one key of its own."""

    def __init__(self, dim: int, heads: int, extra: bool) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        self.bias_k = nn.Parameter(torch.zeros(1, 1, dim)) if extra else None
        self.bias_v = nn.Parameter(torch.zeros(1, 1, dim)) if extra else None

    def forward(self, x: Tensor, first: int | None = None) -> Tensor:
        """`(B, N, D)` -> `(B, first or N, D)`."""
        dim = x.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        q = F.linear(x[:, :first], weight[:dim], bias[:dim])
        k, v = F.linear(x, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(x), -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(len(x), -1, -1)], dim=1)
        return self.out_proj(attend(q, k, v, self.heads))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, extra: bool) -> None:
        super().__init__()
        self.attn = _Attention(dim, heads, extra)
        self.norm_1 = nn.LayerNorm(dim, _EPS)
        self.mlp = MLP(dim, 4 * dim)
        self.norm_2 = nn.LayerNorm(dim, _EPS)

    def forward(self, x: Tensor, first: int | None = None) -> Tensor:
        x = x[:, :first] + self.attn(self.norm_1(x), first)
        return x + self.mlp(self.norm_2(x))


class _Stem(nn.Module):
    """Patches of frames or of spectra, after a class token, with their positions."""

    def __init__(self, dim: int, positions: int, stem: nn.Module) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.rgbt_stem = stem
        positions_of = nn.ParameterDict({"pos_embed": torch.zeros(1, 1 + positions, dim)})
        self.pos_embedding_helper = positions_of

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.rgbt_stem(x)], dim=1)
        return x + self.pos_embedding_helper["pos_embed"]


class _Pairs(nn.Module):
    """Patches of pairs of frames."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        tube = (_FRAMES, _PATCH, _PATCH)
        self.proj = nn.Sequential(nn.Identity(), nn.Conv3d(3, dim, tube, stride=tube, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 3, 2, H, W)` -> `(B, positions, D)`."""
        # Both frames at once: a convolution of images, for which devices are faster.
        weight = self.get_parameter("proj.1.weight").flatten(1, 2)
        return F.conv2d(x.flatten(1, 2), weight, stride=_PATCH).flatten(2).transpose(1, 2)


class _Spectrum(nn.Module):
    """Patches of spectra."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, dim, 16, stride=10, bias=False)
        self.norm_layer = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 128, 204)` -> `(B, positions, D)`."""
        return self.norm_layer(self.proj(x[:, None]).flatten(2).transpose(1, 2))


class _Trunk(nn.Module):
    def __init__(self, dim: int, depth: int, vision: bool) -> None:
        super().__init__()
        heads = max(1, dim // (80 if vision else 64))
        self.pre_transformer_layer = nn.Sequential(*([nn.LayerNorm(dim, _EPS)] if vision else []))
        self.blocks = nn.ModuleList(_Block(dim, heads, not vision) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `(B, N, D)` -> state of the first one `(B, D)`."""
        x = self.pre_transformer_layer(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1](x, first=1)[:, 0]


class ImageBind(nn.Module):
    """Frames and sounds as vectors in one space.

    Args:
        width: Of the space.
        dims: Width of the tower of each modality, `vision` and `audio`.
        depths: Blocks of each.

    Attributes:
        sample_rate: 16,000 Hz.
        notes: One line each on what was odd about the file that it was read from.
    """

    sample_rate = 16000
    notes: tuple[str, ...] = ()
    window: Tensor
    filters: Tensor

    def __init__(self, width: int, dims: Mapping[str, int], depths: Mapping[str, int]) -> None:
        super().__init__()
        stems = {
            "vision": _Stem(dims["vision"], (_SIDE // _PATCH) ** 2, _Pairs(dims["vision"])),
            "audio": _Stem(dims["audio"], _ROWS * _STEPS, _Spectrum(dims["audio"])),
        }
        self.modality_preprocessors = nn.ModuleDict(stems)
        self.modality_trunks = nn.ModuleDict(
            {name: _Trunk(dim, depths[name], name == "vision") for name, dim in dims.items()}
        )
        self.modality_heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.LayerNorm(dim, _EPS), nn.Identity(), nn.Linear(dim, width, bias=False)
                )
                for name, dim in dims.items()
            }
        )
        scale = nn.ParameterDict({"log_logit_scale": torch.zeros(())})
        self.modality_postprocessors = nn.ModuleDict({"audio": nn.ModuleDict({"1": scale})})
        with torch.device("cpu"):
            window = torch.hann_window(_WINDOW, periodic=False, dtype=torch.float64)
            filters = mel_filters(self.sample_rate, _FFT, _BANDS, 20.0, 8000.0, "mel")
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> ImageBind:
        """Return both towers of a published state dict, in float32 and evaluation mode.

        Sizes are those of the tensors, with heads of 80 and 64 channels as published. The towers of
        other modalities are left aside.

        Args:
            state_dict: Names and shapes as in `imagebind_huge.pth`, or a checkpoint with these
                inside.

        Raises:
            InputError: Entries of both towers are missing, unexpected or of another shape; the
                first are named.
        """
        state, notes = weights_in(state_dict, _MARKS["audio"], "ImageBind")
        dims = {name: state[m].shape[-1] if m in state else 1 for name, m in _MARKS.items()}
        depths = {name: _depth(state, name) for name in dims}
        head = state.get("modality_heads.audio.2.weight")
        with torch.device("meta"):
            network = cls(1 if head is None else head.shape[0], dims, depths)
        load_published(
            network, state, "ImageBind", lambda name: name.partition(".")[2].startswith(_OTHERS)
        )
        network.notes = notes
        return network.eval().requires_grad_(False)

    def log_mel(self, waveform: Tensor) -> Tensor:
        """Return log-mel power of three clips of 2 s: the first, the middle and the last ones.

        The mean of a clip over all channels is subtracted, and the first channel is taken. Clips of
        a shorter sound are all of it, and end in zeros of the logarithm.

        Args:
            waveform: `(B, S)`, or `(B, channels, S)`, float in [-1, 1], at 16 kHz, S >= 400.

        Returns:
            `(B, 3, 128, 204)` float32.

        Raises:
            InputError: Another shape or dtype, a shorter sound, or samples that are not finite.
        """
        if waveform.ndim == 2:
            waveform = waveform[:, None]
        if waveform.ndim != 3 or 0 in waveform.shape[:2]:
            raise InputError(
                f"A waveform of shape {tuple(waveform.shape)} is nothing for ImageBind: "
                "(batch, samples) or (batch, channels, samples) is needed."
            )
        check_waveform(waveform.flatten(0, 1), _WINDOW, "ImageBind", self.sample_rate)
        # In seconds and as fractions, as the public loader does: where clips begin depends on it.
        rest = Fraction(max(waveform.shape[2] / self.sample_rate - _SECONDS, 0.0))
        starts = [rest * i / (_CLIPS - 1) for i in range(_CLIPS)]
        bounds = [
            [int(time * self.sample_rate) for time in (start, start + _SECONDS)] for start in starts
        ]
        clips = [self._log_mel(waveform[:, :, begin:end]) for begin, end in bounds]
        return torch.stack(clips, dim=1)

    def _log_mel(self, clip: Tensor) -> Tensor:
        """Kaldi's filter bank of `(B, channels, S)`, `(B, 128, 204)`."""
        x = clip.double()
        x = (x[:, 0] - x.mean(dim=(1, 2))[:, None]).unfold(1, _WINDOW, _HOP)
        x = x - x.mean(dim=2, keepdim=True)
        x = x - 0.97 * torch.cat([x[:, :, :1], x[:, :, :-1]], dim=2)
        spectrum = torch.view_as_real(torch.fft.rfft(x * self.window, _FFT))
        mel = (spectrum.square().sum(dim=-1) @ self.filters).clamp(min=_FLOOR).log()
        mel = F.pad(mel.transpose(1, 2), (0, _COLUMNS - mel.shape[1]))
        return ((mel - _MEAN) / _SCALE).float()

    def _embed(self, x: Tensor, name: str) -> Tensor:
        state = self.modality_trunks[name](self.modality_preprocessors[name](x))
        return F.normalize(self.modality_heads[name](state), dim=-1)

    def audio_clips(self, waveform: Tensor) -> Tensor:
        """Embed three clips of each sound.

        Args:
            waveform: As for `log_mel`.

        Returns:
            `(B, 3, width)` float32, each as long as the scale that the network learned for sounds.

        Raises:
            InputError: As for `log_mel`.
        """
        scale = self.get_parameter("modality_postprocessors.audio.1.log_logit_scale")
        found = self._embed(self.log_mel(waveform).flatten(0, 1), "audio")
        return found.unflatten(0, (-1, _CLIPS)) * scale.exp().clamp(max=100)

    def encode_audio(self, waveform: Tensor) -> Tensor:
        """Embed sounds, `(B, S)` -> `(B, width)`: the mean of `audio_clips`."""
        return self.audio_clips(waveform).mean(dim=1)

    def video_clips(self, frames: Tensor) -> Tensor:
        """Embed pairs of frames.

        Args:
            frames: `(B, clips, 3, 2, 224, 224)`, with the mean and deviation that CLIP uses.

        Returns:
            `(B, clips, width)` float32 of unit length.

        Raises:
            InputError: Another shape.
        """
        wanted = (3, _FRAMES, _SIDE, _SIDE)
        if frames.ndim != 6 or tuple(frames.shape[2:]) != wanted or frames.numel() == 0:
            raise InputError(
                f"Frames of shape {tuple(frames.shape)} cannot be used: (batch, clips, "
                f"{', '.join(map(str, wanted))}) is needed."
            )
        return self._embed(frames.flatten(0, 1), "vision").unflatten(0, frames.shape[:2])

    def encode_video(self, frames: Tensor) -> Tensor:
        """Embed videos, `(B, clips, 3, 2, 224, 224)` -> `(B, width)`: the mean of `video_clips`."""
        return self.video_clips(frames).mean(dim=1)


def _depth(state: Mapping[str, Tensor], name: str) -> int:
    """Blocks of a tower, one at least."""
    depth = 0
    while f"modality_trunks.{name}.blocks.{depth}.norm_1.weight" in state:
        depth += 1
    return max(1, depth)
