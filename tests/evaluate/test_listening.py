from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from mfmjt.checkpoints import PublishedFile
from mfmjt.encoders.clap import CLAPText
from mfmjt.errors import InputError
from mfmjt.evaluate import listening
from mfmjt.evaluate.listening import LISTENERS, Networks, Unheard, file_digest
from tests.support.texts import needs_transformers, write_clap, write_roberta

NAME = "vggish-10086976.pth"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder with a file of the name of VGGish's weights, one folder deep."""
    (tmp_path / "deep").mkdir()
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "deep" / NAME)
    return tmp_path


def published_as(path: Path, monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    """Make a file the published one of VGGish, but for some of what is stated of it."""
    size = f"{-(-path.stat().st_size * 10 // 2**20) / 10:g}M"
    stated = {"size": size, "sha256": file_digest(path), **changes}
    file = PublishedFile(NAME, "https://example.org", license="some license", **stated)
    own = dataclasses.replace(LISTENERS["vggish"], file=file)
    monkeypatch.setitem(listening.LISTENERS, "vggish", own)


def test_the_published_file_is_found_by_name_size_and_digest(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = weights / "deep" / NAME
    published_as(path, monkeypatch)
    found = Networks(weights).find("vggish")
    assert (found.path, found.note) == (path, "")
    assert found.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_another_version_is_refused_and_told_where_it_is_to_be_had(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published_as(weights / "deep" / NAME, monkeypatch, sha256="0123456789abcdef0123")
    with pytest.raises(Unheard, match=r"another version.*example\.org, license some license"):
        Networks(weights).find("vggish")
    assert "not 0123456789abcdef… as published" in Networks(weights, "name").find("vggish").note
    published_as(weights / "deep" / NAME, monkeypatch, sha256="", md5="0" * 32)
    with pytest.raises(Unheard, match="MD5"):
        Networks(weights).find("vggish")
    published_as(weights / "deep" / NAME, monkeypatch, size="7M")
    with pytest.raises(Unheard, match="not 7M"):
        Networks(weights).find("vggish")


def test_a_file_of_the_right_name_and_other_content_is_refused(weights: Path) -> None:
    with pytest.raises(InputError, match=rf"{NAME}: This is no state dict of VGGish"):
        Networks(weights, "name").load("vggish")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    for name, listener in LISTENERS.items():
        if listener.file is not None:
            with pytest.raises(Unheard) as caught:
                Networks(tmp_path).find(name)
            for told in (listener.file.name, listener.file.publisher, listener.file.license):
                assert told in str(caught.value)
    with pytest.raises(InputError, match="no folder /nowhere of weights"):
        Networks("/nowhere")


def test_judges_that_ship_have_a_digest_of_their_weights() -> None:
    found = Networks().find("classifier")
    assert found.path is None
    assert len(found.digest) == 64


def test_captions_are_read_by_clap_of_one_file_and_the_sizes_beside_it(tmp_path: Path) -> None:
    needs_transformers()
    roberta = write_roberta(tmp_path / "roberta")
    file = write_clap(tmp_path, roberta)
    captions = ["a dog barks twice", "rain falls on a tin roof"]
    expected = CLAPText.from_files(file, roberta)(captions)
    found = Networks(tmp_path, "name").read("clap", captions)
    # One caption or two at a time: sums of up to 512 float32 products in another order.
    assert torch.allclose(torch.from_numpy(np.stack(found)), expected, atol=1e-6)


def test_captions_without_the_sizes_of_their_half_say_where_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(Unheard, match=r"tokenizer\.json of FacebookAI/roberta-base.*huggingface"):
        Networks(tmp_path).text_folder("clap")
    with pytest.raises(Unheard, match="vggish takes no captions"):
        Networks(tmp_path).text_folder("vggish")
