"""What one-step generation costs: latents, waveform, many at once, and a process from its start.

    latents     noise to latents, the conditions' features given, one clip or a batch
    waveform    noise to samples, likewise
    end_to_end  `examples/ball_wood.mp4` to samples with the model that ships, by stage
    cold_start  a new process: import, load, the first 8 s of sound from a text, on the CPU or GPU
    launches    kernels of the latents' step at batch 1, counted (`bench.launches`)

The providers of the first two, which take turns on the same work:

    eager_25       plain PyTorch, 25 Euler steps, one pass after the other, as MMAudio samples
    eager          plain PyTorch, one step, one pass after the other
    compile        that through torch.compile; on a GPU mode="reduce-overhead", which makes graphs
    max_autotune   that with mode="max-autotune", on a GPU
    mfmjt_eager    our ops under the network as it is trained, both passes one batch
    mfmjt          `meanflow.OneStep`: frozen, on a GPU one graph

What one step gives is verified before it is timed: against the same weights in float32, no provider
may err twice as much as plain PyTorch in its dtype. Weights are random; how long a step takes does
not depend on them. DIR/generate.jsonl: rows that are there already are not measured again. The
exit status is 1 if a bar is missed, or a provider wrong. Set OMP_NUM_THREADS, and
GOMP_SPINCOUNT=100 so that idle threads are not taken for work.

    python -m bench.model.bench_generate --out /tmp/generate
    python -m bench.model.bench_generate --out /tmp/generate --network small_16k --what latents
    python -m bench.model.bench_generate --out /tmp/generate --device cuda --minutes 8
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.cases import TINY
from bench.harness import (
    Rows,
    Sampler,
    cuda_events,
    dtype_name,
    environment,
    on_cpu,
    peak_mib,
    take_turns,
)
from bench.providers import OURS
from mfmjt import kernels, meanflow
from mfmjt.codec import VAE, BigVGAN, MMAudioCodec, NanoCodec
from mfmjt.errors import InputError
from mfmjt.model import MFMJT
from mfmjt.model.config import CONFIGS

__all__ = ["BARS", "KEY", "Plan", "Work", "main", "missed", "plans", "time_generation"]

KEY = ("what", "network", "provider", "batch", "dtype", "device", "threads")
ROOT = Path(__file__).parents[2]
CLIP = ROOT / "examples" / "ball_wood.mp4"
SECONDS = 8
"""Of sound that a network's own length is."""
BATCHES = (1, 8, 32, 128)

BARS: dict[str, tuple[str, float]] = {
    "CPU, small_16k, latents, seconds": ("<=", 0.40),
    "CPU, nano end to end, seconds per second of sound": ("<=", 0.15),
    "launches, small_16k": ("<=", 110),
    "GPU, small_16k, latents, ms": ("<=", 0.6),
    "GPU, large_44k_v2, latents, ms": ("<=", 2.6),
    "GPU, small_16k, waveform, ms": ("<=", 5.0),
    "GPU, small_16k, latents, clips a second": (">=", 3000.0),
    "GPU, small_16k, latents, eager over mfmjt": (">=", 10.0),
}

Row = dict[str, Any]


class Plan(NamedTuple):
    """What to time of a network.

    Attributes:
        network: A named configuration.
        what: "latents" or "waveform".
        batch: Clips at once.
        providers: Who.
    """

    network: str
    what: str
    batch: int
    providers: tuple[str, ...]


