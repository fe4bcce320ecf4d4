"""Small encoders that play the parts of CLIP and Synchformer for the shipped model.

The interfaces are those of the large ones: a feature per frame at 8 fps and a feature per text
token, trained to agree; and a feature per frame at 25 fps that knows *when* things happen. Unlike
CLIP's, features have unit mean square (norm √128), which is what linear layers like to be fed.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import string
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.checkpoints import load_module, save_module
from mfmjt.encoders.base import Encoders, FrameSpec, Lengths, check_frames, check_texts
from mfmjt.errors import InputError
from mfmjt.files import atomic_path
from mfmjt.model import ModelConfig
from mfmjt.model.config import SYNC_SEGMENT

__all__ = ["FrameEncoder", "NanoEncoders", "NanoEncodersConfig", "SyncEncoder", "TextEncoder"]

_WORDS = "words.txt"
_WORD = re.compile(r"\w+|[^\w\s]")
_ROUNDING = 1e-6  # of durations in seconds, which are quotients
_REACH = 4  # frames on each side that a sync feature sees
_SEGMENT, _STRIDE = 16, 8  # Synchformer's segments: 16 frames, of which the middle 8 get features


@dataclass(frozen=True)
class NanoEncodersConfig:
    """Sizes of `NanoEncoders`.

    Attributes:
        dim: Width of every feature.
        frame_channels: Channels of the frame encoder at 32, 16, 8 and 4 pixels.
        sync_channels: The same of the sync encoder.
        buckets: Rows of the hashed text embedding.
        bucket_dim: Width of these rows.
        text_layers: Transformer layers.
        text_heads: Heads of each.
        text_length: Tokens, the start token included.
    """

    dim: int = 128
    frame_channels: tuple[int, int, int, int] = (24, 48, 96, 128)
    sync_channels: tuple[int, int, int, int] = (16, 32, 64, 96)
    buckets: int = 4096
    bucket_dim: int = 64
    text_layers: int = 2
    text_heads: int = 4
    text_length: int = 32


def _unit(x: Tensor) -> Tensor:
    """Scale the last dimension to unit mean square."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)


def _pyramid(inputs: int, channels: tuple[int, ...], kernel: int, dim: int) -> nn.Sequential:
    """Four halvings of a 64 x 64 picture, then one linear map that still knows positions."""
    layers: list[nn.Module] = []
    for level, width in enumerate(channels):
        size = kernel if level == 0 else 3
        layers += [
            nn.Conv2d(inputs, width, size, stride=2, padding=size // 2),
            nn.GroupNorm(4, width),
            nn.GELU(),
        ]
        inputs = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * 16, dim))


