"""The command line: `mfmjt generate | check | serve | train | evaluate | convert | data | info`.

Heavy imports happen inside the commands, so that `mfmjt --help` is quick.
"""

from __future__ import annotations

import dataclasses
import json
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperGroup

from mfmjt.errors import InputError, MfmjtError, reason, short
from mfmjt.extract.command import extract
from mfmjt.serve.command import serve

if TYPE_CHECKING:
    import torch

    from mfmjt.meanflow.guidance import GuidanceMode
    from mfmjt.media import Pictures
    from mfmjt.pipeline import Audio

__all__ = ["app", "main"]

INTERRUPTED = 130  # what shells report for a process that Ctrl-C ended
DTYPES = ("float32", "bfloat16", "float16")
STAGE_TITLES = {
    "load": "Loading the model",
    "read": "Reading the video",
    "encode": "Looking and reading",
    "generate": "Making the sound",
    "decode": "Decoding the sound",
    "write": "Writing",
}


class _Commands(TyperGroup):
    """Turns every way a command can end into an exit status and at most one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("Interrupted. No output was left half-written.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                raise  # the parser of arguments ends quietly, as for `mfmjt info | head -1`
            if hasattr(error, "format_message"):  # misuse found by the parser of arguments
                if not error.format_message():
                    raise  # a command without arguments, which shows its help
                message = short(" ".join(error.format_message().split()).rstrip("."), 500)
                typer.echo(f"Error: {message}. See 'mfmjt --help'.", err=True)
                raise typer.Exit(2) from None
            if ctx.obj is True:
                traceback.print_exc()
            if isinstance(error, MfmjtError):
                typer.echo(f"Error: {error}", err=True)
                raise typer.Exit(error.exit_code) from None
            if ctx.obj is not True:
                why = f"{type(error).__name__}: {reason(error, whole=True)}"
                typer.echo(
                    f"Error: mfmjt failed unexpectedly ({why}). "
                    "Run the command again with --debug for the traceback.",
                    err=True,
                )
            raise typer.Exit(1) from None


def _nobody_reads() -> bool:
    """Whether who read the output has gone; a pipe to ffmpeg may have broken just as well."""
    output = select.poll()
    output.register(1, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


app = typer.Typer(
    cls=_Commands,
    help="Sound for video and text, by one step of a multimodal MeanFlow transformer.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Look at the data that models here are trained on.", no_args_is_help=True)
app.add_typer(data, name="data")
app.command()(serve)
app.command()(extract)


def _remember(ctx: typer.Context, debug: bool) -> bool:
    if debug:
        ctx.find_root().obj = True
    return debug


Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_remember)
]
Model = Annotated[str, typer.Option(help="A model that ships, or a folder with one.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda where there is one.")
]

Fps = Annotated[
    str | None,
    typer.Option(help="Pictures per second of a folder or pattern. Default: 25.", metavar="N"),
]


@app.command()
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
            help="A model that ships, a folder with one or with MMAudio's files, or the file of a "
            "network in such a folder, under any name."
        ),
    ] = "nano",
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps what was seen in videos, for the next time."),
    ] = None,
    device: Device = None,
    dtype: Annotated[
        str, typer.Option(help="Arithmetic of the network: float32, bfloat16 or float16.")
    ] = "float32",
    plot: Annotated[
        bool,
        typer.Option("--plot", help="Also save a picture: frames, waveform, spectrum, onsets."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Make sound for a video, a text, or both.

    The video's pictures are copied as they are; its own sound, if any, is replaced. What no
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
    with _undisturbed():
        from mfmjt import media
    if video is None and fps is not None:
        raise InputError("--fps is for a folder or pattern of pictures. Give one, or leave it out.")
    source = None if video is None else media.as_source(video, fps)
    outputs = _output_paths(source, output, seed, count)
    with _bar(STAGE_TITLES) as report:
        report("load", 0.0)
        for path in outputs:
            media.check_output(source, path)
        if plot:
            from mfmjt.plotting import check_matplotlib

            check_matplotlib()
            for path in outputs:
                media.refuse_same(source, path.with_suffix(".png"))
        with _undisturbed():
            from mfmjt.pipeline import Pipeline

        pipeline = Pipeline.from_pretrained(model, device, _dtype(dtype))
        timings = {"load": time.perf_counter() - began}
        made = pipeline(
            source,
            prompt,
            steps,
            guidance,
            None if guidance_mode is None else _guidance_mode(guidance_mode),
            seed,
            duration,
            count,
            report,
            cache,
        )
        sounds = made if isinstance(made, list) else [made]
        notes = dict.fromkeys(sounds[0].notes)
        timings |= sounds[0].timings
        began = time.perf_counter()
        report("write", 0.0)
        for sound, path in zip(sounds, outputs, strict=True):
            if path.suffix.lower() in media.VIDEO_SUFFIXES:
                notes |= dict.fromkeys(sound.mux(source, path))
            else:
                sound.save(path)
        timings["write"] = time.perf_counter() - began
        if plot:
            from mfmjt.evaluate.onsets import detect_onsets
            from mfmjt.plotting import plot_sound

            for sound, path in zip(sounds, outputs, strict=True):
                wave, rate = sound.waveform[0], sound.sample_rate
                frames = None if source is None else media.thumbnails(source, sound.duration)
                onsets = detect_onsets(wave, rate)
                plot_sound(path.with_suffix(".png"), wave, rate, onsets, frames)
    for note in notes:
        typer.echo(f"Note: {note}", err=True)
    for sound, path in zip(sounds, outputs, strict=True):
        pictured = f", with {path.with_suffix('.png')}" if plot else ""
        typer.echo(f"Wrote {path}: {sound.duration:.2f} s of sound, seed {sound.seed}{pictured}.")
    typer.echo(_time_report(sounds[0], timings))


@app.command()
def check(
    video: Annotated[Path, typer.Argument(help="Video file, folder or pattern of pictures.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Check that this file could be written, too."),
    ] = None,
    fps: Fps = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Say what would be read of a video, and what would be copied, without making sound.

    That is: which stream, its codec and size, when its pictures are shown, into which files they
    can be copied as they are, what is left out, and all that is odd, such as damage.

    For example:
    - `mfmjt check clip.mp4`

    - `mfmjt check recording.webm -o out.mp4`

    - `mfmjt check clip.mkv --json`

    - `mfmjt check frames/%04d.png --fps 24`
    """
    with _undisturbed():
        from mfmjt import media
    report = media.check(media.as_source(video, fps), output)
    typer.echo(json.dumps(dataclasses.asdict(report), indent=2) if as_json else str(report))


