"""Measure what one-step generation costs: latents, waveform, batches, and a process from its start.

    latents     noise to latents, the conditions' features given, one clip or a batch
    waveform    noise to samples, likewise
    end_to_end  `examples/ball_wood.mp4` to samples with the model that ships, by stage
    cold_start  a new process: import, load, the first 8 s of sound from a text, on the CPU or GPU
    launches    kernels of the latents' step at batch 1, counted (`python -m bench launches`)

The providers of the first two, which take turns on the same work (on a GPU, where nobody else
computes, one comes after the other, ours first):

    eager_25       plain PyTorch, 25 Euler steps, one pass after the other, as MMAudio samples
    eager          plain PyTorch, one step, one pass after the other
    compile        that through torch.compile; on a GPU mode="reduce-overhead", which makes graphs
    mfmjt_eager    our ops under the network as it is trained, both passes one batch
    mfmjt          `meanflow.OneStep`: frozen, on a GPU one graph; `graph_ms` is a replay alone

What one step gives is verified before it is timed: against the same weights in float32, no provider
may err twice as much as plain PyTorch in its dtype. Weights are random; how long a step takes does
not depend on them. DIR/generate.jsonl: rows that are there already are not measured again. The
exit status is 1 if a target is missed, or a provider wrong. Set OMP_NUM_THREADS, and
GOMP_SPINCOUNT=100 so that idle threads are not taken for work.

Examples:
  python -m bench generate --out /tmp/generate
  python -m bench generate --out /tmp/generate --network small_16k --what latents
  python -m bench generate --out /tmp/generate --device cuda --minutes 8
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import ROOT, parser
from bench.clock import Sampler, cuda_events, of_graph, on_cpu, recorded, take_turns
from bench.machine import environment, peak_mib
from bench.networks.given import (
    Guard,
    Target,
    compare,
    features,
    hold,
    network,
    planned,
    printed_by_python,
    refused,
)
from bench.providers import OURS
from bench.rows import GENERATE, Row, Rows, dtype_name
from mfmjt import kernels, meanflow
from mfmjt.codec import VAE, BigVGAN, MMAudioCodec, NanoCodec
from mfmjt.cuda_graph import Captured
from mfmjt.errors import RunError
from mfmjt.kernels import precision
from mfmjt.model import MFMJT
from mfmjt.model.config import CONFIGS

__all__ = ["TARGETS", "Generation", "GenerationPlan", "main", "once", "plans", "time_plan"]

CLIP = ROOT / "examples" / "ball_wood.mp4"


def _target(name: str, sense: str, limit: float, column: str, **where: Any) -> Target:
    """Return a target of our small_16k step at batch 1, unless `where` says otherwise."""
    about = {"what": "latents", "network": "small_16k", "batch": 1, "provider": OURS}
    return Target(name, sense, limit, column, about | where, best=True)


_ENDS: Row = {"what": "end_to_end", "network": "nano", "batch": None}
_SOUND = "CPU, nano end to end, seconds per second of sound"
_EAGER = "GPU, small_16k, latents, eager over mfmjt"
_CLIPS = "GPU, small_16k, latents, clips a second"
_LARGE = "large_44k_v2"
TARGETS = (
    _target("CPU, small_16k, latents, ms", "<=", 400.0, "ms_p50", device="cpu"),
    _target(_SOUND, "<=", 0.15, "rtf", device="cpu", **_ENDS),
    _target("GPU, small_16k, latents, ms", "<=", 0.6, "ms_p50", device="cuda"),
    _target(f"GPU, {_LARGE}, latents, ms", "<=", 2.6, "ms_p50", device="cuda", network=_LARGE),
    _target("GPU, small_16k, waveform, ms", "<=", 5.0, "ms_p50", device="cuda", what="waveform"),
    _target(_CLIPS, ">=", 3000.0, "clips_per_s", device="cuda", batch=(32, 128)),
    _target(_EAGER, ">=", 10.0, "over_mfmjt", device="cuda", provider="eager"),
)


class GenerationPlan(NamedTuple):
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


PLANS = """
cpu   headline  small_16k     latents   1         mfmjt eager mfmjt_eager compile
cpu   headline  nano          latents   1         mfmjt eager mfmjt_eager compile eager_25
cpu   headline  nano          waveform  1         mfmjt eager
cpu   headline  nano          latents   8         mfmjt eager
cpu   headline  small_44k     latents   1         mfmjt eager
cpu   headline  small_16k     latents   4         mfmjt eager
cpu   headline  small_16k     latents   1         eager_25
cpu   headline  medium_44k    latents   1         mfmjt eager
cpu   headline  small_16k     waveform  1         mfmjt eager
cuda  headline  small_16k     latents   1,32      mfmjt eager mfmjt_eager
cuda  headline  small_16k     waveform  1         mfmjt eager
cuda  headline  large_44k_v2  latents   1         mfmjt eager mfmjt_eager
cuda  headline  small_16k     latents   8,128     mfmjt eager mfmjt_eager
cuda  compiled  small_16k     latents   1         compile
cuda  compiled  large_44k_v2  latents   1         compile
cuda  rest      nano          latents   1         mfmjt eager mfmjt_eager
cuda  rest      small_44k     latents   1         mfmjt eager mfmjt_eager
cuda  rest      medium_44k    latents   1         mfmjt eager mfmjt_eager
cuda  rest      large_44k     latents   1         mfmjt eager mfmjt_eager
cuda  rest      large_44k_v2  latents   8,32      mfmjt eager
cuda  rest      nano          latents   8,32      mfmjt eager
cuda  rest      nano          waveform  1         mfmjt eager
cuda  rest      small_16k     latents   1         eager_25
cuda  rest      large_44k_v2  latents   1         eager_25
tiny  headline  nano          latents   2         mfmjt eager mfmjt_eager
tiny  rest      nano          latents   2         eager_25
"""
"""Device, turn, network, what, batches and providers; in a turn what has a target comes first."""


def plans(device: str, *turns: str) -> list[GenerationPlan]:
    """Return what is timed on a device, "cpu", "cuda" or "tiny", in some turns or in all."""
    found = []
    for name, what, batches, *providers in planned(PLANS, device, *turns):
        sizes = map(int, batches.split(","))
        found += [GenerationPlan(name, what, batch, tuple(providers)) for batch in sizes]
    return found


@dataclass
class Generation:
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
    def make(
        cls,
        plan: GenerationPlan,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        tiny: bool = False,
    ) -> Generation:
        """Draw weights, none of them zero, and features."""
        torch.manual_seed(0)
        with torch.device(device):  # one core of the host would take seconds for the large ones
            net = network(plan.network, 20 if tiny else None, tiny)
            cond = {name: x.to(dtype) for name, x in features(net.config, plan.batch).items()}
            z = torch.randn(plan.batch, net.config.latent_length, net.config.latent_dim)
        codec = _codec(plan.network, dtype).to(device) if plan.what == "waveform" else None
        return cls(net.eval().requires_grad_(False).to(dtype), codec, z, cond)

    def call(self, provider: str) -> Callable[[], Tensor]:
        """Return what a provider does."""
        if provider in (OURS, "mfmjt_eager"):
            step = meanflow.OneStep(self.net, compile=provider == OURS)
            latents = functools.partial(step, self.z, **self.cond)
        else:
            function = _twenty_five_steps if provider == "eager_25" else _one_step
            if provider == "compile":
                cuda = self.z.device.type == "cuda"
                function = torch.compile(function, mode="reduce-overhead" if cuda else "default")
            latents = functools.partial(function, self.net, self.z, self.cond)
        decode: Callable[[Tensor], Tensor] = self.codec.decode if self.codec else lambda x: x
        if self.codec and provider == OURS:
            decode = Captured(decode)

        @torch.no_grad()
        def call() -> Tensor:
            return decode(latents())

        return call if provider.startswith(OURS) else kernels.reference()(call)

    def graph_ms(self) -> float:
        """Return the milliseconds of a replay of our latents alone, one after the other."""
        step = self.net.frozen(0.0, 1.0).step
        w = torch.full((1,), 1.5, dtype=torch.float64, device=self.z.device)  # as `OneStep` does
        graph, _ = recorded(lambda: step(self.z, guidance=w, mode="cfg_scaled", **self.cond))
        return take_turns({OURS: of_graph(graph)}, 0.3)[OURS].ms_p50

    @functools.cached_property
    def truth(self) -> Tensor:
        """Latents of plain PyTorch by the same weights in float32, or float64 for float32."""
        exact = torch.float64 if self.net.dtype == torch.float32 else torch.float32
        cond = {name: value.to(exact) for name, value in self.cond.items()}
        net = copy.deepcopy(self.net).to(exact)
        return Generation(net, None, self.z.to(exact), cond).call("eager")()

    @functools.cached_property
    def limit(self) -> float:
        """The most that latents may err: twice as much as plain PyTorch's in the same dtype."""
        return 2 * self.error(self.call("eager")()) + 8 * torch.finfo(torch.float32).eps

    def error(self, latents: Tensor) -> float:
        """Return the relative error of latents."""
        return float((latents.to(self.truth) - self.truth).norm() / self.truth.norm())

    def prepare(self, provider: str) -> tuple[Row, Sampler | None]:
        """Return fields of a provider's row, and how to time it; None if it may not be."""
        call, device = self.call(provider), self.z.device
        began = time.monotonic()
        result = call()
        row: Row = {"status": "ok", "first_call_s": time.monotonic() - began}
        row["relative_error"] = None
        if self.codec is None and provider != "eager_25":  # of others no claim is made
            row["relative_error"] = error = self.error(result)
            if not error <= self.limit:
                reason = f"relative error {error:.3g}, allowed {self.limit:.3g}"
                return {**row, "status": "wrong", "reason": reason}, None
        row["peak_mib"] = peak_mib(call, device)
        if device.type != "cuda":
            return row, on_cpu(call)
        if provider == OURS and self.codec is None:
            row["graph_ms"] = self.graph_ms()
        return row, cuda_events(call, device)


