"""The files that `mfmjt generate` writes, and what it says of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mfmjt.media import Pictures
    from mfmjt.pipeline import Audio

__all__ = ["STAGE_TITLES", "check_outputs", "output_paths", "report", "save_plots", "write_sounds"]

STAGE_TITLES = {
    "load": "Loading the model",
    "read": "Reading the video",
    "encode": "Looking and reading",
    "generate": "Making the sound",
    "decode": "Decoding the sound",
    "write": "Writing",
}


def output_paths(
    source: Path | Pictures | None, output: Path | None, seed: int, count: int
) -> list[Path]:
    """Return one path for each sound; several are told apart by their seeds."""
    from mfmjt.media import default_suffix

    path = output or Path()
    if path.is_dir():
        path /= "sound.wav" if source is None else f"{source.stem}.mfmjt{default_suffix(source)}"
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{seed + i}{path.suffix}") for i in range(count)]


def check_outputs(source: Path | Pictures | None, paths: Sequence[Path], plot: bool) -> None:
    """Raise, before any work, the error that writing would end with.

    Args:
        source: The video, None for text alone.
        paths: The files to write.
        plot: Also check what `save_plots` writes.
    """
    from mfmjt import media

    for path in paths:
        media.check_output(source, path)
    if plot:
        from mfmjt.plotting import check_matplotlib

        check_matplotlib()
        for path in paths:
            media.refuse_same(source, path.with_suffix(".png"))


def write_sounds(
    source: Path | Pictures | None, sounds: Sequence[Audio], paths: Sequence[Path]
) -> dict[str, None]:
    """Write the sounds, under the video where a file is one of video; say what files lack of it."""
    from mfmjt.media import VIDEO_SUFFIXES

    notes: dict[str, None] = {}
    for sound, path in zip(sounds, paths, strict=True):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            notes |= dict.fromkeys(sound.mux(source, path))
        else:
            sound.save(path)
    return notes


def save_plots(
    source: Path | Pictures | None, sounds: Sequence[Audio], paths: Sequence[Path]
) -> None:
    """Save an image of each sound beside it, under the same name."""
    from mfmjt.evaluate.onsets import detect_onsets
    from mfmjt.media import thumbnails
    from mfmjt.plotting import plot_sound

    for sound, path in zip(sounds, paths, strict=True):
        wave, rate = sound.waveform[0], sound.sample_rate
        frames = None if source is None else thumbnails(source, sound.duration)
        plot_sound(path.with_suffix(".png"), wave, rate, detect_onsets(wave, rate), frames)


def report(
    sounds: Sequence[Audio],
    paths: Sequence[Path],
    plot: bool,
    notes: Iterable[str],
    timings: dict[str, float],
) -> None:
    """Print what was odd, what was written, where the time went, and both real-time factors.

    Args:
        sounds: What was made.
        paths: Their files.
        plot: Whether images are beside them.
        notes: One line each.
        timings: Seconds of each stage in `STAGE_TITLES`.
    """
    for note in notes:
        typer.echo(f"Note: {note}", err=True)
    for sound, path in zip(sounds, paths, strict=True):
        image = f", with {path.with_suffix('.png')}" if plot else ""
        typer.echo(f"Wrote {path}: {sound.duration:.2f} s of sound, seed {sound.seed}{image}.")
    for stage, seconds in timings.items():
        typer.echo(f"  {STAGE_TITLES[stage]:<20}{seconds:8.3f} s")
    typer.echo(
        f"Real-time factor: {sounds[0].rtf_generator:.4f} generator only, "
        f"{sounds[0].rtf_end_to_end:.4f} end to end (seconds of work per second of sound; "
        "loading and writing apart)."
    )
