from __future__ import annotations

from pathlib import Path

import pytest

from mfmjt.families import PRETRAINED
from mfmjt.families.licenses import TERMS, table, terms_of
from mfmjt.model.published import MEANAUDIO_FILES, NETWORK_FILES
from tests.support.commands import refused, run

PAGE = Path(__file__).parents[2] / "docs" / "licenses.md"


def test_the_page_has_the_table() -> None:
    assert f"\n\n{table()}\n\n" in PAGE.read_text()
    assert "| --- |" not in table()
    assert all("|" not in part for terms in TERMS for part in terms if isinstance(part, str))


def test_every_published_file_is_in_one_line() -> None:
    for file in (*NETWORK_FILES.values(), *MEANAUDIO_FILES.values()):
        assert len([terms for terms in TERMS if file.name in terms.files]) == 1, file.name


def test_a_model_by_name_file_and_repository(tmp_path: Path) -> None:
    def known(model: str | Path) -> list[str]:
        return [terms.networks.split()[0] for terms in terms_of(model)]

    for name in ("nano", "foley"):
        assert known(name) == known(PRETRAINED / name) == [name]
    assert known("large_44k_v2") == known("weights/mmaudio_large_44k.pth") == ["MMAudio"]
    assert known("fp/mmaudio_large_44k_v2_fp16.safetensors") == ["ComfyUI's"]
    assert known("fdaudio") == known("a/fdaudio.pth") == known("kph68/FdAudio") == ["FdAudio"]
    assert known("generator_small_16k_sup_5.pth") == ["SelVA"]
    assert known("mine.safetensors") == known(tmp_path) == []
    for name in ("weights/mmaudio_small_16k.pth", "fdaudio.pth"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert known(tmp_path) == ["MMAudio", "FdAudio"]


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: terms.networks)
def test_a_line_is_complete(terms) -> None:
    line = str(terms)
    assert terms.code in line
    assert terms.weights in line
    assert f"commercial use: {terms.commercial}." in line
    assert "2026-11" in line
    assert (terms.commercial == "no") == ("MIT" not in terms.weights and terms.publisher != "")


def test_on_the_command_line(tmp_path: Path) -> None:
    result = run("info", "nano")
    assert result.exit_code == 0
    assert result.stdout == f"{TERMS[0]}\n"
    mine = tmp_path / "mine.safetensors"
    mine.touch()
    assert "not known by its name" in run("info", mine).stdout
    refused(run("info", tmp_path / "gone.pth"), 2, "There is no model")
