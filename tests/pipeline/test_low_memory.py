"""Parts whose weights are in memory one after the other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mfmjt.errors import InputError, RunError
from mfmjt.meanflow import Sampling
from mfmjt.media import Video, read_video
from mfmjt.pipeline import Pipeline, Request, generate_together
from tests.pipeline.conftest import one
from tests.support.bundles import write_model
from tests.support.published import SIZES


@pytest.fixture(scope="module")
def low(model_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(model_folder, device="cpu", low_memory=True)


@pytest.fixture(scope="module")
def held(pipe: Pipeline, clip: Path) -> Video:
    rates = pipe.encoders.video_fps, pipe.encoders.sync_fps
    return read_video(clip, rates, pipe.encoders.frame_size)


def in_memory(pipe: Pipeline) -> list[str]:
    """The parts of which any tensor has values."""
    parts = {"network": pipe.network, "codec": pipe.codec, "encoders": pipe.encoders}
    return [
        name
        for name, part in parts.items()
        if not all(value.is_meta for value in (*part.parameters(), *part.buffers()))
    ]


def test_one_part_after_the_other(low: Pipeline, clip: Path) -> None:
    seen: list[tuple[str, list[str]]] = []
    assert in_memory(low) == []
    low(clip, "a bell", steps=2, progress=lambda stage, _: seen.append((stage, in_memory(low))))
    assert in_memory(low) == []
    assert all(len(parts) <= 1 for _, parts in seen)
    # What a stage ends with is what it needed.
    needed = {stage: parts for stage, parts in seen if stage != "read"}
    assert needed == {"encode": ["encoders"], "generate": ["network"], "decode": ["codec"]}


def test_sounds_are_the_same(
    low: Pipeline, pipe: Pipeline, held: Video, clip: Path, tmp_path: Path
) -> None:
    requests = [
        Request(held, "a bell", count=2),
        Request(held, modes=("cfg", "none"), guidance=2.0),
        Request(clip, "a bell", seed=3, cache=tmp_path),
        Request(clip, "a bell", seed=3, cache=tmp_path),
        Request(prompt="two windows and a bit", duration=11.0, negative_prompt="rain"),
    ]
    for made, expected in zip(*(generate_together(p, requests) for p in (low, pipe)), strict=True):
        assert isinstance(made, list)
        assert isinstance(expected, list)
        for sound, other in zip(made, expected, strict=True):
            assert torch.equal(sound.waveform, other.waveform)
    assert in_memory(low) == []


def test_an_error_frees_the_memory_too(low: Pipeline, held: Video) -> None:
    def stop(stage: str, fraction: float) -> None:
        if stage == "generate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        low(held, progress=stop)
    assert in_memory(low) == []


def test_mmaudio(folder: Path, clip: Path) -> None:
    pipes = [
        Pipeline.from_mmaudio(folder, device="cpu", check="name", **SIZES, low_memory=low)
        for low in (True, False)
    ]
    assert pipes[0].sampling == Sampling(25, 4.5, "cfg", instantaneous=True)
    made = [one(pipe(clip, "a ball", steps=2)).waveform for pipe in pipes]
    assert torch.equal(*made)
    assert in_memory(pipes[0]) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_another_dtype(model_folder: Path, dtype: torch.dtype) -> None:
    pipes = [
        Pipeline.from_pretrained(model_folder, "cpu", dtype, low_memory=low)
        for low in (True, False)
    ]
    made = [one(pipe(prompt="a bell", duration=0.5)).waveform for pipe in pipes]
    assert torch.equal(*made)
    assert pipes[0].notes == pipes[1].notes
    assert {pipe.network.dtype for pipe in pipes} == {dtype}


def test_parts_that_came_without_files(pipe: Pipeline, model_folder: Path) -> None:
    own = Pipeline.from_pretrained(model_folder, device="cpu")
    given = Pipeline(own.network, own.codec, own.encoders, "cpu", low_memory=True)
    for _ in range(2):
        made = one(given(prompt="a bell", duration=0.5))
        assert torch.equal(made.waveform, one(pipe(prompt="a bell", duration=0.5)).waveform)
    assert len(in_memory(given)) == 3  # whoever made them still has them


def test_files_that_go_or_change(model_folder: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(model_folder, tmp_path / "mine")
    pipe = Pipeline.from_pretrained(mine, device="cpu", low_memory=True)
    path = mine / "codec.safetensors"
    kept = path.read_bytes()
    path.unlink()
    with pytest.raises(InputError, match=r"codec\.safetensors"):
        pipe(prompt="a bell", duration=0.5)
    path.write_bytes(kept)
    other = write_model(tmp_path / "other", depth=4)
    shutil.copy(other / "network.safetensors", mine)
    with pytest.raises(RunError, match="changed while"):
        pipe(prompt="a bell", duration=0.5)


def test_not_with_compile(model_folder: Path) -> None:
    with pytest.raises(InputError, match=r"compile keeps.*low_memory frees.*Choose one"):
        Pipeline.from_pretrained(model_folder, device="cpu", compile=True, low_memory=True)
