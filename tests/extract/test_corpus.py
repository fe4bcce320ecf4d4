"""The corpus of real sounds, from small recordings that are made here."""

from __future__ import annotations

import csv
import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from mfmjt import cli
from mfmjt.data.manifest import COLUMNS
from mfmjt.data.recordings import SAMPLE_RATE, Recordings
from mfmjt.errors import InputError
from mfmjt.extract.corpus import PEAK, READY, from_clips, from_sources, write

COMMIT = "0123456789ab"
NAMES = ("hit.wav", "long.flac", "cut-0.wav", "cut-1.wav")


def tone(seconds: float, rate: int = SAMPLE_RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder with a repository in it, of plain files."""
    folder = tmp_path / "repositories" / "someone+sounds"
    folder.mkdir(parents=True)
    silence = np.zeros(SAMPLE_RATE)
    padded = np.concatenate((silence, tone(0.5), silence))
    soundfile.write(folder / "hit.wav", np.stack((padded, padded / 2), 1), SAMPLE_RATE)
    soundfile.write(folder / "long.flac", tone(17.5, 48_000), 48_000)
    for i, part in enumerate(np.split(tone(1.0), 2)):
        soundfile.write(folder / f"cut-{i}.wav", part, SAMPLE_RATE)
    return folder.parent


def manifest(sources: Path, source: str = f"someone/sounds@{COMMIT}", **change: str) -> Path:
    """Three lines: the first is as `change` says."""
    folder, path = sources / "someone+sounds", sources.parent / "manifest.csv"
    of = {"hit.wav": ["hit.wav"], "long.flac": ["long.flac"], "cut-{0..1}.wav": list(NAMES[2:])}
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        splits = ("train", "test", "validation")
        for (name, files), split in zip(of.items(), splits, strict=True):
            content = b"".join((folder / f).read_bytes() for f in files)
            line = {
                "set": "long" if name == "long.flac" else "short",
                "source": source,
                "path": name,
                "licence": "CC-BY 4.0",
                "author": f"the author of {name}",
                "split": split,
                "label": "dog",
                "caption": "a dog, barking",
                "sha256": hashlib.sha256(content).hexdigest()[:16],
            }
            table.writerow(line | (change if name == "hit.wav" else {}))
    return path


def test_recordings_become_clips(sources: Path, tmp_path: Path) -> None:
    splits = write(from_sources(manifest(sources), sources), tmp_path / "corpus")
    assert splits == {"train": 1, "test": 2, "validation": 1}
    corpus = Recordings(tmp_path / "corpus")
    hit, first, second, cut = corpus.rows
    # The silence around it is cut but for 20 ms before and 100 ms after, less a sample at each end:
    # a sine begins and ends at 0.
    assert hit.samples == pytest.approx(0.5 * SAMPLE_RATE + 320 + 1600, abs=4)
    assert (first.samples, cut.samples) == (8 * SAMPLE_RATE, SAMPLE_RATE)
    # 17.5 s are two clips of 8 s; the rest is shorter than 2 s.
    assert second.samples == 8 * SAMPLE_RATE
    assert [row.id[-3:] for row in corpus.rows] == ["000", "000", "001", "000"]
    assert first.id[:-3] == second.id[:-3]
    assert (first.split, first.label, first.caption) == ("test", "dog", "a dog, barking")
    assert (first.set, first.credit) == ("long", "the author of long.flac")
    for row in corpus.rows:
        sound = corpus.sound(row)
        # Rounded to 16 bits, half a step at most.
        assert abs(float(np.abs(sound).max()) - PEAK) <= 0.5 / 32767 + np.finfo(np.float32).eps
    # Both pieces, without a gap between them.
    whole = corpus.sound(cut)
    assert np.abs(whole - PEAK / 0.5 * tone(1.0)).max() < 2 / 32767 / 0.5 * PEAK
    credits = (tmp_path / "corpus" / "CREDITS.md").read_text()
    for author in {row.credit for row in corpus.rows}:
        assert f"| {author} | CC-BY 4.0 | 1 |" in credits
    assert f"<https://github.com/someone/sounds>, commit {COMMIT}" in credits


def test_the_same_recordings_give_the_same_bytes(sources: Path, tmp_path: Path) -> None:
    table = manifest(sources)
    for name in ("a", "b", "b"):  # the last replaces one that is there
        write(from_sources(table, sources), tmp_path / name)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"clips.csv", "sound.npy", "CREDITS.md"}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def git(folder: Path, *arguments: str) -> str:
    known = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    who = ("-c", "user.name=x", "-c", "user.email=x@localhost")
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments],
        env=os.environ | known,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


@pytest.mark.parametrize("bare", [False, True])
def test_a_clone_is_read_at_the_commit(sources: Path, tmp_path: Path, bare: bool) -> None:
    write(from_sources(manifest(sources), sources), tmp_path / "plain")
    folder = sources / "someone+sounds"
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "Sounds")
    commit = git(folder, "rev-parse", "HEAD")
    table = manifest(sources, f"someone/sounds@{commit}")
    git(folder, "rm", "-q", "hit.wav")  # the commit has it, whatever is checked out
    if bare:
        git(tmp_path, "clone", "-q", "--bare", str(folder), str(sources / "other"))
        folder.rename(tmp_path / "moved")
        (sources / "other").rename(folder)
    write(from_sources(table, sources), tmp_path / "clone")
    sounds = [(tmp_path / name / "sound.npy").read_bytes() for name in ("plain", "clone")]
    assert sounds[0] == sounds[1]

    (tmp_path / "again").mkdir()
    unknown = table.read_text().replace(commit, "f" * 40)
    table.write_text(unknown)
    with pytest.raises(InputError, match=r"Line 2 of .* does not have the commit ffff.*fetch"):
        from_sources(table, sources)


def test_sets_are_chosen(sources: Path) -> None:
    table = manifest(sources)
    assert [e.about["set"] for e in from_sources(table, sources, ["long"])] == ["long"]
    with pytest.raises(InputError, match=r"no set 'none'. Choose from short, long"):
        from_sources(table, sources, ["none"])


def test_what_is_missing_is_told_before_any_work(sources: Path, tmp_path: Path) -> None:
    table = manifest(sources, path="none.wav")
    with pytest.raises(InputError, match=r"Line 2 of .*: there is no none.wav in .*someone.sounds"):
        from_sources(table, sources)
    with pytest.raises(InputError, match=r"Line 2 of .*: there is no folder .*git clone https"):
        from_sources(manifest(sources), tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no sound", "cannot be decoded as sound. Get it again, or remove the line"),
        (np.zeros(800), "is silent. Remove the line"),
        (np.array([0.5, np.nan] * 400), "samples that are NaN or infinite"),
        (None, "is another file than the manifest's: its SHA-256 begins with"),
    ],
    ids=["garbage", "silence", "nan", "digest"],
)
def test_a_recording_that_cannot_be_used_leaves_all_as_it_was(
    sources: Path, tmp_path: Path, content: object, told: str
) -> None:
    write(from_sources(manifest(sources), sources), tmp_path / "corpus")
    before = {p.name: p.read_bytes() for p in (tmp_path / "corpus").iterdir()}
    path = sources / "someone+sounds" / "hit.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        soundfile.write(path, content, SAMPLE_RATE, subtype="FLOAT")
    table = manifest(sources, **({"sha256": "0" * 16} if content is None else {}))
    with pytest.raises(InputError, match=r"Line 2 of .*manifest.csv: .*hit.wav") as caught:
        write(from_sources(table, sources), tmp_path / "corpus")
    assert told in str(caught.value)
    assert {p.name: p.read_bytes() for p in (tmp_path / "corpus").iterdir()} == before


READY_LINE = {
    "path": "x.ogg",
    "caption": "a caption",
    "split": "train",
    "licence": "CC0",
    "credit": "someone",
    "set": "own",
    "label": "own label",
}


def ready(folder: Path, *lines: dict[str, str]) -> Path:
    soundfile.write(folder / "x.ogg", tone(0.5), SAMPLE_RATE, format="OGG", subtype="VORBIS")
    with (folder / "clips.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, READY)
        table.writeheader()
        table.writerows(READY_LINE | line for line in lines)
    return folder / "clips.csv"


def test_ready_clips(sources: Path, tmp_path: Path) -> None:
    """What the manifest knows is as it says; its sets' other clips are no everyday sounds."""
    table = manifest(sources)
    known = from_sources(table, sources)[0].id
    lines = ({"id": f"{known}_003", "set": "short"}, {"id": "y", "set": "short"}, {"id": "z"})
    entries = from_clips(ready(tmp_path, *lines), table)
    assert write(entries, tmp_path / "corpus") == {"train": 2}
    mine, own = Recordings(tmp_path / "corpus").rows
    assert (mine.id, mine.label, mine.credit) == (f"{known}_003", "dog", "the author of hit.wav")
    assert (own.id, own.label, own.caption) == ("z", "own label", "a caption")
    assert [e.id for e in from_clips(tmp_path / "clips.csv", table, ["own"])] == ["z"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"licence": "CC-BY-NC 4.0"}, "the license 'CC-BY-NC 4.0' is not allowed"),
        ({"split": "dev"}, "the split 'dev': give one of"),
        ({"path": "none.ogg"}, "there is no file"),
        ({"id": "a"}, "the id 'a' is that of Line 2 of"),
    ],
)
def test_wrong_ready_clips(sources: Path, tmp_path: Path, change: dict, told: str) -> None:
    table = ready(tmp_path, {"id": "a"}, {"id": "b"} | change)
    with pytest.raises(InputError, match=r"Line 3 of .*clips.csv") as caught:
        from_clips(table, manifest(sources))
    assert told in str(caught.value)
    with pytest.raises(InputError, match="no clip of the sets none"):
        from_clips(ready(tmp_path, {"id": "a"}), manifest(sources), ["none"])


def test_the_command(sources: Path, tmp_path: Path) -> None:
    def run(*arguments: object):
        return CliRunner().invoke(cli.app, ["data", "real", *map(str, arguments)])

    table = manifest(sources)
    out = tmp_path / "out"
    done = run(out, "--manifest", table, "--sources", sources, "--set", "short")
    assert done.exit_code == 0, done.output
    assert f"Wrote 2 clips (1 train, 1 validation) to {out}." in done.output
    assert len(Recordings(out).rows) == 2

    asked = run(tmp_path / "none")
    assert asked.exit_code == 2
    assert "https://github.com/ETdoFresh/kenney.nl  45df48c4d45f" in asked.output
    assert "Give either --sources, with these repositories in it, or --clips." in asked.output
    both = run(out, "--sources", sources, "--clips", "clips.csv")
    assert both.exit_code == 2
    assert "Give either" in both.output
    assert not (tmp_path / "none").exists()

    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    failed = run(blocked, "--manifest", table, "--sources", sources)
    assert failed.exit_code == 1
    assert "Choose another folder" in failed.output
