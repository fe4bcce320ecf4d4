"""The page holds every sound once, names no system, and belongs to its key."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mfmjt.errors import InputError
from mfmjt.listen import build


def sounds(folder: Path, names: tuple[str, ...], level: float) -> Path:
    folder.mkdir()
    for i, name in enumerate(names):
        wave = level * np.sin(np.arange(800) * (0.1 + 0.05 * i))
        soundfile.write(folder / f"{name}.wav", wave, 16000, subtype="PCM_16")
    return folder


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Path]:
    return {
        "first": sounds(tmp_path / "alpha", ("dog", "cat", "rain"), 0.25),
        "second": sounds(tmp_path / "beta", ("dog", "cat", "bell"), 0.5),
    }


def parts(page: Path) -> tuple[dict[str, Any], dict[str, str]]:
    text = page.read_text("utf-8")
    found = [re.search(rf"^const {name} = (.*);$", text, re.M) for name in ("TEST", "MEDIA")]
    test, media = (json.loads(match.group(1)) for match in found if match)
    return test, media


def test_preference(two: dict[str, Path], tmp_path: Path) -> None:
    built = build(two, tmp_path / "test.html")
    test, media = parts(built.page)
    key = json.loads(built.key.read_text())
    assert built.clips == ["cat", "dog"]
    assert built.missing == {"first": ["bell"], "second": ["rain"]}
    assert built.trials == len(test["trials"]) == 2
    assert test["id"] == key["id"]
    assert len(media) == 4
    page = built.page.read_text("utf-8")
    for secret in ("first", "second", "alpha", "beta"):
        assert f'"{secret}"' not in page
    for trial in test["trials"]:
        told = key["trials"][trial["id"]]
        assert told["sounds"] == trial["sounds"]
        for number, system in zip(told["sounds"], told["systems"], strict=True):
            data = base64.b64decode(media[number].removeprefix("data:audio/flac;base64,"))
            heard, rate = soundfile.read(io.BytesIO(data), dtype="int16")
            original, _ = soundfile.read(two[system] / f"{told['clip']}.wav", dtype="int16")
            assert rate == 16000
            # Through float32 and back: a 16-bit sample is exact in float32.
            np.testing.assert_array_equal(heard, original)


def test_same_seed_same_page(two: dict[str, Path], tmp_path: Path) -> None:
    one, other = (build(two, tmp_path / f"{n}.html", seed=s) for n, s in (("a", 0), ("b", 0)))
    assert one.page.read_bytes() == other.page.read_bytes()
    orders = {
        tuple(parts(build(two, tmp_path / "c.html", seed=s).page)[0]["trials"][0]["sounds"])
        for s in range(8)
    }
    assert len(orders) > 1


def test_rating_shows_the_reference(two: dict[str, Path], tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text("id,caption\ndog,a dog </script> barks\n")
    built = build(two, tmp_path / "r.html", "rating", reference="first", captions=table)
    test, _ = parts(built.page)
    key = json.loads(built.key.read_text())["trials"]
    for trial in test["trials"]:
        told = key[trial["id"]]
        assert told["systems"][told["sounds"].index(trial["reference"])] == "first"
    assert sorted(trial["caption"] for trial in test["trials"]) == ["", "a dog </script> barks"]
    assert built.page.read_text().count("</script>") == 1


def test_pictures_go_in_as_they_are(tmp_path: Path) -> None:
    folders = {}
    for name in ("a", "b"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "clip.mp4").write_bytes(b"video of " + name.encode())
    _, media = parts(build(folders, tmp_path / "v.html", "abx").page)
    kept = {base64.b64decode(uri.removeprefix("data:video/mp4;base64,")) for uri in media.values()}
    assert kept == {b"video of a", b"video of b"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "choice"}, "Unknown kind"),
        ({"reference": "third", "kind": "rating"}, "must be one of the systems"),
        ({"reference": "first"}, "in a test of kind rating"),
        ({"clips": 0}, "at least one"),
        ({"out": "page.txt"}, "must end in .html"),
        ({"systems": {"first": "alpha"}}, "at least two"),
        ({"systems": {"first": "alpha", "second": "nowhere"}}, "There is no folder"),
        ({"systems": {"first": "alpha", "second": "empty"}}, "holds no sounds"),
        ({"systems": {"first": "alpha", "second": "other"}}, "No clip is in every folder"),
        ({"systems": {"first": "alpha", "second": "twice"}}, "two files called dog"),
        ({"systems": {"first": "alpha", "second": "broken"}}, "cannot be read"),
    ],
)
def test_refused(
    two: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    sounds(tmp_path / "other", ("bird",), 0.5)
    sounds(tmp_path / "twice", ("dog",), 0.5)
    (tmp_path / "twice" / "dog.flac").write_bytes(b"")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "dog.wav").write_bytes(b"nothing")
    given: dict[str, Any] = {"systems": two, "out": "page.html"} | change
    systems = {name: tmp_path / folder for name, folder in given.pop("systems").items()}
    page = tmp_path / given.pop("out")
    with pytest.raises(InputError, match=message):
        build(systems, page, **given)
    assert not page.exists()
    assert not page.with_suffix(".key.json").exists()
