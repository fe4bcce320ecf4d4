"""YAMNet: the network that a judge of recorded sound listens with.

Plakal and Ellis, YAMNet, 2019 (tensorflow/models, research/audioset/yamnet): MobileNet v1 on the
log-mel spectra of pieces of 0.96 s, trained on the 521 classes of AudioSet. Its batch norms are
folded into its convolutions, as in the published TensorFlow Lite file.
"""

from __future__ import annotations

import itertools
import os
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.errors import InputError, reason
from mfmjt.evaluate.networks._frontend import check_waveform, mel_filters, power

__all__ = ["YAMNet"]

_WINDOW, _HOP, _FFT, _FRAMES = 400, 160, 512, 96
_PIECE = _WINDOW + (_FRAMES - 1) * _HOP  # samples that a piece sees
_STEP = _FRAMES // 2 * _HOP  # samples from one piece to the next
_AT_ONCE = 32  # pieces
_WIDTHS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
_STRIDES = (2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


class YAMNet(nn.Module):
    """Embeddings of pieces of sound of 0.96 s, one every 0.48 s, without the classes of AudioSet.

    Attributes:
        sample_rate: 16,000 Hz.
        width: Size of the embedding, 1,024.
        least: Samples of the shortest clip.
    """

    sample_rate, width, least = 16000, _WIDTHS[-1], _PIECE
    window: Tensor
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, _WIDTHS[0], 3, stride=_STRIDES[0])
        self.depthwise = nn.ModuleList(
            nn.Conv2d(before, before, 3, stride=stride, groups=before)
            for before, stride in zip(_WIDTHS[:-1], _STRIDES[1:], strict=True)
        )
        self.pointwise = nn.ModuleList(
            nn.Conv2d(before, after, 1) for before, after in itertools.pairwise(_WIDTHS)
        )
        with torch.device("cpu"):
            window = torch.hann_window(_WINDOW, dtype=torch.float64)
            filters = mel_filters(self.sample_rate, _FFT, 64, 125.0, 7500.0, "mel")
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    @classmethod
    def from_tflite(cls, path: str | os.PathLike[str]) -> YAMNet:
        """Read the published TensorFlow Lite file, in float32 and evaluation mode.

        Needs the package `ai-edge-litert`. Matrices are stored there in 8 bits, each with a scale.

        Args:
            path: `yamnet.tflite`, the model whose input is a waveform.

        Raises:
            InputError: The package is missing, or the file is not YAMNet.
        """
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError:
            raise InputError(
                "Reading yamnet.tflite needs ai-edge-litert. Run `pip install ai-edge-litert`."
            ) from None
        try:
            file = Interpreter(os.fspath(path))
            constant: dict[tuple[int, str], Tensor] = {}
            for one in file.get_tensor_details():
                found = re.match(r"yamnet_frames/layer(\d+)/(?:(\w+)wise_)?conv/", one["name"])
                # Results have a layer's name too: theirs begin with that of a rectifier.
                if found is None or "/relu/" in one["name"].split(";")[0]:
                    continue
                part = "bias" if len(one["shape"]) == 1 else "weight"
                place = int(found[1]), f"{found[2] or 'first'}.{part}"
                if place in constant:  # the interpreter's own copy in float32
                    continue
                value = torch.from_numpy(file.get_tensor(one["index"]).astype("float32"))
                constant[place] = value * (one["quantization"][0] or 1.0)
            network = cls()
            state = {
                "first.weight": constant[1, "first.weight"].permute(0, 3, 1, 2),
                "first.bias": constant[1, "first.bias"],
            }
            for layer in range(len(_WIDTHS) - 1):
                for name, order in (("depth", (3, 0, 1, 2)), ("point", (0, 3, 1, 2))):
                    at = f"{name}wise.{layer}"
                    state[f"{at}.weight"] = constant[layer + 2, f"{name}.weight"].permute(order)
                    state[f"{at}.bias"] = constant[layer + 2, f"{name}.bias"]
            network.load_state_dict(state)
        except Exception as error:  # what is in the file decides what is raised
            raise InputError(
                f"{path} is not YAMNet's TensorFlow Lite file: {reason(error)}. Give the one "
                "whose input is a waveform, such as the float model of TensorFlow Hub."
            ) from error
        return network.eval().requires_grad_(False)

    def forward(self, waveform: Tensor) -> Tensor:
        """Embed every piece; a rest at the end that is no whole step is left out.

        Args:
            waveform: `(B, S)` float in [-1, 1] at 16 kHz, S >= 15,600.

        Returns:
            `(B, pieces, 1024)` float32; 15 pieces of 8 s.

        Raises:
            InputError: Another shape or dtype, a shorter clip, or samples that are not finite.
        """
        check_waveform(waveform, _PIECE, "YAMNet", self.sample_rate)
        pieces = waveform.unfold(1, _PIECE, _STEP)
        found = [self._embed(part) for part in pieces.flatten(0, 1).split(_AT_ONCE)]
        return torch.cat(found).unflatten(0, pieces.shape[:2])

    def _embed(self, pieces: Tensor) -> Tensor:
        magnitude = power(pieces, self.window, _FFT, _HOP, centered=False).sqrt()
        x = (magnitude @ self.filters + 1e-3).log().float()[:, None]  # (pieces, 1, 96, 64)
        x = F.relu(self.first(_same(x, _STRIDES[0])))
        for depthwise, pointwise, stride in zip(
            self.depthwise, self.pointwise, _STRIDES[1:], strict=True
        ):
            x = F.relu(pointwise(F.relu(depthwise(_same(x, stride)))))
        return x.mean(dim=(2, 3))


def _same(x: Tensor, stride: int) -> Tensor:
    """Pad even sizes for a window of 3 as TensorFlow does: with stride 2 at the far ends alone."""
    return F.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))
