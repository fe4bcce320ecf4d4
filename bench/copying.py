"""Look for training recordings in what a network makes: is the nearest one closer than a take?

Of each sound, the loudest second is compared with every second of every training recording: the
correlation of log-mel spectra, up to a band higher or lower, whatever the level. Recordings that
have the caption, author and set of another are takes of one thing. How alike two of these are is
the measure: `share` is the share of sounds whose nearest training recording is more alike than half
of the takes are to their nearest. Recordings of the split that is held out stand beside that.

Examples:
  python -m bench copying CORPUS mfmjt/pretrained/foley
  python -m bench copying CORPUS output/foley --clips 300 --out bench/results/foley
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import parser
from mfmjt.codec.mel import mel_power
from mfmjt.data.open_set import open_set
from mfmjt.data.recordings import SAMPLE_RATE, Recording, Recordings
from mfmjt.errors import InputError
from mfmjt.evaluate.examples import opened
from mfmjt.evaluate.sounds import generate
from mfmjt.families import open_bundle
from mfmjt.files import atomic_path
from mfmjt.progress import ProgressBar

__all__ = ["main", "nearest", "patch", "takes"]

WINDOW, HOP, BANDS = 512, 256, 64
FRAMES = SAMPLE_RATE // HOP  # of a patch: 1 s
DEPTH = 60.0  # dB below the largest band at which what is heard ends


def _spectrum(wave: Tensor) -> Tensor:
    """Return the log-mel spectrum (bands, frames) of (S,) in dB, `DEPTH` above its floor at most.

    Silence of a patch's length surrounds it, as a short sound may lie anywhere in a patch.
    """
    padded = F.pad(wave[None], (FRAMES * HOP, FRAMES * HOP))
    decibels = 10 * mel_power(padded, SAMPLE_RATE, WINDOW, HOP, BANDS)[0].clamp(min=1e-12).log10()
    return (decibels - decibels.max() + DEPTH).clamp(min=0).T


def patch(wave: Tensor) -> Tensor:
    """Return the spectrum (bands, frames) of the loudest second of (S,), of mean 0 and norm 1."""
    spectrum = _spectrum(wave)
    loud = F.avg_pool1d((10 ** (spectrum / 10)).sum(dim=0)[None], FRAMES, 1)[0]
    start = int(loud.argmax())
    found = spectrum[:, start : start + FRAMES]
    found = found - found.mean()
    return found / found.norm().clamp(min=1e-6)


def nearest(patches: Tensor, waves: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Find the sound that is most like each patch.

    Args:
        patches: (n, bands, frames), from `patch`.
        waves: Sounds (S,).

    Returns:
        The largest correlation (n,) with any second of any sound, and which sound it was (n,).
    """
    # Up to a band higher or lower: transposed copies are copies.
    moved = [F.pad(patches, (0, 0, 1, 1))[:, 1 - k : 1 - k + BANDS] for k in (-1, 0, 1)]
    kernels = torch.cat([m - m.mean(dim=(1, 2), keepdim=True) for m in moved])
    best, where = torch.full((len(patches),), -1.0), torch.zeros(len(patches), dtype=torch.int64)
    for number, wave in enumerate(waves):
        spectrum = _spectrum(wave)[None]
        size = FRAMES * BANDS
        mean = F.avg_pool1d(spectrum.mean(dim=1), FRAMES, 1)
        square = F.avg_pool1d(spectrum.square().mean(dim=1), FRAMES, 1)
        # A second with less than a decibel in it is silence.
        spread = (size * (square - mean.square()).clamp(min=1.0)).sqrt()
        like = (F.conv1d(spectrum, kernels)[0] / spread).amax(dim=1).view(3, -1).amax(dim=0)
        where[like > best] = number
        best = torch.maximum(best, like)
    return best, where


def takes(rows: Iterable[Recording]) -> list[list[Recording]]:
    """Return the recordings of which there are several takes, those of one thing together.

    Pieces of one recording, whose names differ in their last number alone, are no takes.
    """
    things: dict[tuple[str, str, str], dict[str, Recording]] = {}
    for row in rows:
        takes_of = things.setdefault((row.set, row.credit, row.caption), {})
        takes_of.setdefault(row.id.rpartition("_")[0], row)
    return [list(found.values()) for found in things.values() if len(found) > 1]


def _wave(recordings: Recordings, row: Recording) -> Tensor:
    return torch.from_numpy(recordings.sound(row))


def _about(alike: Tensor, measure: float) -> dict[str, float]:
    return {
        "sounds": len(alike),
        "share": round(float((alike > measure).float().mean()), 3),
        "median": round(float(alike.median()), 3),
        "largest": round(float(alike.max()), 3),
    }


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    options = parser("copying", __doc__)
    options.add_argument("recordings", type=Path, help="corpus from `mfmjt data real`")
    options.add_argument("model", help="a model that ships, or a folder with one")
    options.add_argument("--clips", type=int, default=200, help="of each kind (default: 200)")
    options.add_argument("--steps", type=int, help="evaluations of the network")
    options.add_argument("--out", type=Path, help="folder for copying.json")
    args = options.parse_args(argv)
    recordings, bundle = Recordings(args.recordings), open_bundle(args.model)
    train = recordings.of("train")
    if not (groups := takes(train)):
        raise InputError(
            f"No recording in {args.recordings} has a second take, which is the measure. Give a "
            "corpus in which some have."
        )
    known = open_set(args.recordings).classes
    sounds: dict[str, list[Tensor]] = {}
    for name, alone in (("scenes", False), ("texts", True)):
        examples = opened(args.recordings, bundle.encoders, known, args.clips, text_alone=alone)
        sampling = bundle.sampling.changed(args.steps, None, None)
        sounds[name] = list(generate(bundle, examples, sampling))
    sounds["held out"] = [_wave(recordings, row) for row in recordings.of("test")]
    patches = {name: torch.stack([patch(w) for w in waves]) for name, waves in sounds.items()}
    with ProgressBar("compare", len(train), unit="recordings") as bar:

        def heard() -> Iterable[Tensor]:
            for done, row in enumerate(train, 1):
                yield _wave(recordings, row)
                bar.update(done)

        alike, where = nearest(torch.cat(list(patches.values())), heard())
    pairs = []
    for group in groups:
        for own in group:
            others = [_wave(recordings, row) for row in group if row is not own]
            pairs.append(nearest(patch(_wave(recordings, own))[None], others)[0])
    measure = float(torch.cat(pairs).median())
    result: dict[str, Any] = {"takes": {"sounds": len(pairs), "median": round(measure, 3)}}
    for name, part in zip(patches, alike.split([len(p) for p in patches.values()]), strict=True):
        result[name] = _about(part, measure)
    closest = int(alike[: -len(patches["held out"])].argmax())
    result["closest"] = train[int(where[closest])].id
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        with atomic_path(args.out / "copying.json") as temporary:
            temporary.write_text(text + "\n")
    print(text)
    return 0
