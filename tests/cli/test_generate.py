from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from mfmjt.cli._outputs import STAGE_TITLES
from mfmjt.kernels import precision
from mfmjt.media import read_video
from mfmjt.pipeline import Audio, Pipeline
from tests.support.clips import frame_index, grey, packets, write_sound, write_video
from tests.support.commands import refused, run


def test_video_to_video(here: Path, model_folder: Path, clip: Path) -> None:
    result = run("generate", clip, "--prompt", "a bell", "--model", model_folder, "--device", "cpu")
    assert result.exit_code == 0, result.output
    out = here / "clip.mfmjt.mp4"
    assert packets(out, "video") == packets(clip, "video")
    assert len(packets(out, "audio")) > 1
    assert [p.name for p in here.iterdir()] == [out.name]
    assert "Wrote clip.mfmjt.mp4: 1.20 s of sound, seed 0." in result.stdout
    for told in (*STAGE_TITLES.values(), "generator only", "end to end"):
        assert told in result.stdout


def test_text_to_sound(here: Path, model_folder: Path) -> None:
    result = run("generate", "--prompt", "rain 🌧", "--duration", "0.5", "--model", model_folder)
    assert result.exit_code == 0, result.output
    assert [p.name for p in here.iterdir()] == ["sound.wav"]


@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low memory"])
def test_a_negative_prompt(
    here: Path, model_folder: Path, clip: Path, pipe: Pipeline, low_memory: bool
) -> None:
    given = ["--prompt", "a bell", "--negative-prompt", "rain", "--guidance", 2, "-o", "made.flac"]
    more = ["--low-memory"] if low_memory else []
    result = run("generate", clip, *given, "--model", model_folder, "--device", "cpu", *more)
    assert result.exit_code == 0, result.output
    made, plain = (
        pipe(clip, "a bell", guidance=2.0, negative_prompt=text) for text in ("rain", None)
    )
    for sound, name in ((made, "a.flac"), (plain, "b.flac")):
        assert isinstance(sound, Audio)
        sound.save(name)
    assert (here / "made.flac").read_bytes() == (here / "a.flac").read_bytes()
    assert (here / "made.flac").read_bytes() != (here / "b.flac").read_bytes()


def test_a_slow_dtype_is_noted_once(
    here: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "SLOW", frozenset({torch.float16, torch.bfloat16}))
    given = ["--prompt", "rain", "--duration", 0.5, "--count", 2, "--model", model_folder]
    for dtype in ("auto", "float32", "bfloat16", "float16"):
        result = run("generate", *given, "--device", "cpu", "--dtype", dtype)
        assert result.exit_code == 0, result.output
        notes = result.stderr.splitlines()
        if dtype in ("auto", "float32"):
            assert notes == []
        else:
            (note,) = notes
            assert f"no instructions for {dtype}: it computes in float32" in note


def test_only_the_sound_of_a_video(here: Path, model_folder: Path, clip: Path) -> None:
    result = run("generate", clip, "-o", "a.flac", "--model", model_folder)
    assert result.exit_code == 0, result.output
    assert [p.name for p in here.iterdir()] == ["a.flac"]


def test_several_sounds_and_plots(here: Path, model_folder: Path, clip: Path) -> None:
    (here / "out").mkdir()
    result = run(
        "generate", clip, "-o", "out", "--count", 2, "--seed", 7, "--plot", "--model", model_folder
    )
    assert result.exit_code == 0, result.output
    names = sorted(p.name for p in (here / "out").iterdir())
    assert names == [f"clip.mfmjt-{seed}.{kind}" for seed in (7, 8) for kind in ("mp4", "png")]
    sound = [packets(here / "out" / f"clip.mfmjt-{seed}.mp4", "audio") for seed in (7, 8)]
    assert sound[0] != sound[1]
    assert (here / "out" / "clip.mfmjt-7.png").read_bytes().startswith(b"\x89PNG")


def test_the_seed_gives_the_same_file(here: Path, model_folder: Path, clip: Path) -> None:
    for name in ("a.wav", "b.wav"):
        assert run("generate", clip, "-o", name, "--model", model_folder).exit_code == 0
    assert (here / "a.wav").read_bytes() == (here / "b.wav").read_bytes()


