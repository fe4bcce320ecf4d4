"""Measure what MMAudio's codec and encoders cost on a CPU, with random weights of their sizes.

Rows are appended to `DIR/ends.jsonl`, each with the target that its `value` is held to:

    vocoder  BigVGAN-16k, 8 s of sound: seconds per second of sound; beside it with convolutions as
             exact as PyTorch's, in plain PyTorch, how far all three are apart, and the least that
             its multiplications, done one by one, could take at the rate of a large matmul here;
             in float32, which the target is for, and beside it in bfloat16
    text     a prompt to 8 s of sound with small_16k, one guided step, everything counted, in
             bfloat16 as MMAudio's demo runs; beside it in float32, and only the network in bfloat16
    video    an 8 s video of 1280x720 through reading, resizing, normalizing for both encoders and
             writing it with sound: CPU seconds beside the encoders
    memory   peak of a process that makes sound for 10 minutes of video over that for 1, nano

The exit status is 1 if a target is missed. Set OMP_NUM_THREADS, and GOMP_SPINCOUNT=100 so that idle
threads are not taken for work.

Examples:
  python -m bench mmaudio --out /tmp/mmaudio
  python -m bench mmaudio --out /tmp/mmaudio --part video --smoke
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import parser
from bench.clock import on_cpu, take_turns
from bench.machine import Ceilings, environment
from bench.networks.given import CPU, Target, hold, printed_by_python
from bench.rows import Row, Rows
from mfmjt import kernels, media
from mfmjt.codec import VAE, BigVGAN, MMAudioCodec
from mfmjt.encoders import CLIP, CLIPConfig, MMAudioEncoders, Synchformer, SynchformerConfig
from mfmjt.encoders.base import stream_options
from mfmjt.encoders.tokenizer import Tokenizer
from mfmjt.model import MFMJT
from mfmjt.pipeline import Audio, Pipeline

__all__ = ["TARGETS", "main"]

SECONDS = 8
STEP: Row = {"steps": 1, "guidance": 1.5, "mode": "cfg_scaled"}


LIMITS = {"vocoder": 0.5, "text": 0.6, "video": 1.5, "memory": 1.2}
TARGETS = {part: Target(part, "<=", n, "value", {"part": part}) for part, n in LIMITS.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and measure; return the exit status."""
    usage = parser("mmaudio", __doc__, out="", smoke=True)
    usage.add_argument("--part", choices=LIMITS, action="append", help="only this one [all]")
    options = usage.parse_args(argv)
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    about = {"smoke": options.smoke, "environment": environment(CPU)}
    rows = Rows(options.out / "ends.jsonl", ("part",), about)
    measures = {"vocoder": _vocoder, "text": _text, "video": _video, "memory": _memory}
    measured = []
    for part in options.part or LIMITS:
        row = {"part": part, "bar": LIMITS[part], **measures[part](options.smoke)}
        measured.append(rows.add(row))
        print({k: v for k, v in measured[-1].items() if k not in about}, flush=True)
    return hold(measured, [TARGETS[row["part"]] for row in measured])


def _timed(call: Callable[[], object]) -> Row:
    """Return quantiles of the milliseconds of a call, after one that is not counted."""
    call()
    return vars(take_turns({"": on_cpu(call)}, 0.0)[""])


@torch.inference_mode()
def _vocoder(smoke: bool) -> Row:
    seconds = 0.1 if smoke else SECONDS
    vocoder = BigVGAN("16k").eval()
    mel = torch.randn(1, 80, round(seconds * 62.5))
    times: dict[str, Row] = {}
    sounds: dict[str, Tensor] = {}

    def measure(kind: str) -> None:
        times[kind], sounds[kind] = _timed(lambda: vocoder(mel)), vocoder(mel).float()

    measure("")
    vocoder.set_fast(False)
    measure("direct_")
    with kernels.reference():
        measure("eager_")
        # Counted on one frame: every layer's work is proportional to the length.
        with FlopCounterMode(display=False) as counter:
            vocoder(mel[..., :1])
    vocoder.to(torch.bfloat16)
    measure("bfloat16_")
    flops = counter.get_total_flops() * mel.shape[2]
    rate = 1e12 * Ceilings.measure(CPU, (torch.float32,), smoke).gemm_tflops["float32"]
    row: Row = {
        "what": "seconds per second of sound, BigVGAN-16k, float32",
        **times[""],
        "gflop": flops / 1e9,
        "matmul_gflop_per_s": rate / 1e9,
        "floor_at_matmul_rate": flops / rate / seconds,
    }
    theirs = sounds["eager_"]
    for kind, y in sounds.items():
        row[f"{kind}value"] = times[kind]["ms_p50"] / 1e3 / seconds
        row[f"{kind}cpu_ms_p50"] = times[kind]["cpu_ms_p50"]
        row[f"{kind}relative_difference"] = float((y - theirs).norm() / theirs.norm())
    return row


