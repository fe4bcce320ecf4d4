"""docs/finetune.md at miniature scale: from clips of one's own to sound for another one."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from mfmjt import cli
from mfmjt.data import foley
from mfmjt.data.preview import write_clip
from mfmjt.model import MFMJT, to_mmaudio_state_dict
from tests.support.bundles import write_ends
from tests.support.peers import load_peft
from tests.train.conftest import TINY

SECONDS = 0.96


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder with untrained codec and encoders, and a checkpoint in MMAudio's layout."""
    folder = tmp_path / "model"
    folder.mkdir()
    torch.manual_seed(0)
    write_ends(folder)
    net = MFMJT.from_config("nano", **TINY)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn_like(p)
        net.latent_std.fill_(1)
    torch.save(to_mmaudio_state_dict(net), folder / "mmaudio.pth")
    return folder


@pytest.mark.parametrize("lora", [(), ("lora.rank=2", "lora.alpha=4")], ids=["full", "lora"])
def test_from_own_clips_to_sound(model, tmp_path, lora):
    if lora:
        load_peft()
    clips = [foley.clip(i, "train", duration=1.0) for i in range(3)]
    with (tmp_path / "clips.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "caption"))
        for i, clip in enumerate(clips):
            write_clip(tmp_path / f"{i}.mp4", clip.frames, clip.audio)
            writer.writerow((f"{i}.mp4", clip.caption))

    store, out = tmp_path / "features", tmp_path / "network"
    run("extract", tmp_path / "clips.csv", "--out", store, "--model", model, "--seconds", SECONDS)
    told = run(
        "train", "network", "finetune", f"init_from={model / 'mmaudio.pth'}", f"store={store}",
        f"out={out}", "device=cpu", "dtype=float32", "threads=1", "steps=2", "batch=2", "ratio=0.5",
        "warmup=1", "log_every=1", "tensorboard=false", *lora,
    )  # fmt: skip
    assert "Trained 2 steps" in told
    assert (out / "adapter.safetensors").exists() == bool(lora)

    shutil.copy(out / "network.safetensors", model)
    run(
        "generate", tmp_path / "0.mp4", "--model", model, "--prompt", clips[0].caption,
        "--output", tmp_path / "0.wav",
    )  # fmt: skip
    sound, rate = soundfile.read(tmp_path / "0.wav")
    assert rate == foley.SAMPLE_RATE
    assert np.isfinite(sound).all()
    assert np.abs(sound).max() > 0
    run("convert", "mfmjt", out / "network.safetensors", "--to", tmp_path / "back.pth")
    if lora:
        adapter = out / "adapter.safetensors"
        run("convert", "mmaudio", model / "mmaudio.pth", "--to", tmp_path / "merged.safetensors",
            "--adapter", adapter)  # fmt: skip
        assert MFMJT.load(tmp_path / "merged.safetensors").config.hidden_dim == TINY["hidden_dim"]