def test_a_video_cut_short_is_used_with_a_note(here: Path, model_folder: Path) -> None:
    path = write_video(here / "a.mp4", options={"movflags": "faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    result = run("generate", path, "-o", "b.mp4", "--model", model_folder)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"(Note: [^\n]+\n)+", result.stderr)
    assert "cut short" in result.stderr
    assert 0 < read_video(here / "b.mp4").duration < 2


@pytest.mark.parametrize(
    ("video", "options", "out", "seconds", "notes"),
    [
        ("a.gif", [], "a.mfmjt.mp4", 0.9, ["no container holds gif"]),
        ("my.frames", ["--fps", "20"], "my.frames.mfmjt.mp4", 0.5, ["encoded once"]),
        ("my.frames", ["--plot"], "my.frames.mfmjt.mp4", 0.4, ["25 pictures a", "encoded once"]),
        ("my.frames/%02d.png", ["--fps", "10/1"], "my.frames.mfmjt.mp4", 1.0, ["encoded once"]),
        ("my.frames/%02d.png", ["-o", "o.webm"], "o.webm", 0.4, ["25 pictures a", "encoded once"]),
        ("a.gif", ["-o", "a.wav"], "a.wav", 0.9, []),
        ("a.avi", [], "a.mfmjt.mp4", 0.4, ["no container holds huffyuv"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_what_is_no_video_file(
    here: Path,
    model_folder: Path,
    video: str,
    options: list[str],
    out: str,
    seconds: float,
    notes: list[str],
) -> None:
    (here / "my.frames").mkdir()
    for i in range(10):
        Image.fromarray(grey(i, 15, 21)).save(here / "my.frames" / f"{i:02d}.png")
    first, *others = (Image.fromarray(grey(i, 15, 21)) for i in range(10))
    first.save(here / "a.gif", save_all=True, append_images=others, duration=90)
    write_video(here / "a.avi", frames=10, codec="huffyuv", pixels="yuv422p")
    before = set(here.rglob("*"))
    result = run("generate", video, *options, "--model", model_folder)
    assert result.exit_code == 0, result.output
    made = {str(path.relative_to(here)) for path in set(here.rglob("*")) - before}
    assert made == {out, *([str(Path(out).with_suffix(".png"))] if "--plot" in options else [])}
    assert f"Wrote {out}: {seconds:.2f} s of sound" in result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == len(notes)
    assert all(note in line for note, line in zip(notes, lines, strict=True))
    if not out.endswith(".wav"):
        shown = read_video(here / out, (100,), 16)
        assert shown.duration == pytest.approx(seconds, abs=0.09)
        middles = shown.frames[0][int(5 * seconds) :: int(10 * seconds)]
        assert frame_index(middles - 1) == list(range(10))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing.mp4"], "no file"),
        (["."], "folder"),
        (["garbage.mp4"], "cannot be opened"),
        (["sound.m4a"], "only sound"),
        (["one.mp4"], "single frame"),
        (["still.png"], "single frame"),
        (["stills"], "single frame"),
        (["stills/%d.jpg"], "No picture is named like"),
        (["stills", "--fps", "0"], "fps is 0"),
        (["clip.mp4", "--fps", "25"], "times of its own"),
        (["--prompt", "a", "--fps", "25"], "--fps is for a folder"),
        (["apng.png", "-o", "apng.mp4", "--plot"], "input itself"),
        ([], "nothing to make sound for"),
        (["--prompt", ""], "nothing to make sound for"),
        (["clip.mp4", "-o", "clip.mp4"], "input itself"),
        (["clip.mp4", "-o", "out.txt"], "no format"),
        (["clip.mp4", "-o", "out.webm"], "cannot hold"),
        (["--prompt", "a", "-o", "out.mp4"], "no format"),
        (["clip.mp4", "--duration", "0"], "duration is 0"),
        (["clip.mp4", "--duration", "5"], "less than the 5 s"),
        (["clip.mp4", "--steps", "0"], "steps is 0"),
        (["clip.mp4", "--steps", "many"], "--steps"),
        (["clip.mp4", "--guidance-mode", "loud"], "loud"),
        (["clip.mp4", "--dtype", "int4"], "auto, float32"),
        (["clip.mp4", "--negative-prompt", "x", "--guidance", "1"], "guidance above 1"),
        (["clip.mp4", "--negative-prompt", "x", "--guidance-mode", "none"], "guidance above 1"),
        (["--negative-prompt", "x"], "nothing to make sound for"),
        (["clip.mp4", "--device", "abacus"], "abacus"),
        (["clip.mp4", "--unknown"], "--unknown"),
        (["clip.mp4", "other.mp4"], "other.mp4"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse(here: Path, model_folder: Path, arguments: list[str], says: str) -> None:
    write_video(here / "clip.mp4", frames=5)
    write_video(here / "one.mp4", frames=1)
    write_sound(here / "sound.m4a")
    (here / "stills").mkdir()
    still = Image.fromarray(grey(0, 16, 16))
    for name in ("still.png", "stills/1.png"):
        still.save(here / name)
    still.save(here / "apng.png", save_all=True, append_images=[still.rotate(9)])
    (here / "garbage.mp4").write_bytes(bytes(range(256)) * 20)
    before = {p: p.is_file() and p.read_bytes() for p in here.rglob("*")}
    refused(run("generate", *arguments, "--model", model_folder), 2, says)
    assert {p: p.is_file() and p.read_bytes() for p in here.rglob("*")} == before


def test_models_that_cannot_be(here: Path, clip: Path) -> None:
    refused(run("generate", clip, "--model", "nonsense"), 2, "no model nonsense")
    (here / "network.safetensors").write_bytes(b"not a network")
    refused(run("generate", clip, "--model", "."), 2, "network.safetensors")


def test_unwritable(here: Path, clip: Path, model_folder: Path) -> None:
    refused(run("generate", clip, "-o", "no/where.mp4", "--model", model_folder), 1, "Cannot write")
    assert list(here.iterdir()) == []