class FrameEncoder(nn.Module):
    """One picture -> one feature: `(B, 3, 64, 64)` in [-1, 1] -> `(B, dim)`."""

    def __init__(self, config: NanoEncodersConfig) -> None:
        super().__init__()
        self.picture = _pyramid(3, config.frame_channels, 3, config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Unit-mean-square features of pictures."""
        return _unit(self.out(F.gelu(self.picture(x))))


class SyncEncoder(nn.Module):
    """Frames with their neighbors: `(B, T, 3, 64, 64)` in [-1, 1] -> `(B, T - 8, dim)`.

    The color difference of the frames before and after, three temporal convolutions of three, and
    nothing else mixes frames: feature i sees frames i ± 4. No frame is made up at the ends, so a
    window of a clip and the whole clip agree to rounding.
    """

    def __init__(self, config: NanoEncodersConfig) -> None:
        super().__init__()
        dim = config.dim
        self.picture = _pyramid(6, config.sync_channels, 5, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(_REACH - 1))
        self.mixes = nn.ModuleList(nn.Conv1d(dim, dim, 3) for _ in range(_REACH - 1))
        self.out = nn.Linear(dim, dim)

    def forward(self, frames: Tensor) -> Tensor:
        """Unit-mean-square features of all frames but the outer four."""
        batch = frames.shape[0]
        # Differences are small; twice their size brings them nearer to the range of colors.
        change = 2.0 * (frames[:, 2:] - frames[:, :-2])
        x = self.picture(torch.cat([frames[:, 1:-1], change], dim=2).flatten(0, 1))
        x = x.unflatten(0, (batch, -1))
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            mixed = mix(F.gelu(norm(x)).transpose(1, 2)).transpose(1, 2)
            x = x[:, 1:-1] + mixed
        return _unit(self.out(F.gelu(x)))


@functools.lru_cache(maxsize=65536)
def word_pieces(word: str, buckets: int) -> tuple[int, ...]:
    """Embedding rows of a word: one for the whole, one for every three characters in a row."""
    framed = f"#{word}#"
    grams = (framed[i : i + 3] for i in range(len(framed) - 2))
    names = itertools.chain((f"word {word}",), (f"gram {gram}" for gram in grams))
    return tuple(zlib.crc32(name.encode("utf-8", "surrogatepass")) % buckets for name in names)


def _words(text: str, limit: int) -> list[str]:
    found = _WORD.finditer(text.lower())
    # 32 characters tell words apart; a prompt that is one endless word must not take for ever.
    return [match.group()[:32] for match in itertools.islice(found, limit)]


class _TextLayer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TextEncoder(nn.Module):
    """Strings -> `(B, text_length, dim)`: a start token, then one token per word or symbol.

    There is no vocabulary: a word is the mean of the hashed rows of itself and of its character
    trigrams, so an unknown word still resembles its relatives. Padding tokens look at the words and
    are not looked at.
    """

    def __init__(self, config: NanoEncodersConfig) -> None:
        super().__init__()
        self.config = config
        self.rows = nn.EmbeddingBag(config.buckets, config.bucket_dim, mode="mean")
        self.widen = nn.Linear(config.bucket_dim, config.dim)
        self.positions = nn.Parameter(0.02 * torch.randn(config.text_length, config.dim))
        self.start = nn.Parameter(0.02 * torch.randn(config.dim))
        self.padding = nn.Parameter(0.02 * torch.randn(config.dim))
        layers = [_TextLayer(config.dim, config.text_heads) for _ in range(config.text_layers)]
        self.layers = nn.ModuleList(layers)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, texts: list[str]) -> Tensor:
        """Unit-mean-square features of every token."""
        length = self.config.text_length
        device = self.positions.device
        words = [_words(text, length - 1) for text in texts]
        x = torch.cat(
            [self.start.expand(len(texts), 1, -1), self.padding.expand(len(texts), length - 1, -1)],
            1,
        )
        real = torch.zeros(len(texts), length, dtype=torch.bool)
        for row, found in enumerate(words):
            real[row, : 1 + len(found)] = True
        real = real.to(device)
        bags = [word_pieces(word, self.config.buckets) for found in words for word in found]
        if bags:
            offsets = list(itertools.accumulate((len(bag) for bag in bags[:-1]), initial=0))
            embedded = self.rows(
                torch.tensor(list(itertools.chain.from_iterable(bags)), device=device),
                torch.tensor(offsets, device=device),
            )
            spots = real.clone()
            spots[:, 0] = False
            x = x.index_put((spots,), self.widen(embedded).to(x.dtype))
        x = x + self.positions
        for layer in self.layers:
            x = layer(x, real[:, None, None, :])
        return _unit(self.out(x))


class NanoEncoders(Encoders):
    """Frame, sync and text encoder behind the interfaces of CLIP and Synchformer.

    Args:
        config: Sizes; the default is the shipped set.

    Attributes:
        frame_size: 64 pixels; other sizes are resized.
        video_fps: 8 frames per second for `encode_frames`.
        sync_fps: 25 frames per second for `encode_sync`.
        vocabulary: Words that the text encoder was trained on, in lower case; empty if not known.
            They are kept beside the weights, in `words.txt`.
    """

    frame_size: int = 64
    video_fps = 8
    sync_fps = 25
    frames_are_independent = False  # they are, but few: a window's are encoded at once
    period = SYNC_SEGMENT / sync_fps

    def __init__(self, config: NanoEncodersConfig | None = None) -> None:
        super().__init__()
        self.config = config or NanoEncodersConfig()
        self.frame_encoder = FrameEncoder(self.config)
        self.sync_encoder = SyncEncoder(self.config)
        self.text_encoder = TextEncoder(self.config)
        self.vocabulary: frozenset[str] = frozenset()

    @property
    def frame_specs(self) -> tuple[FrameSpec, FrameSpec]:
        """Frames for `encode_frames` and `encode_sync`."""
        return (
            FrameSpec(self.video_fps, self.frame_size),
            FrameSpec(self.sync_fps, self.frame_size),
        )

    def lengths(self, seconds: float, config: ModelConfig) -> Lengths:
        """Give the lengths of whole segments of `period` seconds, where frames meet latents.

        What is beyond the duration is cut off the waveform.
        """
        whole = math.ceil(seconds / self.period - _ROUNDING) * self.period
        latents, frames, sync = (
            round(whole * rate) for rate in (config.latent_rate, self.video_fps, self.sync_fps)
        )
        return Lengths(latents, frames, sync)

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Features of single frames, CLIP's part.

        Args:
            frames: uint8 `(B, T, H, W, 3)`, at 8 fps.

        Returns:
            `(B, T, 128)` float32.

        Raises:
            InputError: Not uint8 of that shape, or no frames.
        """
        x = self._prepare(frames)
        return self.frame_encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def encode_sync(self, frames: Tensor) -> Tensor:
        """Features of frames among their neighbors, Synchformer's part.

        Args:
            frames: uint8 `(B, T, H, W, 3)`, at 25 fps. The first and last frame are repeated where
                a feature looks beyond the ends.

        Returns:
            `(B, 8 * ceil(T / 8), 128)` float32, one per frame, then features of the repeated end.

        Raises:
            InputError: Not uint8 of that shape, or no frames.
        """
        x = self._prepare(frames)
        count = x.shape[1]
        whole = -(-count // _STRIDE) * _STRIDE
        index = torch.arange(-_REACH, whole + _REACH, device=x.device).clamp(0, count - 1)
        return self.sync_encoder(x[:, index])

    def sync(self, frames: Tensor) -> Tensor:
        """Features of segments, with Synchformer's shapes.

        Args:
            frames: `(B, S, 16, 3, H, W)` float in [-1, 1]; segment s starts at frame 8 s.

        Returns:
            `(B, S, 8, 128)`; feature j of segment s is that of frame 8 s + 4 + j.

        Raises:
            InputError: Another shape.
        """
        if frames.ndim != 6 or frames.shape[2:4] != (_SEGMENT, 3) or frames.numel() == 0:
            raise InputError(
                f"Segments of shape {tuple(frames.shape)} cannot be encoded: "
                f"(batch, segments, {_SEGMENT}, 3, height, width) is needed."
            )
        x = frames.flatten(0, 2)
        if x.shape[-2:] != (self.frame_size, self.frame_size):
            size = (self.frame_size, self.frame_size)
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(-1, 1)
        segments = x.unflatten(0, (-1, _SEGMENT))
        return self.sync_encoder(segments).unflatten(0, frames.shape[:2])

    def encode_text(self, texts: list[str]) -> Tensor:
        """Features of text tokens, CLIP's part.

        Args:
            texts: Any strings; words beyond the 31st are ignored.

        Returns:
            `(len(texts), 32, 128)` float32.

        Raises:
            InputError: Not a list of strings, or an empty one.
        """
        check_texts(texts)
        return self.text_encoder(list(texts))

    def unread(self, text: str) -> str:
        """Return the end of a text that `encode_text` ignores; empty unless the text is long."""
        words = itertools.islice(_WORD.finditer(text), self.config.text_length - 1, None)
        first = next(words, None)
        return "" if first is None else text[first.start() :]

    def understood(self, text: str) -> tuple[list[str], list[str]]:
        """Words that `encode_text` reads: those that training had, and those that it had not.

        Both are empty where the vocabulary is not known. Marks of punctuation are no words.
        """
        read = _words(text, self.config.text_length - 1) if self.vocabulary else []
        words = [word for word in dict.fromkeys(read) if word not in string.punctuation]
        return (
            [word for word in words if word in self.vocabulary],
            [word for word in words if word not in self.vocabulary],
        )

    def _prepare(self, frames: Tensor) -> Tensor:
        """uint8 `(B, T, H, W, 3)` -> float `(B, T, 3, 64, 64)` in [-1, 1]."""
        check_frames(frames)
        x = frames.flatten(0, 1).permute(0, 3, 1, 2)
        if x.shape[-2:] != (self.frame_size, self.frame_size):
            size = (self.frame_size, self.frame_size)
            # In uint8, which is over ten times faster than in float and one level apart at most.
            x = F.interpolate(x.contiguous(), size, mode="bicubic", antialias=True)
        dtype = self.text_encoder.positions.dtype
        return (x.to(dtype) / 127.5 - 1.0).unflatten(0, frames.shape[:2])

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Write the weights, stored as `dtype`, with the configuration as safetensors metadata.

        Beside them goes `words.txt`, where the vocabulary is known.
        """
        save_module(path, self, self.config, dtype)
        if self.vocabulary:
            with atomic_path(Path(path).with_name(_WORDS)) as temporary:
                temporary.write_text(
                    "".join(f"{word}\n" for word in sorted(self.vocabulary)), "utf-8"
                )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NanoEncoders:
        """Read what `save` wrote, as float32 in evaluation mode.

        Raises:
            InputError: No such file, not safetensors, or not those of `NanoEncoders`.
        """
        encoders = load_module(path, cls, NanoEncodersConfig, "encoders")
        words = Path(path).with_name(_WORDS)
        if words.is_file():
            encoders.vocabulary = frozenset(words.read_text("utf-8", "replace").split())
        return encoders
