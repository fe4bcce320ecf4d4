"""Judge the parts of models alone: codec on recordings, text encoder on words, classifier.

Of each folder, what of `codec.safetensors`, `encoders.safetensors` and `classifier.safetensors` it
holds is judged:

* Codec: recordings of one split through the posterior's mean. `mel` is the mean absolute difference
  of MMAudio's log10 mels, `log` and `linear` the two parts of the codec's own multi-resolution STFT
  loss (log mel magnitudes in nepers, spectral convergence), `stft` their sum. Beside them stands
  Griffin-Lim: 32 iterations on the true mel.
* Text: the share of phrases that are nearest to their own label, those kept back for tests and
  those of words that no caption has; among all labels, and among the 30 with most recordings.
* Classifier: the share of recordings that it gives their label, where its classes are labels.

Examples:
  python -m bench parts CORPUS mfmjt/pretrained/nano mfmjt/pretrained/foley
  python -m bench parts CORPUS output/foley/codec --split validation --out bench/results/foley
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import parser
from mfmjt.codec import MelSpectrogram, NanoCodec
from mfmjt.codec.mel import filterbank, stft
from mfmjt.data.recordings import Recordings
from mfmjt.encoders import NanoEncoders
from mfmjt.evaluate.classifier import Classifier
from mfmjt.files import atomic_path
from mfmjt.train.tasks.classifier import accuracy, judged_recordings
from mfmjt.train.tasks.codec import SpectralLoss
from mfmjt.train.tasks.teacher import named_right

__all__ = ["griffin_lim", "main", "reconstructions"]

ITERATIONS = 32
LARGEST = 30  # labels


def griffin_lim(mel: Tensor, samples: int) -> Tensor:
    """Return a sound with about this mel: Griffin and Lim's iterations, with momentum 0.99.

    Perraudin et al., 2013, "A fast Griffin-Lim algorithm". The magnitude of the 513 bins is the
    least-squares solution for the 80 bands, less what is negative.

    Args:
        mel: MMAudio's log10 mel at 16 kHz `(1, 80, frames)`.
        samples: Length of the sound.
    """
    front = MelSpectrogram("16k")
    basis = filterbank(16000, front.config.window, front.config.bands)
    magnitude = (torch.linalg.pinv(basis) @ 10**mel).clamp(min=0)
    margin = (front.config.window - front.config.hop) // 2
    generator = torch.Generator().manual_seed(0)
    turns = torch.exp(2j * torch.pi * torch.rand(magnitude.shape, generator=generator))
    before = torch.zeros_like(turns)

    def sound(spectrum: Tensor) -> Tensor:
        frames = torch.fft.irfft(spectrum, front.config.window, dim=1) * front.window[:, None]
        length = front.config.hop * (mel.shape[-1] - 1) + front.config.window
        fold: dict[str, Any] = {
            "output_size": (1, length), "kernel_size": (1, front.config.window),
            "stride": (1, front.config.hop),
        }  # fmt: skip
        weight = front.window.square()[None, :, None].expand(frames.shape)
        return (F.fold(frames, **fold) / F.fold(weight, **fold).clamp(min=1e-3)).flatten(1)

    for _ in range(ITERATIONS):
        found = stft(sound(magnitude * turns), front.window, front.config.hop)
        turns = found - 0.99 / 1.99 * before
        turns, before = turns / turns.abs().clamp(min=1e-9), found
    return F.pad(sound(magnitude * turns)[:, margin:], (0, samples))[:, :samples]


def reconstructions(
    through: Callable[[Tensor], Tensor], sounds: Iterator[np.ndarray[Any, Any]]
) -> dict[str, float]:
    """Return the mean distances of sounds from what comes out of a codec.

    Args:
        through: A waveform `(1, S)` into one of that length or longer.
        sounds: Waveforms `(S,)`; silence follows those of less than 2048 samples.
    """
    spectral, found = SpectralLoss(), []
    for wave in sounds:
        target = torch.from_numpy(np.pad(wave, (0, max(0, spectral.longest - len(wave)))))[None]
        made = through(target)[:, : target.shape[1]]
        log, linear = spectral(made, target)
        mel = F.l1_loss(spectral.mel(made), spectral.mel(target))
        found.append([float(x) for x in (mel, log, linear, log + linear)])
    means = np.mean(found, axis=0)
    return dict(zip(("mel", "log", "linear", "stft"), means.round(4).tolist(), strict=True))


def _codec(file: Path, sounds: Iterator[np.ndarray[Any, Any]]) -> dict[str, float]:
    codec = NanoCodec.load(file)
    return reconstructions(lambda wave: codec.decode(codec.encode(wave)[0]), sounds)


def _text(file: Path, recordings: Recordings) -> dict[str, dict[str, float]]:
    encoders = NanoEncoders.load(file)
    counts = Counter(row.label for row in recordings.of("train"))
    largest = [label for label, _ in counts.most_common(LARGEST)]

    def embed(texts: list[str]) -> Tensor:
        return encoders.encode_text(texts).mean(1)

    return {"all": named_right(embed), "largest": named_right(embed, largest)}


def _classifier(file: Path, recordings: Recordings, split: str) -> dict[str, Any]:
    judge = Classifier.load(file)
    waves, labels = judged_recordings(recordings, judge.config.classes, split)
    if not waves:
        return {}
    shares = accuracy(judge, waves, labels)
    counts = {"all": len(waves)} | {
        name: int((labels == i).sum()) for i, name in enumerate(judge.config.classes)
    }
    return {name: [round(share, 3), counts[name]] for name, share in shares.items()}


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    options = parser("parts", __doc__)
    options.add_argument("recordings", type=Path, help="corpus from `mfmjt data real`")
    options.add_argument("models", type=Path, nargs="+", help="folders with parts of models")
    options.add_argument("--split", default="test", help="of the recordings (default: test)")
    options.add_argument("--out", type=Path, help="folder for parts.json")
    args = options.parse_args(argv)
    recordings = Recordings(args.recordings)
    rows = recordings.of(args.split)

    def sounds() -> Iterator[np.ndarray[Any, Any]]:
        return map(recordings.sound, rows)

    mel = MelSpectrogram("16k")
    result: dict[str, Any] = {"split": args.split, "recordings": len(rows)}
    if any((folder / "codec.safetensors").is_file() for folder in args.models):
        result["griffin_lim"] = reconstructions(
            lambda wave: griffin_lim(mel(wave), wave.shape[1]), sounds()
        )
    for folder in args.models:
        found = result[folder.name] = {}
        if (file := folder / "codec.safetensors").is_file():
            found["codec"] = _codec(file, sounds())
        if (file := folder / "encoders.safetensors").is_file():
            found["text"] = _text(file, recordings)
        if (file := folder / "classifier.safetensors").is_file():
            found["classifier"] = _classifier(file, recordings, args.split)
        sys.stderr.write(f"{folder.name}: {json.dumps(found)}\n")
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        with atomic_path(args.out / "parts.json") as temporary:
            temporary.write_text(text + "\n")
    print(text)
    return 0
