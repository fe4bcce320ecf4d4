from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mfmjt.convert import (
    from_foleydash,
    from_meanaudio,
    from_mmaudio,
    to_mmaudio,
    to_published,
)
from mfmjt.errors import InputError, RunError
from mfmjt.model import MFMJT, load_meanaudio, load_mmaudio
from tests.support import commands
from tests.support.commands import refused
from tests.support.weights import read

run = partial(commands.run, "convert")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return read("model", "net_tiny")[0]


@pytest.fixture
def published(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save(state, tmp_path / "published.pth")
    return tmp_path / "published.pth"


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_there_and_back_is_the_same_bit_for_bit(
    tmp_path: Path, published: Path, state: dict[str, torch.Tensor], suffix: str
) -> None:
    there = from_mmaudio(published, tmp_path / "ours.safetensors")
    assert there.notes == ()
    ours = MFMJT.load(there.path)
    for name, value in load_mmaudio(state).state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    back = to_mmaudio(there.path, tmp_path / f"back{suffix}")
    found = (
        load_file(back.path)
        if suffix == ".safetensors"
        else torch.load(back.path, weights_only=True)
    )
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert back.parameters == sum(value.numel() for value in state.values())
    (note,) = back.notes
    lost = there.parameters - back.parameters
    assert f"t - r ({lost} parameters)" in note


@pytest.mark.parametrize("name", ["meanaudio_tiny", "fluxaudio_tiny", "resonate_tiny"])
def test_meanaudios_family_goes_there_and_back(tmp_path: Path, name: str) -> None:
    state, _ = read("model", name)
    torch.save({f"ema_model.{k}": v for k, v in state.items()}, tmp_path / "published.pth")
    there = from_meanaudio(tmp_path / "published.pth", tmp_path / "ours.safetensors")
    back = to_published(there.path, tmp_path / "back.pth")
    found = torch.load(back.path, weights_only=True)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    left_out = [note for note in back.notes if "no place in MeanAudio's layout" in note]
    assert len(left_out) == len(back.notes) == (name != "meanaudio_tiny")
    with pytest.raises(InputError, match=r"no place in MMAudio's layout: .*MeanAudio's"):
        to_mmaudio(there.path, tmp_path / "other.pth")
    wide = load_meanaudio(state, video="gated", video_dim=6, sync_dim=5)
    wide.save(tmp_path / "wide.safetensors")
    with pytest.raises(InputError, match="no place in MMAudio's layout"):
        to_published(tmp_path / "wide.safetensors", tmp_path / "other.pth")
    assert not (tmp_path / "other.pth").exists()


def test_foleydash_goes_to_ours_and_on_to_mmaudios(tmp_path: Path) -> None:
    state, _ = read("model", "foleydash_tiny")
    torch.save(state, tmp_path / "published.pth")
    there = from_foleydash(tmp_path / "published.pth", tmp_path / "ours.safetensors")
    notes = to_published(there.path, tmp_path / "back.pth").notes
    assert "MMAudio's layout" in notes[0]
    assert "It was trained" in notes[1]


def test_what_training_has_added_is_said_to_be_lost(tmp_path: Path, published: Path) -> None:
    path = from_mmaudio(published, tmp_path / "ours.safetensors").path
    net = MFMJT.load(path)
    with torch.no_grad():
        net.r_embed.mlp[2].weight[0, 0] = 0.1
    net.save(path)
    _, note = to_mmaudio(path, tmp_path / "back.pth").notes
    assert "the result is not this network" in note


def test_storage_in_half_the_bytes(tmp_path: Path, published: Path) -> None:
    whole = from_mmaudio(published, tmp_path / "whole.safetensors").path
    half = from_mmaudio(published, tmp_path / "half.safetensors", dtype=torch.bfloat16).path
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    back = to_mmaudio(whole, tmp_path / "back.pth", dtype=torch.bfloat16).path
    first, second = MFMJT.load(half).state_dict(), load_mmaudio(back).state_dict()
    for name in first:
        if not name.startswith("r_embed."):
            assert torch.equal(first[name], second[name]), name


def test_every_wrong_shape_is_named(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    wrong = dict(state) | {"latent_mean": torch.zeros(1, 1, 7), "more": torch.zeros(1)}
    del wrong["t_embed.mlp.0.bias"]
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(InputError) as caught:
        from_mmaudio(tmp_path / "wrong.safetensors", tmp_path / "out.safetensors")
    for told in ("missing t_embed.mlp.0.bias", "unexpected more", "latent_std has shape"):
        assert told in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["wrong.safetensors"]


def test_a_configuration_that_is_named_must_fit(tmp_path: Path, published: Path) -> None:
    with pytest.raises(InputError) as caught:
        from_mmaudio(published, tmp_path / "out.safetensors", "small_16k")
    message = str(caught.value)
    assert "the small_16k network" in message
    assert re.search(r"[\w.]+ has shape \([\d, ]+\), not \([\d, ]+\); ", message)
    assert re.search(r" and \d+ more\. Give the file as its publisher keeps it", message)
    assert len(message) <= 600
    with pytest.raises(InputError, match="No configuration 'tiny'"):
        from_mmaudio(published, tmp_path / "out.safetensors", "tiny")
    ours = from_mmaudio(published, tmp_path / "ours.safetensors").path
    with pytest.raises(InputError, match="is a custom, not a small_16k"):
        to_mmaudio(ours, tmp_path / "out.pth", "small_16k")


def test_nothing_is_run_and_nothing_is_left_behind(tmp_path: Path, published: Path) -> None:
    class Surprise:
        def __reduce__(self):
            return Path.mkdir, (tmp_path / "ran",)

    torch.save({"weights": Surprise()}, tmp_path / "evil.pth")
    (tmp_path / "garbage.pth").write_bytes(b"nothing")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for source in ("evil.pth", "garbage.pth", "none.pth"):
        with pytest.raises(InputError, match=source):
            from_mmaudio(tmp_path / source, tmp_path / "out.safetensors")
        with pytest.raises(InputError, match=source):
            to_mmaudio(tmp_path / source, tmp_path / "out.pth")
    for to, kind, says in (
        ("out.pth", InputError, "does not end in"),
        ("out", InputError, "does not end in"),
        ("no/where.safetensors", RunError, "Cannot write"),
    ):
        with pytest.raises(kind, match=says):
            from_mmaudio(published, tmp_path / to)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        from_mmaudio(published, tmp_path / "folder.safetensors")
    (tmp_path / "folder.safetensors").rmdir()
    with pytest.raises(InputError, match="input itself"):
        to_mmaudio(published, published)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_interrupt_while_writing_leaves_the_old_file(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = from_mmaudio(published, tmp_path / "ours.safetensors").path
    (tmp_path / "back.pth").write_bytes(b"an earlier result")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_mmaudio(ours, tmp_path / "back.pth")
    assert (tmp_path / "back.pth").read_bytes() == b"an earlier result"
    assert len(list(tmp_path.iterdir())) == 3


def test_on_the_command_line(tmp_path: Path, published: Path) -> None:
    result = run("mmaudio", published, "--to", tmp_path / "ours.safetensors")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"Wrote \S+ours\.safetensors: custom, \d+\.\d M parameters\.\n",
                        result.stdout)  # fmt: skip
    result = run("mfmjt", tmp_path / "ours.safetensors", "--to", tmp_path / "back.pth")
    assert result.exit_code == 0, result.output
    assert "Wrote" in result.stdout
    assert "left out" in result.stderr
    torch.save(read("model", "meanaudio_tiny")[0], tmp_path / "mean.pth")
    result = run("meanaudio", tmp_path / "mean.pth", "--to", tmp_path / "mean.safetensors")
    assert result.exit_code == 0, result.output
    result = run("mfmjt", tmp_path / "mean.safetensors", "--to", tmp_path / "mean_back.pth")
    assert (result.exit_code, result.stderr) == (0, "")
    refused(run("foleydash", tmp_path / "mean.pth", "--to", tmp_path / "a.safetensors"), 2,
            "a network of MeanAudio's")  # fmt: skip
    refused(run("other", published, "--to", tmp_path / "a.safetensors"), 2, "no layout 'other'")
    refused(run("mmaudio", published, "--to", tmp_path / "a.txt"), 2, "does not end in")
    refused(run("mmaudio", published), 2, "--to")
    refused(run("mmaudio", published, "--to", tmp_path / "a.safetensors", "--dtype", "int4"), 2,
            "int4")  # fmt: skip
    refused(run("mmaudio", published, "--to", tmp_path / "no/a.safetensors"), 1, "Cannot write")
    told = re.sub(r"\s+", " ", run("--help").stdout)
    assert "mfmjt convert mmaudio mmaudio_small_16k.pth --to small_16k.safetensors" in told
