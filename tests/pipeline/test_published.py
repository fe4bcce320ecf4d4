"""MMAudio's weights under the names and in the formats in which people have them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mfmjt.checkpoints import read_content
from mfmjt.errors import InputError
from mfmjt.families import PRETRAINED, mmaudio
from mfmjt.model import load_mmaudio
from mfmjt.pipeline import Pipeline
from tests.pipeline.conftest import one
from tests.support.published import SIZES, network_state

COMFY = {
    "weights/mmaudio_small_16k.pth": "mmaudio_small_16k_fp16.safetensors",
    "ext_weights/v1-16.pth": "mmaudio_vae_16k_fp16.safetensors",
    "ext_weights/best_netG.pt": "mmaudio_vocoder_bigvgan_best_netG_fp16.safetensors",
    "ext_weights/synchformer_state_dict.pth": "mmaudio_synchformer_fp16.safetensors",
    "ext_weights/open_clip_pytorch_model.bin": "apple_DFN5B-CLIP-ViT-H-14-384_fp16.safetensors",
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sized = partial(mmaudio.open_published, check="name", sizes=mmaudio.Sizes(**SIZES))
    monkeypatch.setattr(mmaudio, "open_published", sized)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def flat(path: Path) -> dict[str, torch.Tensor]:
    content = read_content(path)
    # Not the file's own pages: some tests write it anew.
    return {name: value.clone() for name, value in content.get("generator", content).items()}


@pytest.fixture
def comfy(folder: Path, tmp_path: Path) -> Path:
    """The folder that ComfyUI's nodes read: half precision, its own names, safetensors."""
    there = tmp_path / "models" / "mmaudio"
    there.mkdir(parents=True)
    for name, new in COMFY.items():
        save_file({k: v.half() for k, v in flat(folder / name).items()}, there / new)
    shutil.copy(folder / "ext_weights" / "merges.txt", there)
    return there


def sound(model: Path) -> torch.Tensor:
    pipe = Pipeline.from_pretrained(model, "cpu")
    return one(pipe(prompt="rain", duration=0.5, steps=1)).waveform


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    pipe = Pipeline.from_mmaudio(folder, device="cpu", check="name", **SIZES)
    return one(pipe(prompt="rain", duration=0.5, steps=1)).waveform


def test_a_folder_of_comfyui(comfy: Path, expected: torch.Tensor) -> None:
    inner = comfy / "nvidia" / "bigvgan"  # where its nodes put NVIDIA's vocoder
    inner.mkdir(parents=True)
    vocoder = COMFY["ext_weights/best_netG.pt"]
    (comfy / vocoder).rename(inner / vocoder)
    by_folder = sound(comfy)
    assert torch.equal(by_folder, sound(comfy / COMFY["weights/mmaudio_small_16k.pth"]))
    # Weights are rounded to half precision there.
    assert float((by_folder - expected).square().mean() / expected.square().mean()) < 0.05


def test_either_published_form_of_clip(copy: Path, expected: torch.Tensor) -> None:
    old = copy / "ext_weights" / "open_clip_pytorch_model.bin"
    save_file(flat(old), copy / "ext_weights" / "open_clip_model.safetensors")
    old.unlink()
    assert torch.equal(sound(copy), expected)


FORMS: dict[str, Callable[[dict, Path], object]] = {
    "mine_fp32.safetensors": save_file,
    "mine.ckpt": lambda state, path: torch.save({"state_dict": state, "epoch": 1}, path),
    "mmaudio_small_16k.safetensors": save_file,
}


@pytest.mark.parametrize("name", FORMS)
def test_the_file_of_a_network_of_any_name_is_a_model(
    copy: Path, name: str, expected: torch.Tensor
) -> None:
    old = copy / "weights" / "mmaudio_small_16k.pth"
    FORMS[name](flat(old), old.with_name(name))
    old.unlink()
    assert torch.equal(sound(copy / "weights" / name), expected)


def test_the_file_that_is_given_is_taken_and_no_other_of_its_name(copy: Path) -> None:
    old = copy / "weights" / "mmaudio_small_16k.pth"
    state = flat(old)
    given = old.with_name("mmaudio_small_16k_fp32.safetensors")
    save_file(state | {"latent_mean": state["latent_mean"] + 1}, given)
    for path, mean in ((old, state["latent_mean"]), (given, state["latent_mean"] + 1)):
        assert torch.equal(Pipeline.from_pretrained(path, "cpu").network.latent_mean, mean)