def _text(smoke: bool) -> Row:
    seconds = 0.5 if smoke else SECONDS
    # The towers that look at pictures are not asked.
    clip = CLIP(CLIPConfig(image_dim=80, image_depth=1, image_heads=1))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer(_merges(Path(folder)))
    encoders = MMAudioEncoders(clip, Synchformer(SynchformerConfig(depth=1)), tokenizer)
    codec = MMAudioCodec("16k", VAE("16k"), BigVGAN("16k"))
    net = MFMJT.from_config("small_16k")
    nn.init.normal_(net.r_embed.mlp[2].get_parameter("weight"), std=0.02)  # made for one step
    pipe = Pipeline(net, codec, encoders, "cpu", compile=True)
    made: list[Audio] = []

    def call() -> None:
        audio = pipe(prompt="a dog barks", duration=seconds, **STEP)
        assert isinstance(audio, Audio)
        made.append(audio)

    def measure(kind: str) -> Row:
        """Return seconds per second of sound, and those of the stages, named after `kind`."""
        made.clear()
        row = {f"{kind}value": _timed(call)["ms_p50"] / 1e3 / seconds}
        for stage in ("encode", "generate", "decode"):
            row[f"{kind}{stage}_s"] = statistics.median(a.timings[stage] for a in made[1:])
        return row

    row = measure("float32_")
    pipe = Pipeline(net, codec, encoders, "cpu", torch.bfloat16, compile=True)
    row |= measure("bfloat16_network_")
    codec.cast(torch.bfloat16)
    encoders.cast(torch.bfloat16)
    return {
        "what": "seconds per second of sound, text to waveform, small_16k, one guided step, in "
        "bfloat16 as MMAudio's demo; beside it with only the network in bfloat16, and in float32",
        **row,
        **measure(""),
    }


def _merges(folder: Path) -> Path:
    """Write merges, as many as published: how long a text takes does not depend on which."""
    path = folder / "merges.txt"
    path.write_text("\n".join(["#version", *(f"x{i} y{i}" for i in range(48894))]))
    return path


class _Blind(nn.Module):
    """Stands in for an encoder: takes what it is given and looks at none of it."""

    class config:
        frames = 16

    def encode_image(self, frames: Tensor) -> Tensor:
        return frames.new_zeros(len(frames), 1024)

    def forward(self, frames: Tensor) -> Tensor:
        return frames.new_zeros(*frames.shape[:2], 8, 768)


def _video(smoke: bool) -> Row:
    seconds, size = (1, (72, 128)) if smoke else (SECONDS, (720, 1280))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = _write_video(folder / "clip.mp4", seconds * 25, size)
        with_tokens = Tokenizer(_merges(folder))
        encoders = MMAudioEncoders(_Blind(), _Blind(), with_tokens)  # type: ignore[arg-type]
        sound = np.zeros((1, seconds * 16_000), np.float32)
        wanted = stream_options(encoders.frame_specs)

        @torch.inference_mode()
        def call() -> None:
            seen: tuple[list[Tensor], list[Tensor]] = ([], [])
            for block in media.VideoStream(clip, **wanted):
                for kept, pieces in zip(seen, block, strict=True):
                    kept += pieces
            encoders.encode_frames(torch.cat(seen[0])[None])
            encoders.encode_sync(torch.cat(seen[1])[None])
            media.mux(clip, sound, 16_000, folder / "out.mp4")

        times = _timed(call)
        megabytes = clip.stat().st_size / 1e6
    return {
        "value": times["cpu_ms_p50"] / 1e3,
        "what": "CPU seconds: decode, resize, normalise, mux; 8 s, 1280x720, 25 fps, H.264",
        **times,
        "file_mb": megabytes,
    }


def _write_video(path: Path, frames: int, size: tuple[int, int], preset: str = "fast") -> Path:
    """Write H.264 of coarse noise that moves over a slope: motion, texture and some detail."""
    height, width = size
    noise = np.random.default_rng(0).integers(0, 120, (height // 8, width // 8 + 40, 3), np.uint8)
    slope = np.linspace(0, 120, width, dtype=np.uint8)[None, :, None]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": preset}
        for i in range(frames):
            part = noise[:, i % 40 : i % 40 + width // 8]
            picture = part.repeat(8, 0).repeat(8, 1) + slope
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


PEAK = """
import re, sys, torch
from pathlib import Path
from mfmjt.pipeline import Pipeline
torch.set_num_threads(int(sys.argv[3]))
audio = Pipeline.from_pretrained("nano", device="cpu")(video=sys.argv[1])
audio.mux(sys.argv[1], sys.argv[2])
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
"""


def _memory(smoke: bool) -> Row:
    peaks = {}
    with tempfile.TemporaryDirectory() as name:
        for minutes in (1, 10):
            seconds = minutes * (12 if smoke else 60)
            clip = _write_video(Path(name) / f"{minutes}.mp4", seconds * 25, (48, 64), "ultrafast")
            arguments = (str(clip), f"{name}/out.mp4", str(torch.get_num_threads()))
            peaks[minutes] = float(printed_by_python("-c", PEAK, *arguments))
    return {
        "value": peaks[10] / peaks[1],
        "what": "peak memory of making sound for 10 minutes of video over that for 1, nano",
        **{f"peak_mib_{minutes}_min": peak for minutes, peak in peaks.items()},
    }