def plans(device: torch.device) -> Iterator[Plan]:
    """What is timed by default, what has a bar first."""
    everyone = (OURS, "eager", "mfmjt_eager", "compile", "max_autotune", "eager_25")
    few = (OURS, "eager")
    if device.type == "cpu":
        yield Plan("small_16k", "latents", 1, (OURS, "eager", "mfmjt_eager", "compile"))
        yield Plan("nano", "latents", 1, (OURS, "eager", "mfmjt_eager", "compile", "eager_25"))
        yield Plan("nano", "waveform", 1, few)
        yield Plan("nano", "latents", 8, few)
        yield Plan("small_44k", "latents", 1, few)
        yield Plan("small_16k", "latents", 4, few)
        yield Plan("small_16k", "latents", 1, ("eager_25",))
        yield Plan("medium_44k", "latents", 1, few)
        yield Plan("small_16k", "waveform", 1, few)
        return
    yield Plan("small_16k", "latents", 1, everyone)
    yield Plan("small_16k", "waveform", 1, few)
    for batch in BATCHES[1:]:
        yield Plan("small_16k", "latents", batch, few)
    yield Plan("large_44k_v2", "latents", 1, everyone)
    for name in ("nano", "small_44k", "medium_44k", "large_44k"):
        yield Plan(name, "latents", 1, everyone)
    yield Plan("nano", "waveform", 1, few)
    for name in ("nano", "large_44k_v2"):
        for batch in BATCHES[1:]:
            yield Plan(name, "latents", batch, few)


@dataclass
class Work:
    """A network, its codec and what it is called with.

    Attributes:
        net: The network, in the dtype that is timed.
        codec: Of its latents; None for latents alone.
        z: Noise (B, N, C) in float32.
        cond: Features.
    """

    net: MFMJT
    codec: NanoCodec | MMAudioCodec | None
    z: Tensor
    cond: dict[str, Tensor]

    @classmethod
    def make(cls, plan: Plan, device: torch.device, dtype: torch.dtype, tiny: bool = False) -> Work:
        """Random weights, none of them zero, and random features."""
        torch.manual_seed(0)
        net = MFMJT.from_config(plan.network, **(TINY if tiny else {}))
        with torch.no_grad():
            for parameter in net.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
        net = net.eval().requires_grad_(False).to(device, dtype)
        c, length = net.config, 20 if tiny else net.config.latent_length
        video, sync = c.lengths(length)
        sizes = {
            "video": (video, c.video_dim),
            "sync": (sync, c.sync_dim),
            "text": (c.text_length, c.text_dim),
        }
        cond = {
            name: torch.randn(plan.batch, *size, device=device, dtype=dtype)
            for name, size in sizes.items()
        }
        z = torch.randn(plan.batch, length, c.latent_dim, device=device)
        codec = _codec(plan.network).to(device) if plan.what == "waveform" else None
        return cls(net, codec, z, cond)

    def call(self, provider: str) -> Callable[[], Tensor]:
        """What a provider does.

        Raises:
            InputError: There is no such provider.
        """
        latents = self._latents(provider)
        if self.codec is None:
            return lambda: latents(self.z, self.cond)
        decode: Callable[[Tensor], Tensor] = self.codec.decode
        if provider == OURS:
            decode = meanflow.capture.Captured(decode)

        @torch.no_grad()
        def waveform() -> Tensor:
            if provider.startswith(OURS):
                return decode(latents(self.z, self.cond))
            with kernels.reference():
                return decode(latents(self.z, self.cond))

        return waveform

    def _latents(self, provider: str) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
        if provider in (OURS, "mfmjt_eager"):
            step = meanflow.OneStep(self.net, compile=provider == OURS)
            return lambda z, cond: step(z, **cond)
        function: Callable[..., Tensor]
        if provider == "eager":
            function = _one_step
        elif provider == "eager_25":
            function = _twenty_five_steps
        elif provider == "compile":
            on_gpu = self.z.device.type == "cuda"
            function = torch.compile(_one_step, mode="reduce-overhead" if on_gpu else "default")
        elif provider == "max_autotune":
            function = torch.compile(_one_step, mode="max-autotune")
        else:
            raise InputError(f"There is no provider {provider!r}. See --help.")
        net = self.net

        def call(z: Tensor, cond: dict[str, Tensor]) -> Tensor:
            with torch.no_grad(), kernels.reference():
                return function(net, z, cond)

        return call


