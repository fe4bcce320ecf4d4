"""The whole Synchformer: how far sound is from the frames in time, in 21 classes from -2 s to 2 s.

Iashin et al., "Synchformer", 2024, arXiv:2401.16423, in its parameter names. The visual half is
`mfmjt.encoders.Synchformer`. The audio half is an audio spectrogram transformer (Gong et al., 2021,
arXiv:2104.01778) over segments of 0.64 s, with one more layer that sums up each time step. The
bridge reads 14 segments of both, 4.8 s.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.checkpoints import PublishedFile, load_published, weights_in
from mfmjt.encoders import Synchformer as Visual
from mfmjt.encoders.synchformer import Summary
from mfmjt.errors import InputError
from mfmjt.evaluate.networks._frontend import check_waveform, mel_filters, power
from mfmjt.evaluate.networks._layers import attend

__all__ = ["SYNCHFORMER_FILES", "Synchformer"]

SYNCHFORMER_FILES = (
    PublishedFile(
        "synchformer_state_dict.pth",
        "https://github.com/hkchengrex/MMAudio/releases/tag/v0.1",
        "907M",
        "5b2f5594b0730f70e41e549b7c94390c",
        license="MIT",
    ),
)
"""The published weights."""

_DIM = 768
_SEGMENT, _STRIDE = 10_240, 5_120  # samples
_FRAMES, _FRAME_STRIDE = 16, 8  # of a segment, at 25 per second
_WINDOW, _FFT, _HOP = 400, 1024, 160
_BANDS, _COLUMNS = 128, 66
_MEAN, _SCALE = -4.2677393, 9.1379948
_ROWS, _STEPS = 12, 6  # patches of a segment along frequency and time
_WHOLE = 14  # segments that are compared at once
_AT_ONCE = 24  # segments that are encoded at once
_VISUAL = "vfeat_extractor."


def _dense(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(dense=nn.Linear(before, after)))


class _Attention(nn.Module):
    """Attention with queries, keys and values of a matrix each; gives the first so many tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(_DIM, _DIM)
        self.key = nn.Linear(_DIM, _DIM)
        self.value = nn.Linear(_DIM, _DIM)

    def forward(self, x: Tensor, heads: int, first: int | None = None) -> Tensor:
        return attend(self.query(x[:, :first]), self.key(x), self.value(x), heads)


