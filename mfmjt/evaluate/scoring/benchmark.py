"""What av-benchmark does in its own way: names, which clips enter which number, feature caches."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mfmjt.checkpoints import read_content
from mfmjt.errors import InputError

__all__ = ["benchmark_name", "benchmark_pairs", "cache_files", "cached_features", "cached_names"]

CACHES = {
    ("vggish", "embedding"): ("vggish_features.pth", ""),
    ("panns", "embedding"): ("pann_features.pth", "2048"),
    ("panns", "logits"): ("pann_features.pth", "logits"),
    ("passt", "embedding"): ("passt_features_embed.pth", ""),
    ("passt", "logits"): ("passt_logits.pth", ""),
    ("imagebind", "embedding"): ("imagebind_audio.pth", ""),
    ("imagebind", "video"): ("imagebind_video.pth", ""),
    ("synchformer", "audio"): ("synchformer_audio.pth", ""),
    ("synchformer", "video"): ("synchformer_video.pth", ""),
    ("clap", "embedding"): ("clap_laion_audio.pth", ""),
    ("clap", "text"): ("clap_laion_text.pth", ""),
}
"""Network and output -> file of the cache, and key within its entries."""


def benchmark_name(name: str) -> str:
    """Return the part of a generated sound's name that a reference is called.

    The tool cuts by length alone: `000000014_<11>_<6>-0` (30 characters) and `<11>_<6>-0` (20)
    become `<11>_<6>`, and `Y<11>_<6>_0` (21) does. Any other name of these lengths is cut as well.
    """
    return {30: name[10:28], 20: name[:18], 21: name[1:19]}.get(len(name), name)


def benchmark_pairs(
    network: str,
    purpose: str,
    made: Iterable[str],
    real: Iterable[str],
    pairs: list[tuple[str, str]],
) -> tuple[list[str], list[str]]:
    """Return the clips of both sides that enter a number.

    FD of VGGish and PANNs takes all clips of each side, IS of PANNs as well; KL of PANNs those
    whose uncut names are on both sides; everything else the pairs.

    Args:
        network: Whose features.
        purpose: `fd`, `is`, `kl`, or another metric.
        made: All generated clips, in order.
        real: All real clips, in order.
        pairs: Names of both that belong together.
    """
    if (purpose, network) in (("fd", "vggish"), ("fd", "panns"), ("is", "panns")):
        return list(made), list(real)
    if (purpose, network) == ("kl", "panns"):
        there = set(real)
        both = [name for name in made if name in there]
        return both, both
    return [name for name, _ in pairs], [name for _, name in pairs]


def cache_files(source: Path, network: str = "") -> list[Path]:
    """Return the cache files of features of sounds, of all networks or of one.

    They are in the folder itself or in its folder `cache`, as the tool writes them.
    """
    for folder in (source, source / "cache"):
        if any((folder / file).is_file() for file, _ in CACHES.values()):
            named = {
                folder / file
                for (name, output), (file, _) in CACHES.items()
                if network in ("", name) and output not in ("video", "text")
            }
            return sorted(path for path in named if path.is_file())
    return []


def cached_names(source: Path) -> list[str]:
    """Return the clips that the cache of a folder holds, in its order; none without a cache."""
    files = cache_files(source)
    return [str(name) for name in read_content(files[0])] if files else []


def cached_features(source: Path, network: str, output: str) -> dict[str, np.ndarray] | None:
    """Return features by name from a cache of av-benchmark, read as tensors alone; None without.

    Raises:
        InputError: The file is no such cache.
    """
    if (network, output) not in CACHES:
        return None
    file, key = CACHES[network, output]
    path = next((f for f in (source / file, source / "cache" / file) if f.is_file()), None)
    if path is None:
        return None
    content: dict[Any, Any] = read_content(path)
    try:
        return {
            str(name): np.asarray((value[key] if key else value).float())
            for name, value in content.items()
        }
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no feature cache of av-benchmark: a tensor for each name is needed. "
            "Delete it, or give the folder of the sounds alone."
        ) from error