def _codec(network: str) -> NanoCodec | MMAudioCodec:
    if network == "nano":
        return NanoCodec().eval().requires_grad_(False)
    mode = "16k" if CONFIGS[network].sample_rate == 16_000 else "44k"
    codec = MMAudioCodec(mode, VAE(mode), BigVGAN(mode))
    return codec.eval().requires_grad_(False)


def _off(z: Tensor) -> dict[str, Tensor]:
    no = torch.zeros(z.shape[0], dtype=torch.bool, device=z.device)
    return {"video_mask": no, "text_mask": no}


def _one_step(net: MFMJT, z: Tensor, cond: dict[str, Tensor]) -> Tensor:
    u_c, u_0 = net(z, 0.0, 1.0, **cond), net(z, 0.0, 1.0, **cond, **_off(z))
    return z - meanflow.guide(u_c, u_0, 1.5, "cfg_scaled")


def _twenty_five_steps(net: MFMJT, z: Tensor, cond: dict[str, Tensor]) -> Tensor:
    features, no = (cond["video"], cond["sync"], cond["text"]), _off(z)["video_mask"]
    given = net.conditions(*features)
    null = net.conditions(*features, video_mask=no, text_mask=no)
    steps = 25
    for i in range(steps, 0, -1):
        t = i / steps
        u_c, u_0 = net(z, t, t, cond=given), net(z, t, t, cond=null)
        z = z - meanflow.guide(u_c, u_0, 4.5, "cfg") / steps
    return z


def time_generation(
    rows: Rows,
    device: torch.device,
    end: float,
    wanted: list[Plan],
    dtype: torch.dtype = torch.bfloat16,
    tiny: bool = False,
) -> bool:
    """Verify and time what is not in `rows` yet; return whether all is there.

    Args:
        rows: Identified by `KEY`.
        device: Where.
        end: `time.monotonic()` a minute before which to stop.
        wanted: What.
        dtype: Of network and features.
        tiny: Nothing of real size.
    """
    for plan in wanted:
        about = {
            "what": plan.what,
            "network": plan.network,
            "batch": plan.batch,
            "dtype": dtype_name(dtype),
            "device": device.type,
            "threads": torch.get_num_threads(),
        }
        left = [name for name in plan.providers if not rows.has(**about, provider=name)]
        if not left:
            continue
        if time.monotonic() > end - 60 and not tiny:
            return False
        _compare(rows, plan, left, device, dtype, tiny, about)
    return True


@torch.no_grad()
def _compare(
    rows: Rows,
    plan: Plan,
    providers: list[str],
    device: torch.device,
    dtype: torch.dtype,
    tiny: bool,
    about: Row,
) -> None:
    """A row for each provider; what fails, and why, is one too."""
    work = Work.make(plan, device, dtype, tiny)
    torch.compiler.reset()
    calls: dict[str, Callable[[], Tensor]] = {}
    found: dict[str, Tensor] = {}

    def refuse(provider: str, status: str, reason: str) -> None:
        rows.add({**about, "provider": provider, "status": status, "reason": reason})
        print(*about.values(), provider, status, reason, flush=True)

    for provider in providers:
        try:
            call = work.call(provider)
            found[provider] = call()
            calls[provider] = call
        except (RuntimeError, NotImplementedError) as error:
            refuse(provider, "unsupported", str(error).strip().partition("\n")[0][:200])
    errors = _verified(work, plan, found, dtype)
    samplers: dict[str, Sampler] = {}
    peaks: dict[str, float | None] = {}
    for provider, call in calls.items():
        if provider in errors:
            off, limit = errors[provider]
            if not off <= limit:
                refuse(provider, "wrong", f"relative error {off:.3g}, allowed {limit:.3g}")
                continue
        peaks[provider] = peak_mib(call, device)
        samplers[provider] = cuda_events(call, device) if device.type == "cuda" else on_cpu(call)
    slow = device.type == "cpu" and not tiny
    for provider, timing in take_turns(samplers, 6.0 if slow else 0.0 if tiny else 1.5).items():
        more = {
            "provider": provider,
            "status": "ok",
            "relative_error": _short(errors[provider][0]) if provider in errors else None,
            "peak_mib": peaks[provider],
            "clips_per_s": _short(1e3 * plan.batch / timing.ms_p50),
        }
        row = rows.add({**about, **more}, timing)
        print(
            *about.values(),
            provider,
            f"{row['ms_p50']} ms (host {row['cpu_ms_p50']} ms)",
            flush=True,
        )


