"""What MMAudio's real ends cost on a CPU, with random weights of the published sizes.

`python -m bench.model.bench_ends --out DIR` appends rows to `DIR/ends.jsonl`, each with the bar it
is held to:

vocoder  BigVGAN-16k, 8 s of sound: seconds per second of sound (0.5); beside it with convolutions
         as exact as PyTorch's, in plain PyTorch, how far all three are apart, and the least that
         its multiplications, done one by one, could take at the rate of a large product here
         in float32, which the bar is for, and beside it in bfloat16
text     a prompt to 8 s of sound with small_16k, one guided step, everything counted (0.6), in
         bfloat16 as MMAudio's demo runs; beside it in float32, and only the network in bfloat16
video    an 8 s video of 1280x720 through reading, resizing, normalising for both encoders and
         writing it with sound: CPU seconds beside the encoders (1.5)
memory   peak of a process that makes sound for 10 minutes of video over that for 1 (1.2), nano

Set GOMP_SPINCOUNT=100, so that idle threads are not counted as work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.machine import environment
from mfmjt import media
from mfmjt.codec import VAE, BigVGAN, MMAudioCodec
from mfmjt.encoders import (
    CLIP,
    CLIPConfig,
    MMAudioEncoders,
    Synchformer,
    SynchformerConfig,
)
from mfmjt.encoders.base import stream_options
from mfmjt.encoders.tokenizer import Tokenizer
from mfmjt.kernels import reference
from mfmjt.model import MFMJT
from mfmjt.pipeline import Audio, Pipeline

__all__ = ["main"]

SECONDS = 8
PARTS = ("vocoder", "text", "video", "memory")
Measured = tuple[float, dict[str, Any]]
"""What the bar is for, and the rest of the row."""
BARS = {"vocoder": 0.5, "text": 0.6, "video": 1.5, "memory": 1.2}


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this one [all]")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch [2]")
    parser.add_argument("--calls", type=int, default=3, help="of each, after one to warm up [3]")
    parser.add_argument("--smoke", action="store_true", help="everything tiny, to see it run")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    given.out.mkdir(parents=True, exist_ok=True)
    stamp = environment(torch.device("cpu")) | {"spin": os.environ.get("GOMP_SPINCOUNT")}
    measures = {"vocoder": _vocoder, "text": _text, "video": _video, "memory": _memory}
    for part in given.part or PARTS:
        value, about = measures[part](given.calls, given.smoke)
        value = _short(value)
        row = {"part": part, "value": value, "bar": BARS[part], "met": value <= BARS[part], **about}
        line = json.dumps(row | {"smoke": given.smoke, "environment": stamp})
        with (given.out / "ends.jsonl").open("a") as file:
            file.write(line + "\n")
        print(json.dumps(row), flush=True)
    return 0


def _timed(call: Callable[[], object], calls: int) -> dict[str, Any]:
    """Wall and CPU seconds of a call: the medians and the least, after one that is not counted."""
    call()
    taken = []
    for _ in range(calls):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    walls, cpus = zip(*taken, strict=True)
    return {
        "wall_s_p50": _short(statistics.median(walls)),
        "wall_s_min": _short(min(walls)),
        "cpu_s_p50": _short(statistics.median(cpus)),
        "cpu_s_min": _short(min(cpus)),
        "calls": calls,
    }


@torch.inference_mode()
def _vocoder(calls: int, smoke: bool) -> Measured:
    seconds = 0.1 if smoke else SECONDS
    vocoder = BigVGAN("16k").eval()
    mel = torch.randn(1, 80, round(seconds * 62.5))
    times = _timed(lambda: vocoder(mel), calls)
    sound = vocoder(mel)
    vocoder.set_fast(False)
    direct = _timed(lambda: vocoder(mel), calls)
    exact = vocoder(mel)
    with reference():
        plain = _timed(lambda: vocoder(mel), 1)
        theirs = vocoder(mel)
    # Counted on one frame: every layer's work is proportional to the length.
    with reference(), FlopCounterMode(display=False) as counter:
        vocoder(mel[..., :1])
    flops = counter.get_total_flops() * mel.shape[2]
    side = 256 if smoke else 2048
    a, b = torch.randn(side, side), torch.randn(side, side)
    rate = 2 * side**3 / _timed(lambda: a @ b, 5)["wall_s_min"]
    vocoder.to(torch.bfloat16)
    rough = _timed(lambda: vocoder(mel), calls)
    others = {"": sound, "direct_": exact, "bfloat16_": vocoder(mel).float()}
    apart = {
        f"{name}relative_difference": _short(float((y - theirs).norm() / theirs.norm()))
        for name, y in others.items()
    }
    return times["wall_s_p50"] / seconds, {
        "what": "seconds per second of sound, BigVGAN-16k, float32",
        **times,
        "direct_value": _short(direct["wall_s_p50"] / seconds),
        "direct_cpu_s_p50": direct["cpu_s_p50"],
        "eager_value": _short(plain["wall_s_p50"] / seconds),
        "eager_cpu_s_p50": plain["cpu_s_p50"],
        "bfloat16_value": _short(rough["wall_s_p50"] / seconds),
        **apart,
        "gflop": _short(flops / 1e9),
        "matmul_gflop_per_s": _short(rate / 1e9),
        "floor_at_matmul_rate": _short(flops / rate / seconds),
    }


def _text(calls: int, smoke: bool) -> Measured:
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
        audio = pipe(
            prompt="a dog barks", steps=1, guidance=1.5, mode="cfg_scaled", duration=seconds
        )
        assert isinstance(audio, Audio)
        made.append(audio)

    def stages() -> dict[str, float]:
        named = ("encode", "generate", "decode")
        found = {f"{n}_s": statistics.median(a.timings[n] for a in made[1:]) for n in named}
        made.clear()
        return {name: _short(value) for name, value in found.items()}

    exact = _timed(call, calls)["wall_s_p50"] / seconds, stages()
    pipe = Pipeline(net, codec, encoders, "cpu", torch.bfloat16, compile=True)
    mixed = _timed(call, calls)["wall_s_p50"] / seconds, stages()
    codec.cast(torch.bfloat16)
    encoders.cast(torch.bfloat16)
    about = _timed(call, calls)
    return about["wall_s_p50"] / seconds, {
        "what": "seconds per second of sound, text to waveform, small_16k, one guided step, in "
        "bfloat16 as MMAudio's demo; beside it with only the network in bfloat16, and in float32",
        **about,
        **stages(),
        "bfloat16_network_value": _short(mixed[0]),
        **{f"bfloat16_network_{name}": value for name, value in mixed[1].items()},
        "float32_value": _short(exact[0]),
        **{f"float32_{name}": value for name, value in exact[1].items()},
    }


def _merges(folder: Path) -> Path:
    """A list of merges of the published length, for how long a text takes does not depend on it."""
    path = folder / "merges.txt"
    path.write_text("\n".join(["#version", *(f"x{i} y{i}" for i in range(48894))]))
    return path


class _Blind(nn.Module):
    """In place of an encoder: takes what it is given and looks at none of it."""

    class config:
        frames = 16

    def encode_image(self, frames: Tensor) -> Tensor:
        return frames.new_zeros(len(frames), 1024)

    def forward(self, frames: Tensor) -> Tensor:
        return frames.new_zeros(*frames.shape[:2], 8, 768)


def _video(calls: int, smoke: bool) -> Measured:
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

        times = _timed(call, calls)
        megabytes = clip.stat().st_size / 1e6
    return times["cpu_s_p50"], {
        "what": "CPU seconds: decode, resize, normalise, mux; 8 s, 1280x720, 25 fps, H.264",
        **times,
        "file_mb": _short(megabytes),
    }


def _write_video(path: Path, frames: int, size: tuple[int, int], preset: str = "fast") -> Path:
    """H.264 of coarse noise that moves over a slope: motion, texture and some detail."""
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


def _memory(calls: int, smoke: bool) -> Measured:
    peaks = {}
    with tempfile.TemporaryDirectory() as name:
        for minutes in (1, 10):
            seconds = minutes * (12 if smoke else 60)
            clip = _write_video(Path(name) / f"{minutes}.mp4", seconds * 25, (48, 64), "ultrafast")
            threads = str(torch.get_num_threads())
            command = [sys.executable, "-c", PEAK, str(clip), f"{name}/out.mp4", threads]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
            )
            peaks[minutes] = float(done.stdout)
    return peaks[10] / peaks[1], {
        "what": "peak memory of making sound for 10 minutes of video over that for 1, nano",
        **{f"peak_mib_{minutes}_min": _short(peak) for minutes, peak in peaks.items()},
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    sys.exit(main())
