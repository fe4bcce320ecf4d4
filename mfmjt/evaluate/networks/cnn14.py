"""Cnn14 of the PANNs: embeddings for the Fréchet distance, logits for KL and inception score.

Kong et al., "PANNs: large-scale pretrained audio neural networks", 2020, arXiv:1912.10211, in the
parameter names of audioset_tagging_cnn.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.checkpoints import PublishedFile, load_published, weights_in
from mfmjt.errors import InputError
from mfmjt.evaluate.networks._frontend import StoredLogMel, check_waveform
from mfmjt.evaluate.networks._layers import BatchNorm

__all__ = ["CNN14_FILES", "Cnn14", "Tagged"]

_ZENODO = "https://zenodo.org/records/3987831"
CNN14_FILES = (
    PublishedFile(
        "Cnn14_16k_mAP=0.438.pth",
        _ZENODO,
        "342.1M",
        sha256="e2ee543a27919542c2ea03eabaa70b24dcd4e6c8e05621de6b67a94e4c5058e6",
        license="CC-BY-4.0",
    ),
    PublishedFile(
        "Cnn14_mAP=0.431.pth",
        _ZENODO,
        sha256="0dc499e40e9761ef5ea061ffc77697697f277f6a960894903df3ada000e34b31",
        license="CC-BY-4.0",
    ),
)
"""The published weights, for 16 kHz and for 32 kHz."""

_WIDTHS = (64, 128, 256, 512, 1024, 2048)
_BANDS = 64
_FFT = {16000: 512, 32000: 1024}  # window and FFT by sample rate
_HIGH = {16000: 8000.0, 32000: 14000.0}  # Hz
_STFT = "spectrogram_extractor.stft.conv_real.weight"


class Tagged(NamedTuple):
    """Results of a network that tags sounds.

    Attributes:
        embedding: `(B, width)`.
        logits: `(B, 527)`, one for each class of AudioSet.
    """

    embedding: Tensor
    logits: Tensor


class _Block(nn.Module):
    """Two 3 x 3 convolutions, each with norm and rectifier."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = BatchNorm(width)
        self.bn2 = BatchNorm(width)

    def fold(self) -> None:
        """Put the norms into the convolutions, and lay out the weights as CPUs are fastest with."""
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            scale, shift = norm.affine
            weight = conv.weight.detach() * scale[:, None, None, None]
            conv.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
            conv.bias = nn.Parameter(shift)
        del self.bn1, self.bn2

    def forward(self, x: Tensor) -> Tensor:
        return _convolved(_convolved(x, self.conv1).relu_(), self.conv2).relu_()


def _convolved(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Convolve 3 x 3; as one matmul where maps are narrow, which is 2 to 3 times faster on CPUs."""
    if x.shape[3] > 2:
        return conv(x)
    patches = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1)
    patches = patches.permute(0, 1, 2, 4, 5, 3).flatten(3)  # (B, rows, columns, 9 channels)
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # no copy: the layout is channels last
    return F.linear(patches, weight, conv.bias).permute(0, 3, 1, 2)


class Cnn14(nn.Module):
    """A convolutional network that tags sounds, at 16 or at 32 kHz.

    Args:
        sample_rate: 16,000 or 32,000 Hz.

    Attributes:
        sample_rate: The same.
        notes: One line each on what was odd about the file that it was read from.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, sample_rate: int = 16000) -> None:
        super().__init__()
        self.sample_rate = sample_rate
        self.spectrum = StoredLogMel(
            sample_rate,
            _FFT[sample_rate],
            sample_rate // 100,
            _BANDS,
            50.0,
            _HIGH[sample_rate],
        )
        self.bn0 = BatchNorm(_BANDS)
        for i, (before, width) in enumerate(itertools.pairwise((1, *_WIDTHS)), 1):
            self.add_module(f"conv_block{i}", _Block(before, width))
        self.fc1 = nn.Linear(_WIDTHS[-1], _WIDTHS[-1])
        self.fc_audioset = nn.Linear(_WIDTHS[-1], 527)

    @property
    def _blocks(self) -> list[_Block]:
        return [self.get_submodule(f"conv_block{i}") for i in range(1, 1 + len(_WIDTHS))]  # type: ignore[misc]

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Tensor], sample_rate: int | None = None
    ) -> Cnn14:
        """Return the network of a published state dict, in float32 and evaluation mode.

        Args:
            state_dict: Names and shapes as in `Cnn14_16k_mAP=0.438.pth` or `Cnn14_mAP=0.431.pth`,
                or a checkpoint with these inside.
            sample_rate: 16,000 or 32,000 Hz; by default what the Fourier matrices of the file are
                for, and 16,000 where it has none.

        Raises:
            InputError: Entries are missing, unexpected or of another shape, and the first are
                named; or the file is for another sample rate.
        """
        state, notes = weights_in(state_dict, "conv_block1.conv1.weight", "Cnn14")
        bins = state[_STFT].shape[0] if _STFT in state else None
        stored = {fft // 2 + 1: rate for rate, fft in _FFT.items()}
        rate = sample_rate or stored.get(bins or 0, 16000)
        if rate not in _FFT or (bins is not None and stored.get(bins) != rate):
            raise InputError(
                f"This Cnn14 cannot be used at {rate:,} Hz: those of 16,000 and 32,000 Hz are, "
                f"each at its own rate{'' if bins is None else f', and its FFT has {bins} bins'}. "
                "Give the file for that rate."
            )
        with torch.device("meta"):
            network = cls(rate)
        state = network.spectrum.take(state, "", "Cnn14")
        load_published(network, state, "Cnn14", lambda name: name.endswith("num_batches_tracked"))
        for block in network._blocks:
            block.fold()
        network.notes = notes
        return network.eval().requires_grad_(False)

    def log_mel(self, waveform: Tensor) -> Tensor:
        """Return log-mel power in dB.

        Args:
            waveform: `(B, S)` float in [-1, 1], at the network's rate, 0.31 s at least.

        Returns:
            `(B, S // hop + 1, 64)` float32, with a hop of 10 ms.

        Raises:
            InputError: Another shape or dtype, a shorter clip, or samples that are not finite.
        """
        least = (2 ** (len(_WIDTHS) - 1) - 1) * self.spectrum.hop  # one frame is left at the end
        check_waveform(waveform, least, "Cnn14", self.sample_rate)
        return self.spectrum(waveform)

    def forward(self, waveform: Tensor) -> Tagged:
        """Embed and tag clips.

        Args:
            waveform: As for `log_mel`.

        Returns:
            `embedding` `(B, 2048)` after its rectifier and `logits` `(B, 527)`, float32.

        Raises:
            InputError: As for `log_mel`.
        """
        scale, shift = self.bn0.affine
        x = (self.log_mel(waveform) * scale + shift)[:, None]
        for i, block in enumerate(self._blocks):
            x = block(x if i == 0 else F.avg_pool2d(x, 2))
        x = x.mean(dim=3)
        embedding = self.fc1(x.amax(dim=2) + x.mean(dim=2)).relu()
        return Tagged(embedding, self.fc_audioset(embedding))