class _Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(_DIM, 1e-12)
        self.attention = nn.ModuleDict({"attention": _Attention(), "output": _dense(_DIM, _DIM)})
        self.layernorm_after = nn.LayerNorm(_DIM, 1e-12)
        self.intermediate = _dense(_DIM, 4 * _DIM)
        self.output = _dense(4 * _DIM, _DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention["attention"](self.layernorm_before(x), heads=12)
        x = x + self.attention["output"](y)
        return x + self.output(F.gelu(self.intermediate(self.layernorm_after(x))))


class _Embeddings(nn.Module):
    """Patches of a spectrum, after a class and a distillation token, with their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, _DIM))
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, _DIM))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 2 + _ROWS * _STEPS, _DIM))
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(1, _DIM, 16, stride=10)})

    def forward(self, log_mel: Tensor) -> Tensor:
        x = self.patch_embeddings["projection"](log_mel[:, None]).flatten(2).transpose(1, 2)
        first = torch.cat([self.cls_token, self.distillation_token], dim=1).expand(len(x), -1, -1)
        return torch.cat([first, x], dim=1) + self.position_embeddings


class _Spectra(nn.Module):
    """The audio spectrogram transformer, without its first two tokens at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = _Embeddings()
        layers = nn.Sequential(*(_Layer() for _ in range(12)))
        self.encoder = nn.Sequential(OrderedDict(layer=layers))
        self.layernorm = nn.LayerNorm(_DIM, 1e-12)

    def forward(self, log_mel: Tensor) -> Tensor:
        return self.layernorm(self.encoder(self.embeddings(log_mel))[:, 2:])


class _Audio(nn.Module):
    """Spectra of segments `(N, 128, 66)` -> features of their time steps `(N, 6, 768)`."""

    window: Tensor
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.ast = _Spectra()
        self.freq_attn_agg = Summary(_DIM, 12)
        with torch.device("cpu"):
            window = torch.hann_window(_WINDOW, dtype=torch.float64)
            filters = mel_filters(Synchformer.sample_rate, _FFT, _BANDS, 0.0, 8000.0, "hz")
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def log_mel(self, segments: Tensor) -> Tensor:
        mel = power(segments, self.window, _FFT, _HOP, centered=True) @ self.filters
        # The last column is a zero of the logarithm, which is a bright value, not silence.
        x = F.pad((mel + 1e-6).log().transpose(1, 2), (0, _COLUMNS - mel.shape[1]))
        return ((x - _MEAN) / _SCALE).float()

    def forward(self, log_mel: Tensor) -> Tensor:
        x = self.ast(log_mel).unflatten(1, (_ROWS, _STEPS)).transpose(1, 2)
        return self.freq_attn_agg(x.flatten(0, 1)).unflatten(0, (-1, _STEPS))


class _Projected(_Attention):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(_DIM, _DIM)

    def forward(self, x: Tensor, heads: int, first: int | None = None) -> Tensor:
        return self.proj(super().forward(x, heads, first))


class _Block(nn.Module):
    """A pre-norm transformer layer of the bridge."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(_DIM)
        self.ln2 = nn.LayerNorm(_DIM)
        self.attn = _Projected()
        self.mlp = nn.Sequential(nn.Linear(_DIM, 4 * _DIM), nn.GELU(), nn.Linear(4 * _DIM, _DIM))

    def forward(self, x: Tensor, first: int | None = None) -> Tensor:
        x = x[:, :first] + self.attn(self.ln1(x), heads=8, first=first)
        return x + self.mlp(self.ln2(x))


class _Bridge(nn.Module):
    """Tokens of frames and of sound -> logits of the offset between them."""

    def __init__(self) -> None:
        super().__init__()
        length = 1 + _WHOLE * (_FRAMES // 2) + 1 + _WHOLE * _STEPS
        self.OFF_tok = nn.Parameter(torch.zeros(1, 1, _DIM))
        self.MOD_tok = nn.Parameter(torch.zeros(1, 1, _DIM))
        self.vis_in_lnorm = nn.LayerNorm(_DIM)
        self.aud_in_lnorm = nn.LayerNorm(_DIM)
        self.pos_emb_cfg = nn.ParameterDict({"pos_emb": torch.zeros(1, length, _DIM)})
        self.blocks = nn.ModuleList(_Block() for _ in range(3))
        self.ln_f = nn.LayerNorm(_DIM)
        self.off_head = nn.Linear(_DIM, 21)

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        off, mod = (token.expand(len(video), -1, -1) for token in (self.OFF_tok, self.MOD_tok))
        x = torch.cat([off, self.vis_in_lnorm(video), mod, self.aud_in_lnorm(audio)], dim=1)
        x = x + self.pos_emb_cfg["pos_emb"]
        for block in self.blocks[:-1]:
            x = block(x)
        return self.off_head(self.ln_f(self.blocks[-1](x, first=1)[:, 0]))


class Synchformer(nn.Module):
    """Features of frames and of sound, and the offset between them.

    Attributes:
        sample_rate: 16,000 Hz.
        fps: 25 frames per second.
        visual: The visual half; None where the state dict has none, and with features at hand.
        notes: One line each on what was odd about the file that it was read from.
    """

    sample_rate = 16000
    fps = 25
    visual: Visual | None
    afeat_extractor: _Audio | None
    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.visual = None
        self.afeat_extractor = _Audio()
        self.vproj = nn.Linear(_DIM, _DIM)
        self.aproj = nn.Linear(_DIM, _DIM)
        self.transformer = _Bridge()

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> Synchformer:
        """Return the network of a published state dict, in float32 and evaluation mode.

        A state dict without the visual half (`vfeat_extractor.*`) or without the audio half
        (`afeat_extractor.*`) gives a network that compares features which are made elsewhere.

        Args:
            state_dict: Names and shapes as in `synchformer_state_dict.pth`, or a checkpoint with
                these inside.

        Raises:
            InputError: Entries are missing, unexpected or of another shape; the first are named.
        """
        state, notes = weights_in(state_dict, "transformer.off_head.weight", "Synchformer")
        with torch.device("meta"):
            network = cls()
        if not any(name.startswith("afeat_extractor.") for name in state):
            network.afeat_extractor = None
        load_published(network, state, "Synchformer", lambda name: name.startswith(_VISUAL))
        if any(name.startswith(_VISUAL) for name in state):
            network.visual = Visual.from_state_dict(state)
        network.notes = notes
        return network.eval().requires_grad_(False)

    def log_mel(self, waveform: Tensor) -> Tensor:
        """Return log-mel power of segments of 0.64 s, half of which overlaps the next.

        Args:
            waveform: `(B, samples)` float in [-1, 1], at 16 kHz, at least 10,240 samples.

        Returns:
            `(B, S, 128, 66)` float32 with S = (samples - 10240) // 5120 + 1; 24 of 8 s.

        Raises:
            InputError: Another shape or dtype, a shorter clip, samples that are not finite, or a
                network without audio half.
        """
        segments = self._segments(waveform)
        return self._audio.log_mel(segments.flatten(0, 1)).unflatten(0, segments.shape[:2])

    def encode_audio(self, waveform: Tensor) -> Tensor:
        """Return features of segments of 0.64 s of sound.

        Args:
            waveform: As for `log_mel`.

        Returns:
            `(B, S, 6, 768)` float32.

        Raises:
            InputError: As for `log_mel`.
        """
        segments = self._segments(waveform)
        parts = segments.flatten(0, 1).split(_AT_ONCE)
        found = torch.cat([self._audio(self._audio.log_mel(part)) for part in parts])
        return found.unflatten(0, segments.shape[:2])

    def encode_video(self, frames: Tensor) -> Tensor:
        """Return features of segments of 16 frames, half of which overlap the next.

        Args:
            frames: `(B, T, 3, 224, 224)` in [-1, 1] at 25 frames per second, T >= 16.

        Returns:
            `(B, S, 8, 768)` float32 with S = (T - 16) // 8 + 1; 24 of 8 s.

        Raises:
            InputError: Another shape, fewer frames, or a network without visual half.
        """
        if self.visual is None:
            raise InputError(f"This Synchformer has no visual half: there were no {_VISUAL}*.")
        if frames.ndim != 5 or frames.shape[1] < _FRAMES:
            raise InputError(
                f"Frames of shape {tuple(frames.shape)} cannot be used: (batch, at least "
                f"{_FRAMES}, 3, height, width) is needed."
            )
        segments = frames.unfold(1, _FRAMES, _FRAME_STRIDE).movedim(-1, 2)
        return torch.cat([self.visual(part) for part in segments.split(8, dim=1)], dim=1)

    def compare(self, video: Tensor, audio: Tensor) -> Tensor:
        """Return logits of the offset between 14 segments of frames and of sound.

        Args:
            video: `(B, 14, 8, 768)`.
            audio: `(B, 14, 6, 768)`.

        Returns:
            `(B, 21)` float32: of offsets from -2 s to 2 s, 0.2 s apart.

        Raises:
            InputError: Other shapes.
        """
        shapes = ((len(video), _WHOLE, _FRAMES // 2, _DIM), (len(video), _WHOLE, _STEPS, _DIM))
        if (video.shape, audio.shape) != shapes:
            raise InputError(
                f"Features of shapes {tuple(video.shape)} and {tuple(audio.shape)} cannot be "
                f"compared: {shapes[0]} and {shapes[1]} are needed."
            )
        return self.transformer(self.vproj(video.flatten(1, 2)), self.aproj(audio.flatten(1, 2)))

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        """Return logits of the offset at the beginning and at the end of clips.

        Args:
            video: `(B, S, 8, 768)` as of `encode_video`, S >= 14, which are 4.8 s.
            audio: `(B, S, 6, 768)` as of `encode_audio`.

        Returns:
            `(B, 2, 21)` float32: of the first 14 segments and of the last 14.

        Raises:
            InputError: Other shapes, or too few segments.
        """
        if min(video.shape[1], audio.shape[1]) < _WHOLE or video.shape[1] != audio.shape[1]:
            raise InputError(
                f"There are {video.shape[1]} segments of frames and {audio.shape[1]} of sound: "
                f"at least {_WHOLE} (4.8 s) and as many of one as of the other are needed."
            )
        first, last = slice(_WHOLE), slice(-_WHOLE, None)
        windows = [self.compare(video[:, part], audio[:, part]) for part in (first, last)]
        return torch.stack(windows, dim=1)

    @staticmethod
    def offsets(logits: Tensor) -> Tensor:
        """Return the most probable distance in time between frames and sound, in seconds.

        The mean over both windows of all clips is the DeSync score.

        Args:
            logits: `(..., 21)`.

        Returns:
            `(...)` float64, from 0 to 2 in steps of 0.2.
        """
        return (logits.argmax(dim=-1).double() - 10).abs() / 5

    @property
    def _audio(self) -> _Audio:
        if self.afeat_extractor is None:
            raise InputError("This Synchformer has no audio half: there were no afeat_extractor.*.")
        return self.afeat_extractor

    def _segments(self, waveform: Tensor) -> Tensor:
        """`(B, samples)` -> `(B, S, 10240)`."""
        check_waveform(waveform, _SEGMENT, "Synchformer", self.sample_rate)
        return waveform.unfold(1, _SEGMENT, _STRIDE)