def _codec(name: str, dtype: torch.dtype) -> NanoCodec | MMAudioCodec:
    if name == "nano":
        return NanoCodec().eval().requires_grad_(False)
    mode = "16k" if CONFIGS[name].sample_rate == 16_000 else "44k"
    codec = MMAudioCodec(mode, VAE(mode), BigVGAN(mode))
    return codec.cast(dtype).eval().requires_grad_(False)


def _off(z: Tensor) -> dict[str, Tensor]:
    no = torch.zeros(z.shape[0], dtype=torch.bool, device=z.device)
    return {"video_mask": no, "text_mask": no}


def _one_step(net: MFMJT, z: Tensor, cond: dict[str, Tensor]) -> Tensor:
    u_c, u_0 = net(z, 0.0, 1.0, **cond), net(z, 0.0, 1.0, **cond, **_off(z))
    return z - meanflow.guide(u_c, u_0, 1.5, "cfg_scaled")


def _twenty_five_steps(net: MFMJT, z: Tensor, cond: dict[str, Tensor]) -> Tensor:
    inputs, no = (cond["video"], cond["sync"], cond["text"]), _off(z)["text_mask"]
    given, null = net.conditions(*inputs), net.conditions(*inputs, no, no)
    steps = 25
    for i in range(steps, 0, -1):
        t = i / steps
        u_c, u_0 = net(z, t, t, cond=given), net(z, t, t, cond=null)
        z = z - meanflow.guide(u_c, u_0, 4.5, "cfg") / steps
    return z