@app.command()
def train(
    stage: Annotated[str, typer.Argument(help="codec, encoders, features, network or classifier.")],
    recipe: Annotated[
        str, typer.Argument(help="A JSON file, or the name of a recipe that ships.")
    ] = "nano",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, as key=value.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Run one stage of the training of a model; an interrupted stage goes on where it stopped.

    The stages in order: codec, encoders, features, network. The classifier judges the result.

    For example:
    - `mfmjt train codec`

    - `mfmjt train network nano steps=20000 lr=5e-4`

    - `mfmjt train network recipe.json device=cuda`
    """
    with _undisturbed():
        from mfmjt.train.stages import run

    changes = list(overrides or [])
    if "=" in recipe:
        recipe, changes = "nano", [recipe, *changes]
    typer.echo(run(stage, recipe, changes))


@app.command()
def evaluate(
    model: Model = "nano",
    clips: Annotated[int, typer.Option(help="How many held-out clips.")] = 200,
    seed: Annotated[int, typer.Option(help="Decides which clips, and the noise.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Evaluations of the network. Default: as it was trained; 1.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Strength of guidance; 1 is none. Default: 1.5.")
    ] = None,
    guidance_mode: Annotated[
        str | None, typer.Option(help="cfg_scaled, cfg or none. Default: cfg_scaled.")
    ] = None,
    conditions: Annotated[str, typer.Option(help="both, video or text.")] = "both",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    data: Annotated[
        Path | None,
        typer.Option(help="Feature store to judge on, in place of the procedural set."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Metric of your own, as package.module:object. Repeatable."),
    ] = None,
    suite: Annotated[
        Path | None,
        typer.Option(help="Folder for the whole table: reports at 1, 4 and 25 steps."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Flow-matching network of the same size, for the table of --suite."),
    ] = None,
    device: Device = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the figures to this JSON file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Save spectrograms of real and made sound (.svg).")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the table.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Make sound for held-out clips and judge it.

    Of clips of the procedural set, onsets are compared with the known event times, and classes are
    judged by a classifier trained on real sound. Of a feature store, which `mfmjt extract` makes,
    what has a known truth is judged.

    For example:

    - `mfmjt evaluate --clips 40`

    - `mfmjt evaluate --clips 40 --seed 1 --steps 4 --json`

    - `mfmjt evaluate --model output/mine --conditions text --plot gallery.svg`

    - `mfmjt evaluate --model output/mine --data output/store --split validation`

    - `mfmjt evaluate --suite output/results --against flow.safetensors`
    """
    if suite is None and against is not None:
        raise InputError("--against is for the table of --suite. Give --suite FOLDER too.")
    if suite is not None and (data or metric or steps or output or as_json):
        raise InputError(
            "--suite makes a table of its own: leave out --data, --metric, --steps, --output and "
            "--json."
        )
    with _undisturbed():
        from dataclasses import replace

        from mfmjt.device import choose_device
        from mfmjt.evaluate import examples as given
        from mfmjt.evaluate import plots, report, run
        from mfmjt.evaluate.metrics import METRICS, load_metric
        from mfmjt.evaluate.sounds import generate
        from mfmjt.families import open_bundle
        from mfmjt.files import check_writable
        from mfmjt.plotting import check_matplotlib

    for path in (output, plot):
        if path is not None:
            check_writable(path)
    if plot is not None:
        check_matplotlib()
    metrics = (*METRICS, *map(load_metric, metric or ()))
    chosen: dict[str, Any] = {"steps": steps, "guidance": guidance, "mode": guidance_mode}
    with _bar({}) as progress:
        bundle = open_bundle(model).to(choose_device(device))
        sampling = replace(bundle.sampling, **{k: v for k, v in chosen.items() if v is not None})
        if data is not None:
            from mfmjt.train.store import FeatureStore

            store = FeatureStore(data, split)
            examples = given.stored(store, bundle, clips, seed, split, progress=progress)
        else:
            examples = given.procedural(bundle.encoders, clips, seed, split, progress=progress)
        if suite is not None:
            flow = None if against is None else open_bundle(model, against).to(bundle.device)
            reports = run.suite(bundle, flow, suite, examples, sampling=sampling, progress=progress)
            if plot is not None:
                plots.plot_steps(reports, suite / "steps.svg")
        else:
            reports = [
                run.evaluate(
                    bundle,
                    examples,
                    sampling,
                    metrics=metrics,
                    conditions=conditions,
                    model=Path(model).name,
                    progress=progress,
                )
            ]
        if output is not None:
            report.write_report(reports[0], output)
        if plot is not None:
            shown = examples.first(max(plots.GALLERY) + 1)
            made = generate(bundle, shown, sampling, conditions=conditions, progress=progress)
            plots.plot_gallery(shown, made, plot)
    typer.echo(reports[0].to_json() if as_json else report.table(reports, metrics).rstrip())


@app.command()
def convert(
    layout: Annotated[str, typer.Argument(help="Of FILE: mmaudio (published) or mfmjt (ours).")],
    file: Annotated[Path, typer.Argument(help="The network to convert.")],
    to: Annotated[
        Path,
        typer.Option(
            help="File to write in the other layout: .safetensors, or .pth for MMAudio's."
        ),
    ],
    config: Annotated[
        str | None,
        typer.Option(help="Name of the configuration, such as small_16k. Default: inferred."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the stored numbers: float32, bfloat16 or float16.")
    ] = "float32",
    adapter: Annotated[
        Path | None, typer.Option(help="Merge this adapter.safetensors of a fine-tuning first.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Convert a network from MMAudio's published layout to ours, or back.

    Weights are read as tensors only; no code in a file is run. Every parameter is accounted for.

    For example:
    - `mfmjt convert mmaudio mmaudio_small_16k.pth --to small_16k.safetensors`

    - `mfmjt convert mmaudio mine.pth --to mine.safetensors --config large_44k_v2`

    - `mfmjt convert mfmjt mine.safetensors --to mmaudio_mine.pth`
    """
    with _undisturbed():
        from mfmjt.convert import from_mmaudio, to_mmaudio

    ways = {"mmaudio": from_mmaudio, "mfmjt": to_mmaudio}
    if layout not in ways:
        raise InputError(f"There is no layout {layout!r}. Choose one of {', '.join(ways)}.")
    done = ways[layout](file, to, config, _dtype(dtype), adapter)
    for note in done.notes:
        typer.echo(f"Note: {note}", err=True)
    typer.echo(f"Wrote {done.path}: {done.name}, {done.parameters / 1e6:.1f} M parameters.")


@data.command()
def preview(
    out: Annotated[Path, typer.Argument(help="Folder to write to.")] = Path("demo/preview"),
    clips: Annotated[int, typer.Option(help="How many clips; 12 show each source once.")] = 12,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    seed: Annotated[int, typer.Option(help="Another seed is another endless set.")] = 0,
    size: Annotated[int, typer.Option(help="Pixels along each side of the frames.")] = 256,
    debug: Debug = False,
) -> None:
    """Write clips of the procedural set to watch and hear, and a contact sheet.

    For example:
    - `mfmjt data preview`

    - `mfmjt data preview out --clips 24 --split test`
    """
    from mfmjt.data.preview import preview as write_preview

    with _bar({}) as report:
        written = write_preview(
            out, clips, split, seed, size, lambda done, total: report("Drawing", done / total)
        )
    typer.echo(f"Wrote {len(written)} files to {out}; begin with {written[0]}.")


@app.command()
def info(debug: Debug = False) -> None:
    """Print versions, hardware, and what runs where.

    For example: `mfmjt info`
    """
    from mfmjt.info import report

    typer.echo(report())


def main() -> None:
    """Run the command line; the entry point of the installed `mfmjt`."""
    # An end from outside also runs the clean-up of files that are being written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app(prog_name="mfmjt")


def _output_paths(
    source: Path | Pictures | None, output: Path | None, seed: int, count: int
) -> list[Path]:
    """One path for each sound; several are told apart by their seeds."""
    from mfmjt.media import default_suffix

    default = Path("sound.wav")
    if source is not None and (output is None or output.is_dir()):
        default = Path(f"{source.stem}.mfmjt{default_suffix(source)}")
    path = default if output is None else output / default if output.is_dir() else output
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{seed + i}{path.suffix}") for i in range(count)]


def _dtype(name: str) -> torch.dtype:
    import torch

    if name not in DTYPES:
        raise InputError(f"There is no dtype {name!r}. Choose one of {', '.join(DTYPES)}.")
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def _guidance_mode(name: str) -> GuidanceMode:
    from mfmjt.meanflow.guidance import check_mode

    check_mode(name)
    return cast("GuidanceMode", name)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold Ctrl-C back while libraries load: native ones, interrupted half-way, crash."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt


@contextmanager
def _bar(titles: dict[str, str]) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal's stderr, nothing elsewhere; yields (stage, fraction) -> None."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=len(titles) or 1)
        order = list(titles)

        def report(stage: str, fraction: float) -> None:
            before = order.index(stage) if order else 0
            progress.update(task, description=titles.get(stage, stage), completed=before + fraction)

        yield report


def _time_report(sound: Audio, timings: dict[str, float]) -> str:
    """Where the time went, one line a stage, and both real-time factors."""
    rows = [f"  {STAGE_TITLES[stage]:<20}{seconds:8.3f} s" for stage, seconds in timings.items()]
    return "\n".join(
        [
            *rows,
            f"Real-time factor: {sound.rtf_generator:.4f} generator only, "
            f"{sound.rtf_end_to_end:.4f} end to end (seconds of work per second of sound; "
            "loading and writing apart).",
        ]
    )


if __name__ == "__main__":
    main()
