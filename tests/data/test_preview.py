from __future__ import annotations

import json
from pathlib import Path

import av
import pytest

from mfmjt.data.preview import preview
from mfmjt.errors import InputError
from tests.support.open_corpus import write_corpus


def test_preview_writes_playable_clips_and_a_sheet(tmp_path: Path) -> None:
    seen: list[int] = []
    written = preview(
        tmp_path, clips=2, split="test", size=32, progress=lambda i, n: seen.append(i)
    )
    assert seen == [1, 2]
    assert all(path.stat().st_size > 0 for path in written)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    index = json.loads((tmp_path / "clips.json").read_text())
    assert [set(entry) for entry in index] == [{"file", "caption", "class", "events_seconds"}] * 2
    with av.open(str(tmp_path / index[0]["file"])) as container:
        assert len(list(container.decode(container.streams.video[0]))) == 200
        assert container.streams.audio[0].rate == 16000


def test_preview_refuses_nonsense(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--clips"):
        preview(tmp_path, clips=0)


def test_preview_of_the_open_set_has_clips_without_a_picture(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    written = preview(tmp_path / "out", clips=2, size=32, recordings=corpus)
    assert [path.suffix for path in written] == [".png", ".mp4", ".m4a", ".json"]
    with av.open(str(written[2])) as container:
        assert not container.streams.video
        assert container.streams.audio[0].rate == 16000
