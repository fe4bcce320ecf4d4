from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mfmjt.errors import InputError
from mfmjt.evaluate import score
from mfmjt.evaluate import statistics as s

COUNT = 24
Cache = dict[str, dict[str, Tensor]]


def names(count: int = COUNT) -> list[str]:
    return [f"clip{i:02d}" for i in range(count)]


def filled(folder: Path, seed: int, clips: list[str]) -> dict[str, Cache]:
    """Write feature caches as av-benchmark writes them, in small widths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Cache:
        return {name: torch.randn(shape, generator=generator) for name in clips}

    panns, logits = draw(6), draw(9)
    caches = {
        "vggish_features": draw(3, 4),
        "pann_features": {n: {"2048": panns[n], "logits": logits[n]} for n in clips},
        "passt_features_embed": draw(5),
        "passt_logits": draw(9),
        "imagebind_audio": draw(7),
        "clap_laion_audio": draw(8),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in caches.items():
        torch.save(content, folder / f"{name}.pth")
    return caches  # type: ignore[return-value]


def rows(cache: Cache, clips: list[str]) -> np.ndarray:
    return torch.stack([cache[name] for name in clips]).numpy()


def test_feature_caches_give_the_tool_s_numbers_with_its_sets_of_clips(tmp_path: Path) -> None:
    # Three generated clips have no reference, two references no generated clip, and one name is
    # cut: its PANNs logits have no partner then, since those go by the whole name.
    cut = "abcdefghijk_000007-0"
    made_names = [*names(), "only_made_1", "only_made_2", cut]
    real_names = [*names(), "only_real_1", cut[:18]]
    made = filled(tmp_path / "made" / "cache", 1, sorted(made_names))
    real = filled(tmp_path / "real", 2, sorted(real_names))
    result = score(tmp_path / "made", tmp_path / "real", protocol="av-benchmark")
    found = result.figures
    pairs = sorted([*((n, n) for n in names()), (cut, cut[:18])])
    ours, theirs = ([pair[i] for pair in pairs] for i in range(2))

    def whole(caches: dict[str, Cache], key: str) -> np.ndarray:
        return torch.stack([value[key] for value in caches["pann_features"].values()]).numpy()

    def pieces(caches: dict[str, Cache]) -> np.ndarray:
        return torch.cat(list(caches["vggish_features"].values())).numpy()

    assert found["fd_vggish"] == s.frechet(pieces(made), pieces(real))
    assert found["fd_panns"] == s.frechet(whole(made, "2048"), whole(real, "2048"))
    embed = "passt_features_embed"
    assert found["fd_passt"] == s.frechet(rows(made[embed], ours), rows(real[embed], theirs))
    assert found["is_panns"] == s.inception_score(whole(made, "logits"))[0]
    logits = rows(made["passt_logits"], ours), rows(real["passt_logits"], theirs)
    assert found["kl_passt"] == s.kl_softmax(*logits)
    assert (found["is_passt"], found["is_passt_std"]) == s.inception_score(logits[0])
    both = [
        np.stack([caches["pann_features"][name]["logits"] for name in names()])
        for caches in (made, real)
    ]
    assert found["kl_panns"] == s.kl_softmax(*both)
    assert result.clips == COUNT + 1
    assert "cache (passt_features_embed.pth" not in " ".join(result.notes)
    assert sum("of which weights and files they are" in note for note in result.notes) == 2


def test_a_cache_of_something_else_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "made", 1, names())
    filled(tmp_path / "real", 2, names())
    torch.save(dict.fromkeys(names(), 3), tmp_path / "real" / "vggish_features.pth")
    with pytest.raises(InputError, match="no feature cache of av-benchmark"):
        score(tmp_path / "made", tmp_path / "real", metrics=["fd_vggish"], protocol="av-benchmark")
    torch.save(filled, tmp_path / "real" / "vggish_features.pth")
    with pytest.raises(InputError, match="save the weights alone"):
        score(tmp_path / "made", tmp_path / "real", metrics=["fd_vggish"], protocol="av-benchmark")


def test_the_default_protocol_reads_no_cache(tmp_path: Path) -> None:
    filled(tmp_path / "made", 1, names())
    filled(tmp_path / "real", 2, names())
    with pytest.raises(InputError, match="holds no sounds"):
        score(tmp_path / "made", tmp_path / "real")