def test_a_network_of_ours_of_any_name_is_a_model(copy: Path) -> None:
    old = copy / "weights" / "mmaudio_small_16k.pth"
    load_mmaudio(old).save(copy / "finetuned.safetensors")
    old.unlink()
    # It goes as far as the codec: these small files are not the published ones.
    with pytest.raises(InputError, match=r"v1-16\.pth has .* 655M"):
        Pipeline.from_pretrained(copy / "finetuned.safetensors")
    for part in ("network", "codec", "encoders"):
        shutil.copy(PRETRAINED / "nano" / f"{part}.safetensors", copy / "weights")
    network = (copy / "weights" / "network.safetensors").rename(copy / "weights" / "other.st")
    assert Pipeline.from_pretrained(network, "cpu").network.config.name == "nano"


def test_relatives_of_mmaudios_networks_are_models(copy: Path) -> None:
    old = copy / "weights" / "mmaudio_small_16k.pth"
    state = flat(old)
    selva = old.rename(old.with_name("generator_small_16k_sup_5.pth"))
    made = one(Pipeline.from_pretrained(selva, "cpu")(prompt="a", duration=0.1, steps=1))
    assert [note for note in made.notes if "SelVA's generator" in note]
    second = {k.replace("t_embed", "s_embed"): v for k, v in state.items() if "t_embed" in k}
    torch.save(state | second, old.with_name("foleydash.pth"))
    pipe = Pipeline.from_pretrained(old.with_name("foleydash.pth"), "cpu")
    assert one(pipe(prompt="a", duration=0.1)).waveform.any()
    assert (pipe.sampling.steps, pipe.sampling.guidance) == (1, 1.0)


def test_averaged_weights_are_noted(copy: Path) -> None:
    path = copy / "weights" / "mmaudio_small_16k.pth"
    state = flat(path)
    torch.save({"ema": state, "model": {k: v + 1 for k, v in state.items()}}, path)
    pipe = Pipeline.from_pretrained(copy, "cpu")
    (note,) = one(pipe(prompt="a", duration=0.1, steps=1, guidance=1.0)).notes
    assert note.endswith("under ema, model: ema was taken.")


def test_another_part_than_a_network_is_told_what_it_is(comfy: Path) -> None:
    for part, kind in (
        ("ext_weights/v1-16.pth", "the mel autoencoder of MMAudio"),
        ("ext_weights/synchformer_state_dict.pth", "Synchformer"),
        ("ext_weights/open_clip_pytorch_model.bin", "a CLIP of open_clip"),
    ):
        with pytest.raises(InputError, match=rf"{COMFY[part]}.* looks like {kind}.*Wanted is"):
            Pipeline.from_pretrained(comfy / COMFY[part])


def test_a_wrong_clip_is_one_short_line_with_the_file_that_is_wanted(copy: Path) -> None:
    path = copy / "ext_weights" / "open_clip_pytorch_model.bin"
    wrong = {f"text_model.encoder.layers.{i}.mlp.fc1.weight": torch.ones(1) for i in range(900)}
    torch.save(wrong, path)
    with pytest.raises(InputError) as caught:
        Pipeline.from_pretrained(copy)
    message = str(caught.value)
    assert len(message) <= 600
    assert message.count(str(path)) == 1
    assert "transformers" in message
    assert message.endswith("apple/DFN5B-CLIP-ViT-H-14-384 holds.")


def test_a_folder_without_a_network_names_what_may_be_one(copy: Path) -> None:
    (copy / "weights" / "mmaudio_small_16k.pth").unlink()
    for i in range(9):
        (copy / f"step{i}.ckpt").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds no network.*step0\.ckpt.*and 4 more"):
        Pipeline.from_pretrained(copy)


def test_one_part_of_several_is_told(copy: Path) -> None:
    state = network_state("small_16k")
    name = "model-00002-of-00002.safetensors"
    save_file({k: v for k, v in state.items() if k.startswith("joint")}, copy / name)
    with pytest.raises(InputError, match=r"one part of several: give the \.index\.json"):
        Pipeline.from_pretrained(copy / name)
