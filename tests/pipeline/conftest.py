from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mfmjt.encoders import CLIP, Synchformer
from mfmjt.pipeline import Audio, Pipeline
from tests.support.published import (
    CLIP_CONFIG,
    SYNC_CONFIG,
    VAES,
    VOCODERS,
    network_state,
    vae_shapes,
    vocoder_shapes,
)
from tests.support.weights import draw_all


@pytest.fixture(scope="module")
def pipe(model_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(model_folder, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, merges: Path) -> Path:
    """The files as MMAudio lays them out, in `weights` and `ext_weights`."""
    root = tmp_path_factory.mktemp("mmaudio")
    weights, beside = root / "weights", root / "ext_weights"
    weights.mkdir()
    beside.mkdir()
    torch.save(network_state("small_16k"), weights / "mmaudio_small_16k.pth")
    torch.save(draw_all(vae_shapes(VAES["16k"])), beside / "v1-16.pth")
    vocoder = draw_all(vocoder_shapes(VOCODERS["16k"]))
    torch.save({"generator": vocoder}, beside / "best_netG.pt")
    torch.manual_seed(0)
    torch.save(CLIP(CLIP_CONFIG).state_dict(), beside / "open_clip_pytorch_model.bin")
    sync = Synchformer(SYNC_CONFIG).state_dict()
    sync = {f"vfeat_extractor.{name}": value for name, value in sync.items()}
    torch.save({**sync, "afeat_extractor.x": torch.zeros(1)}, beside / "synchformer_state_dict.pth")
    shutil.copy(merges, beside / "merges.txt")
    return root


def one(made: Audio | list[Audio]) -> Audio:
    """The sound of a pipeline that was asked for one."""
    assert isinstance(made, Audio)
    return made