@torch.no_grad()
def time_plan(
    rows: Rows,
    plan: GenerationPlan,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    tiny: bool = False,
    stand_in: bool = False,
    **options: Any,
) -> None:
    """Make a row of each provider of a plan that has none yet, and of why one cannot be timed.

    Network and features are of `dtype`. A `stand_in` only calls what is ours, and computes nothing;
    `options` are those of `compare`.
    """
    make = functools.lru_cache(Generation.make)

    def prepare(provider: str) -> tuple[Row, Sampler | None]:
        generation = make(plan, device, dtype, tiny)
        if not stand_in:
            return generation.prepare(provider)
        if provider.startswith(OURS):
            generation.call(provider)()
        return {"status": "called"}, None

    about: Row = {"what": plan.what, "network": plan.network, "batch": plan.batch}
    about |= {"dtype": dtype_name(dtype), "device": device.type, "threads": torch.get_num_threads()}
    abouts = [{**about, "provider": provider} for provider in plan.providers]
    clips = lambda row: {"clips_per_s": 1e3 * plan.batch / row["ms_p50"]}  # noqa: E731
    compare(rows, abouts, prepare, {OURS: tuple(about)}, clips, **options)


def _end_to_end(device: torch.device, calls: int) -> Row:
    from mfmjt.pipeline import Audio, Pipeline

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = Pipeline.from_pretrained("nano", device, dtype, compile=True)
    stages: list[dict[str, float]] = []

    def call() -> Audio:
        audio = pipe(video=CLIP, prompt="a wooden ball bounces")
        assert isinstance(audio, Audio)
        stages.append(audio.timings)
        return audio

    length, timing = call().duration, take_turns({"": on_cpu(call)}, 0.0)[""]
    row: Row = {f"{k}_s": statistics.median(s[k] for s in stages[1:]) for k in stages[0]}
    row |= {"wall_s": timing.ms_p50 / 1e3, "cpu_s": timing.cpu_ms_p50 / 1e3, "calls": timing.n}
    return row | {"seconds": length, "rtf": row["wall_s"] / length}


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
        parts = printed_by_python("-c", COLD, device.type).split()
        taken.append((time.perf_counter() - began, *map(float, parts)))
    names = ("process_s", "import_s", "load_s", "first_sound_s")
    columns = zip(names, zip(*taken, strict=True), strict=True)
    return {name: statistics.median(column) for name, column in columns} | {"calls": calls}


