"""VGGish: the network behind the Fréchet audio distance.

Hershey et al., "CNN architectures for large-scale audio classification", 2017, arXiv:1609.09430, in
the parameter names of torchvggish.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mfmjt.checkpoints import PublishedFile, load_published, weights_in
from mfmjt.evaluate.networks._frontend import check_waveform, mel_filters, power

__all__ = ["VGGISH_FILES", "VGGish"]

VGGISH_FILES = (
    PublishedFile(
        "vggish-10086976.pth",
        "https://github.com/harritaylor/torchvggish/releases/tag/v0.1",
        "275.2M",
        sha256="10086976",
        license="Apache-2.0",
    ),
)
"""The published weights."""

_WINDOW, _HOP, _FFT, _FRAMES = 400, 160, 512, 96
_PIECE = _WINDOW + (_FRAMES - 1) * _HOP  # samples that a piece sees
_AT_ONCE = 16  # pieces


class VGGish(nn.Module):
    """Embeddings of 0.96 s pieces of sound, without the last rectifier, PCA and quantization.

    Google's own code applies a rectifier to the embedding; the tools of this field leave it out of
    the Fréchet distance, and so it is not here. `embedding.relu()` gives the other.

    Attributes:
        sample_rate: 16,000 Hz.
        notes: One line each on what was odd about the file that it was read from.
    """

    sample_rate = 16000
    notes: tuple[str, ...] = ()
    window: Tensor
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for stage in ((64,), (128,), (256, 256), (512, 512)):
            for width in stage:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(512 * (_FRAMES // 16) * 4, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, 128),
        )
        with torch.device("cpu"):
            window = torch.hann_window(_WINDOW, dtype=torch.float64)
            filters = mel_filters(self.sample_rate, _FFT, 64, 125.0, 7500.0, "mel")
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> VGGish:
        """Return the network of a published state dict, in float32 and evaluation mode.

        The parameters of the postprocessor (`pproc.*`, `pca_*`) are left aside.

        Args:
            state_dict: Names and shapes as in `vggish-10086976.pth`, or a checkpoint with these
                inside.

        Raises:
            InputError: Entries are missing, unexpected or of another shape; the first are named.
        """
        state, notes = weights_in(state_dict, "features.13.weight", "VGGish")
        with torch.device("meta"):
            network = cls()
        load_published(network, state, "VGGish", lambda name: name.startswith(("pproc.", "pca_")))
        for layer in network.features:
            if isinstance(layer, nn.Conv2d):  # in the layout with which CPUs are a quarter faster
                weight = layer.weight.detach().contiguous(memory_format=torch.channels_last)
                layer.weight = nn.Parameter(weight)
        network.notes = notes
        return network.eval().requires_grad_(False)

    def log_mel(self, waveform: Tensor) -> Tensor:
        """Return log-mel magnitudes of pieces that follow one another; a shorter rest is cut off.

        Args:
            waveform: `(B, S)` float in [-1, 1], at 16 kHz, S >= 15,600.

        Returns:
            `(B, pieces, 96, 64)` float32; 8 pieces of 8 s.

        Raises:
            InputError: Another shape or dtype, a shorter clip, or samples that are not finite.
        """
        check_waveform(waveform, _PIECE, "VGGish", self.sample_rate)
        pieces = waveform.unfold(1, _PIECE, _FRAMES * _HOP)
        return self._log_mel(pieces.flatten(0, 1)).unflatten(0, pieces.shape[:2])

    def _log_mel(self, pieces: Tensor) -> Tensor:
        magnitude = power(pieces, self.window, _FFT, _HOP, centered=False).sqrt()
        return (magnitude @ self.filters + 0.01).log().float()

    def forward(self, waveform: Tensor) -> Tensor:
        """Embed every piece.

        Args:
            waveform: As for `log_mel`.

        Returns:
            `(B, pieces, 128)` float32.

        Raises:
            InputError: As for `log_mel`.
        """
        check_waveform(waveform, _PIECE, "VGGish", self.sample_rate)
        pieces = waveform.unfold(1, _PIECE, _FRAMES * _HOP)
        found = []
        for part in pieces.flatten(0, 1).split(_AT_ONCE):
            x = self.features(self._log_mel(part)[:, None])  # (pieces, 512, 6, 4)
            # TensorFlow's order, in which the weights were trained: channels last.
            found.append(self.embeddings(x.permute(0, 2, 3, 1).flatten(1)))
        return torch.cat(found).unflatten(0, pieces.shape[:2])
