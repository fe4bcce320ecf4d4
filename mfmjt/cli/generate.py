"""`mfmjt generate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from mfmjt.cli import _outputs
from mfmjt.cli._common import Debug, Device, Fps, defer_interrupts
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
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A video (.mp4 .mov .mkv .webm), only the sound (.wav .flac .ogg .opus .mp3), or "
            "a folder. Default: VIDEO.mfmjt.mp4 or sound.wav, in the working directory.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Evaluations of the network. Default: 1; 25 for one of flow matching."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Strength of guidance; 1 is none. Default: 1.5; 4.5 for flow matching."),
    ] = None,
    guidance_mode: Annotated[
        str | None,
        typer.Option(help="cfg_scaled, cfg or none. Default: cfg_scaled; cfg for flow matching."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same sound.")] = 0,
    count: Annotated[int, typer.Option(help="How many different sounds to make.")] = 1,
    duration: Annotated[
        float | None,
        typer.Option(help="Seconds from the start. Default: the whole video; 8 for text alone."),
    ] = None,
    fps: Fps = None,
    model: Annotated[
        str,
        typer.Option(
            help="A model that ships, a folder with one or with MMAudio's files, the file of a "
            "network in such a folder, or owner/name on Hugging Face's hub."
        ),
    ] = "nano",
    cache: Annotated[Path | None, typer.Option(help="Folder for cached video features.")] = None,
    device: Device = None,
    dtype: Annotated[
        str, typer.Option(help="Precision of the network: float32, bfloat16 or float16.")
    ] = "float32",
    plot: Annotated[
        bool,
        typer.Option("--plot", help="Also save an image: frames, waveform, spectrum, onsets."),
    ] = False,
    debug: Debug = False,
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

    - `mfmjt generate clip.mp4 --model weights/mmaudio_small_16k.pth --steps 25 --guidance 4.5`
    """
    began = time.perf_counter()
    with defer_interrupts():
        from mfmjt import media
        from mfmjt.progress import stage_bar
    if video is None and fps is not None:
        raise InputError("--fps is for a folder or pattern of pictures. Give one, or leave it out.")
    source = None if video is None else media.as_source(video, fps)
    paths = _outputs.output_paths(source, output, seed, count)
    with stage_bar(_outputs.STAGE_TITLES) as report:
        report("load", 0.0)
        _outputs.check_outputs(source, paths, plot)
        with defer_interrupts():
            from mfmjt.devices import parse_dtype
            from mfmjt.pipeline import Pipeline
        pipeline = Pipeline.from_pretrained(model, device, parse_dtype(dtype))
        timings = {"load": time.perf_counter() - began}
        mode = cast("GuidanceMode | None", guidance_mode)  # the pipeline checks it
        made = pipeline(source, prompt, steps, guidance, mode, seed, duration, count, report, cache)
        sounds = made if isinstance(made, list) else [made]
        timings |= sounds[0].timings
        began = time.perf_counter()
        report("write", 0.0)
        notes = dict.fromkeys(sounds[0].notes) | _outputs.write_sounds(source, sounds, paths)
        timings["write"] = time.perf_counter() - began
        if plot:
            _outputs.save_plots(source, sounds, paths)
    _outputs.report(sounds, paths, plot, notes, timings)