def _launches(device: torch.device, calls: int) -> Row:
    """Return launches by provider; counted in a process that takes its Triton for a GPU's."""
    command = ("-m", "bench", "launches", "--network", "small_16k", "--json")
    counted = json.loads(printed_by_python(*command))
    return {"launches": counted["launches"], "triton": counted["triton"]}


ONCE: dict[str, tuple[str, Callable[[torch.device, int], Row]]] = {
    "launches": ("small_16k", _launches),
    "end_to_end": ("nano", _end_to_end),
    "cold_start": ("nano", _cold_start),
}
"""What has no peers: its network, and what measures it."""


def once(
    rows: Rows,
    device: torch.device,
    calls: int = 3,
    wanted: Sequence[str] = tuple(ONCE),
    guard: Guard = refused,
) -> None:
    """Make a row of each of `ONCE` that is wanted and has none."""
    shared = {"device": device.type, "threads": torch.get_num_threads()}
    stamp = {k: v for k, v in environment(device).items() if k not in shared}
    for name in wanted:
        of, measure = ONCE[name]
        about = {"what": name, "network": of, "provider": OURS, **shared}
        if rows.has(**about):
            continue
        with guard(rows, about):
            if name != "launches" and importlib.util.find_spec("av") is None:
                raise RunError("PyAV is not installed, and a pipeline needs it. Install av.")
            measured = measure(device, calls)
            rows.add({**about, "status": "ok", **measured, "environment": stamp})
            print({**about, **measured}, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and measure; return the exit status."""
    usage = parser("generate", __doc__, out="", smoke=True)
    usage.add_argument("--device", default="cpu")
    usage.add_argument("--network", action="append", choices=sorted(CONFIGS), help="[all]")
    usage.add_argument("--what", action="append", help="only these of the above [all]")
    usage.add_argument("--minutes", type=float, default=9.0, help="stop after so long [9]")
    usage.add_argument("--calls", type=int, default=5, help="cold starts [5]")
    options = usage.parse_args(argv)
    device, smoke = torch.device(options.device), options.smoke
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.out / "generate.jsonl", GENERATE[1])
    networks = options.network or [*CONFIGS]
    slow = device.type == "cpu" and torch.bfloat16 in precision.SLOW
    dtype = torch.float32 if slow else torch.bfloat16  # as users of this machine run it
    for plan in plans("tiny" if smoke else device.type):
        if plan.network not in networks or plan.what not in (options.what or [plan.what]):
            continue
        if time.monotonic() > end - 60 and not smoke:
            print("The time is up; the same command goes on from here.")
            break
        time_plan(rows, plan, device, dtype, tiny=smoke, seconds=0.0 if smoke else 6.0)
    else:
        what = options.what or ([] if smoke else ONCE)
        wanted = [name for name in ONCE if name in what and ONCE[name][0] in networks]
        once(rows, device, options.calls, wanted)
    return hold(rows.rows, () if smoke else TARGETS)