def _verified(
    work: Work, plan: Plan, found: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, tuple[float, float]]:
    """Relative errors of latents and what they may be; of 25 steps there is no claim."""
    if plan.what != "latents":
        return {}
    exact = Work(
        MFMJT(work.net.config).to(work.z.device).eval(),
        None,
        work.z,
        {name: value.float() for name, value in work.cond.items()},
    )
    exact.net.load_state_dict({k: v.float() for k, v in work.net.state_dict().items()})
    truth = exact.call("eager")()
    scale = float(truth.norm())

    def error(result: Tensor) -> float:
        return float((result.float() - truth).norm()) / scale

    plain = error(found["eager"] if "eager" in found else work.call("eager")())
    limit = 2 * plain + 8 * torch.finfo(torch.float32).eps
    return {name: (error(x), limit) for name, x in found.items() if name != "eager_25"}


def _end_to_end(device: torch.device, calls: int) -> Row:
    from mfmjt.pipeline import Audio, Pipeline

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = Pipeline.from_pretrained("nano", device, dtype, compile=True)
    taken: list[dict[str, float]] = []
    length = 0.0
    for _ in range(calls + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        audio = pipe(video=CLIP, prompt="a wooden ball bounces")
        assert isinstance(audio, Audio)
        length = audio.duration
        whole = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        taken.append(whole | audio.timings)
    medians = {f"{k}_s": statistics.median(t[k] for t in taken[1:]) for k in taken[0]}
    row = {name: _short(value) for name, value in medians.items()}
    return row | {"seconds": length, "rtf": _short(medians["wall_s"] / length), "calls": calls}


COLD = """
import time
began = time.perf_counter()
import sys, mfmjt
imported = time.perf_counter()
pipe = mfmjt.Pipeline.from_pretrained("nano", device=sys.argv[1])
loaded = time.perf_counter()
pipe(prompt="rain falls")
print(imported - began, loaded - imported, time.perf_counter() - loaded)
"""


def _cold_start(device: torch.device, calls: int) -> Row:
    taken = []
    for _ in range(calls):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", COLD, device.type],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        taken.append((time.perf_counter() - began, *map(float, done.stdout.split())))
    names = ("process_s", "import_s", "load_s", "first_sound_s")
    columns = zip(names, zip(*taken, strict=True), strict=True)
    return {name: _short(statistics.median(column)) for name, column in columns} | {"calls": calls}


def _launches(network: str) -> Row:
    done = subprocess.run(
        [sys.executable, "-m", "bench.launches", "--network", network, "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if not done.stdout.strip():
        return {"status": "unsupported", "reason": (done.stderr.strip() or "?").splitlines()[-1]}
    counted = json.loads(done.stdout)
    return {"launches": counted["launches"], "triton": counted["triton"]}


def missed(rows: list[Row]) -> list[str]:
    """The bars that these rows miss, each with what was measured."""
    good = [row for row in rows if row.get("status") == "ok"]

    def of(**fields: Any) -> list[Row]:
        return [row for row in good if all(row.get(k) == v for k, v in fields.items())]

    measured: dict[str, float] = {}

    def take(bar: str, found: list[Row], value: Callable[[Row], float]) -> None:
        if found:
            best = max if BARS[bar][0] == ">=" else min
            measured[bar] = best(value(row) for row in found)

    small = {"network": "small_16k", "provider": OURS}
    step = {"what": "latents", "batch": 1, **small}
    take("CPU, small_16k, latents, seconds", of(device="cpu", **step), lambda r: r["ms_p50"] / 1e3)
    nano = of(what="end_to_end", device="cpu")
    take("CPU, nano end to end, seconds per second of sound", nano, lambda r: r["rtf"])
    counted = of(what="launches", network="small_16k")
    take("launches, small_16k", counted, lambda r: r["launches"][OURS])
    on_gpu = of(device="cuda", **step)
    take("GPU, small_16k, latents, ms", on_gpu, lambda r: r["ms_p50"])
    large = of(device="cuda", **step | {"network": "large_44k_v2"})
    take("GPU, large_44k_v2, latents, ms", large, lambda r: r["ms_p50"])
    wave = of(device="cuda", **step | {"what": "waveform"})
    take("GPU, small_16k, waveform, ms", wave, lambda r: r["ms_p50"])
    many = [row for row in of(device="cuda", what="latents", **small) if row["batch"] >= 32]
    take("GPU, small_16k, latents, clips a second", many, lambda r: r["clips_per_s"])
    eager = of(device="cuda", **step | {"provider": "eager"})
    if on_gpu and eager:
        ratio = eager[0]["ms_p50"] / on_gpu[0]["ms_p50"]
        measured["GPU, small_16k, latents, eager over mfmjt"] = ratio
    return [
        f"{bar}: {measured[bar]:.4g}, must be {sign} {limit:g}"
        for bar, (sign, limit) in BARS.items()
        if bar in measured
        and not (measured[bar] <= limit if sign == "<=" else measured[bar] >= limit)
    ]


def main() -> int:
    """Parse the command line and measure; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.model.bench_generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--network", action="append", choices=sorted(CONFIGS), help="[all]")
    parser.add_argument("--what", action="append", help="only these of the above [all]")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after so long [9]")
    parser.add_argument("--calls", type=int, default=5, help="end to end and cold starts [5]")
    parser.add_argument("--smoke", action="store_true", help="everything tiny, to see that it runs")
    given = parser.parse_args()
    device = torch.device(given.device)
    end = time.monotonic() + 60 * given.minutes
    given.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(given.out / "generate.jsonl", KEY)
    finished = run(rows, device, end, given.network, given.what, given.calls, given.smoke)
    if not finished:
        print("The time is up; the same command goes on from here.")
    wrong = [row for row in rows.rows if row["status"] == "wrong"]
    for line in (misses := [] if given.smoke else missed(rows.rows)):
        print("MISSED", line)
    return int(bool(wrong or misses))


def run(
    rows: Rows,
    device: torch.device,
    end: float,
    networks: list[str] | None = None,
    what: list[str] | None = None,
    calls: int = 5,
    smoke: bool = False,
) -> bool:
    """Measure all that is wanted and not in `rows` yet; return whether it is all there."""
    shared = {"device": device.type, "threads": torch.get_num_threads()}
    stamp = {k: v for k, v in environment(device).items() if k not in shared}
    once: dict[str, tuple[str, Callable[[], Row]]] = {
        "launches": ("small_16k", lambda: _launches("small_16k")),
        "end_to_end": ("nano", lambda: _end_to_end(device, calls)),
        "cold_start": ("nano", lambda: _cold_start(device, calls)),
    }
    for name, (network, measure) in once.items():
        about = {"what": name, "network": network, "provider": OURS, **shared}
        unwanted = (what and name not in what) or (networks and network not in networks)
        if unwanted or rows.has(**about) or (smoke and not what):
            continue
        row = rows.add({**about, "status": "ok", **measure(), "environment": stamp})
        print({k: v for k, v in row.items() if k != "environment"}, flush=True)
    tiny = [Plan("nano", "latents", 2, (OURS, "eager", "mfmjt_eager", "eager_25"))]
    wanted = [
        plan
        for plan in (tiny if smoke else plans(device))
        if (not what or plan.what in what) and (not networks or plan.network in networks)
    ]
    return time_generation(rows, device, end, wanted, tiny=smoke)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    sys.exit(main())
