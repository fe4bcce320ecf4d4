"""From a name, a folder, a file or a repository of the hub to a bundle."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from mfmjt import families
from mfmjt.codec import NanoCodec
from mfmjt.encoders import NanoEncoders
from mfmjt.errors import InputError
from mfmjt.families import PRETRAINED, Bundle, mmaudio, open_bundle
from mfmjt.kernels import precision
from mfmjt.meanflow import Sampling
from mfmjt.model import MFMJT
from mfmjt.pipeline import Pipeline

NANO = PRETRAINED / "nano"
PARTS = ("network", "codec", "encoders")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "mine"
    path.mkdir()
    for part in PARTS:
        shutil.copy(NANO / f"{part}.safetensors", path)
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which is not asked."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture
def server(hub: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that knows no repository."""

    class Unknown(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Unknown) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{found.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
        yield
        found.shutdown()


def test_a_name_and_a_folder_are_the_same_model(folder: Path) -> None:
    named, copied = open_bundle("nano"), open_bundle(folder)
    assert named.identity() == copied.identity()
    assert named.sampling == Sampling(1, 1.5, "cfg_scaled")
    for name, value in named.network.state_dict().items():
        assert torch.equal(copied.network.state_dict()[name], value)


def test_without_a_network_only_its_sizes_are_there(folder: Path) -> None:
    (folder / "network.safetensors").unlink()
    bundle = open_bundle(folder, network=False).to("cpu")
    assert next(bundle.network.parameters()).is_meta
    assert bundle.lengths(8.0) == open_bundle("nano").lengths(8.0) == (250, 64, 200)


def test_another_network_for_the_same_codec_and_encoders(folder: Path, tmp_path: Path) -> None:
    other = MFMJT.load(folder / "network.safetensors")
    with torch.no_grad():
        other.latent_mean += 1
    other.save(tmp_path / "other.safetensors")
    bundle = open_bundle("nano", tmp_path / "other.safetensors")
    assert torch.equal(bundle.network.latent_mean, other.latent_mean)


def test_the_same_conditions_give_the_same_latents_in_any_batch() -> None:
    bundle = open_bundle("nano").to("cpu")
    text = bundle.encoders.encode_text(["rain", "a drum"])
    noise = torch.randn(2, 50, bundle.codec.latent_dim)
    sampling = Sampling(steps=2)
    with torch.no_grad():
        both = bundle.conditions({"text": text}, 50, sampling)
        made = bundle.latents(noise, both, sampling)
        one = bundle.conditions({"text": text[1:]}, 50, sampling)
        alone = bundle.latents(noise[1:], one, sampling)
        waveform = bundle.decode(made)
    torch.testing.assert_close(alone, made[1:])
    assert waveform.shape == (2, 50 * bundle.codec.hop)


def test_a_family_from_outside_is_one_more_in_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mine:
        """A network in a file called mine.safetensors, on nano's codec and encoders."""

        def holds(self, folder: Path, network: Path | bool) -> bool:
            return (folder / "mine.safetensors").exists()

        def open_folder(
            self,
            folder: Path,
            network: Path | bool,
            codec: str | None,
            dtype: torch.dtype,
            low_memory: bool,
        ) -> Bundle:
            return Bundle(
                MFMJT.load(folder / "mine.safetensors"),
                NanoCodec.load(NANO / "codec.safetensors"),
                NanoEncoders.load(NANO / "encoders.safetensors"),
                Sampling(steps=3, guidance=1.0, mode="none"),
            )

    shutil.copy(NANO / "network.safetensors", tmp_path / "mine.safetensors")
    monkeypatch.setattr(families.open, "FAMILIES", [*families.FAMILIES, Mine()])
    pipe = Pipeline.from_pretrained(tmp_path, device="cpu")
    made = pipe(prompt="rain", duration=0.5)
    assert pipe.sampling.steps == 3
    same = Pipeline.from_pretrained("nano", device="cpu")(
        prompt="rain", duration=0.5, steps=3, guidance=1.0, mode="none"
    )
    assert torch.equal(made.waveform, same.waveform)


def test_a_repository_of_the_hub_is_a_folder(hub: Path) -> None:
    known = hub / "models--somebody--sounds"
    revision = "0" * 40
    (known / "refs").mkdir(parents=True)
    (known / "refs" / "main").write_text(revision)
    shutil.copytree(NANO, known / "snapshots" / revision)
    assert open_bundle("somebody/sounds").identity() == open_bundle("nano").identity()


def test_a_repository_that_is_not_there_is_told_in_one_line(server: None) -> None:
    with pytest.raises(InputError, match=r"hub has no repository of that name.* Check the name"):
        open_bundle("nobody/nothing")


def test_without_a_network_connection_it_says_so(hub: Path) -> None:
    with pytest.raises(InputError, match=r"hub cannot be reached.* or give a folder\.$") as caught:
        open_bundle("somebody/sounds")
    assert "\n" not in str(caught.value)


def test_the_hub_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'mfmjt\[hub\]'"):
        open_bundle("somebody/sounds")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_is_named(folder: Path, part: str) -> None:
    (folder / f"{part}.safetensors").unlink()
    with pytest.raises(InputError, match=part):
        open_bundle(folder)


def test_a_name_that_is_nothing_lists_what_there_is() -> None:
    with pytest.raises(InputError, match=r"neither a file, nor a folder.*\(foley, nano\)"):
        open_bundle("nan0")


def test_a_folder_of_neither_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no network"):
        open_bundle(tmp_path)
    with pytest.raises(InputError, match=r"neither codec\.safetensors nor"):
        open_bundle(tmp_path, network=False)
    with pytest.raises(InputError, match=r"best_netG\.pt"):
        open_bundle(tmp_path, network=False, codec="16k")


def test_a_precision_that_the_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network keeps it and computes in float32, the ends leave it; both are said, once."""
    for slow in (frozenset[torch.dtype](), frozenset({torch.bfloat16})):
        monkeypatch.setattr(precision, "SLOW", slow)
        bundle = open_bundle("nano")
        bundle.encoders.bfloat16()
        for _ in range(2):
            bundle.to("cpu", torch.bfloat16)
        assert len(bundle.notes) == (2 if slow else 0)
        assert all("has no instructions for bfloat16" in note for note in bundle.notes)
        assert bundle.network.dtype == torch.bfloat16
        dtypes = {p.dtype for p in bundle.encoders.parameters()}
        assert dtypes == {torch.float32 if slow else torch.bfloat16}


def test_a_network_of_video_and_of_a_whole_text_has_no_encoders(tmp_path: Path) -> None:
    sizes = {"depth": 2, "fused_depth": 1, "video": "gated", "pooled_dim": 8}
    MFMJT.from_config("nano", **sizes).save(tmp_path / "gated.safetensors")
    with pytest.raises(InputError, match=r"gated\.safetensors takes video and a vector"):
        mmaudio._ours(tmp_path / "gated.safetensors")
