"""`mfmjt generate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from mfmjt.cli import _common, _outputs
from mfmjt.errors import InputError

if TYPE_CHECKING:
    from mfmjt.meanflow.guidance import GuidanceMode

__all__ = ["generate"]


def generate(
    video: Annotated[
        Path | None,
        typer.Argument(
            help="Video file, folder of pictures, or pattern such as frames/%04d.png. Leave it "
            "out to make sound from text alone."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What is to be heard, in words.")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What is not to be heard, in words. Needs guidance.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A video (.mp4 .mov .mkv .webm), only the sound (.wav .flac .ogg .opus .mp3), or "
            "a folder. Default: VIDEO.mfmjt.mp4 or sound.wav, in the working directory.",
        ),
    ] = None,
    steps: _common.Steps = None,
    guidance: _common.Guidance = None,
    guidance_mode: _common.Mode = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same sound.")] = 0,
    count: Annotated[int, typer.Option(help="How many different sounds to make.")] = 1,
    duration: Annotated[
        float | None,
        typer.Option(help="Seconds from the start. Default: the whole video; 8 for text alone."),
    ] = None,
    fps: _common.Fps = None,
    model: _common.Model = "nano",
    cache: Annotated[Path | None, typer.Option(help="Folder for cached video features.")] = None,
    device: _common.Device = None,
    dtype: _common.Dtype = "auto",
    low_memory: _common.LowMemory = False,
    plot: Annotated[
        bool,
        typer.Option("--plot", help="Also save an image: frames, waveform, spectrum, onsets."),
    ] = False,
    debug: _common.Debug = False,
) -> None:
    """Make sound for a video, a text, or both.

    The video's frames are copied as they are; its own sound, if any, is replaced. What no
    container holds (GIF, APNG, WebP, folders of pictures) is encoded once.

    For example:
    - `mfmjt generate clip.mp4`

    - `mfmjt generate clip.mp4 --prompt "a wooden ball bounces" -o out.mp4`

    - `mfmjt generate --prompt "rain on a tin roof" --seed 3 -o rain.wav`

    - `mfmjt generate clip.mp4 --count 4 --guidance 2 --plot`

    - `mfmjt generate frames/%04d.png --fps 24 -o out.mp4`

    - `mfmjt generate clip.mp4 --negative-prompt "music, speech" --guidance 3`

    - `mfmjt generate clip.mp4 --model weights/mmaudio_small_16k.pth --steps 25 --low-memory`
    """
    began = time.perf_counter()
    with _common.defer_interrupts():
        from mfmjt import media
        from mfmjt.progress import stage_bar
    if video is None and fps is not None:
        raise InputError("--fps is for a folder or pattern of pictures. Give one, or leave it out.")
    source = None if video is None else media.as_source(video, fps)
    paths = _outputs.output_paths(source, output, seed, count)
    with stage_bar(_outputs.STAGE_TITLES) as report:
        report("load", 0.0)
        _outputs.check_outputs(source, paths, plot)
        with _common.defer_interrupts():
            from mfmjt.devices import parse_dtype_or_auto
            from mfmjt.pipeline import Pipeline
        precision = parse_dtype_or_auto(dtype)
        pipeline = Pipeline.from_pretrained(model, device, precision, low_memory=low_memory)
        timings = {"load": time.perf_counter() - began}
        mode = cast("GuidanceMode | None", guidance_mode)  # the pipeline checks it
        made = pipeline(
            source, prompt, steps, guidance, mode, seed, duration, count, report, cache,
            negative_prompt=negative_prompt,
        )  # fmt: skip
        sounds = made if isinstance(made, list) else [made]
        timings |= sounds[0].timings
        began = time.perf_counter()
        report("write", 0.0)
        notes = dict.fromkeys(sounds[0].notes) | _outputs.write_sounds(source, sounds, paths)
        timings["write"] = time.perf_counter() - began
        if plot:
            _outputs.save_plots(source, sounds, paths)
    _outputs.report(sounds, paths, plot, notes, timings)
