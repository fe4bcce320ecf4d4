"""What one-step generation costs: latents, waveform, many at once, and a process from its start.

    latents     noise to latents, the conditions' features given, one clip or a batch
    waveform    noise to samples, likewise
    end_to_end  `examples/ball_wood.mp4` to samples with the model that ships, by stage
    cold_start  a new process: import, load, the first 8 s of sound from a text, on the CPU or GPU
    launches    kernels of the latents' step at batch 1, counted (`bench.launches`)

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
exit status is 1 if a bar is missed, or a provider wrong. Set OMP_NUM_THREADS, and
GOMP_SPINCOUNT=100 so that idle threads are not taken for work.

    python -m bench.model.bench_generate --out /tmp/generate
    python -m bench.model.bench_generate --out /tmp/generate --network small_16k --what latents
    python -m bench.model.bench_generate --out /tmp/generate --device cuda --minutes 8
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from bench.clock import (
    CaptureFailed,
    Sampler,
    cuda_events,
    of_graph,
    on_cpu,
    recorded,
    take_turns,
)
from bench.gpu.job import Job
from bench.machine import environment, peak_mib
from bench.model.generation import Judge, Plan, Work, plans
from bench.providers import OURS
from bench.rows import GENERATE, Rows, dtype_name, line_of, short
from mfmjt.errors import InputError, RunError
from mfmjt.model.config import CONFIGS

__all__ = ["BARS", "latency", "main", "missed", "time_plan"]

KEY = GENERATE[1]
ROOT = Path(__file__).parents[2]
CLIP = ROOT / "examples" / "ball_wood.mp4"
SECONDS = 8
"""Of sound that a network's own length is."""

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
Guard = Callable[[Rows, Row], AbstractContextManager[None]]
"""Makes a row of what fails inside, from the fields that identify it."""


@contextlib.contextmanager
def _refused(rows: Rows, fields: Row) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {line_of(error)}"
        rows.add({**fields, "status": "unsupported", "reason": reason})
        print(*fields.values(), "unsupported", reason, flush=True)


class _Timer:
    """Verifies and times the providers of one plan.

    Args:
        rows: Identified by `KEY`.
        plan: What.
        device: Where.
        dtype: Of network and features.
        tiny: Nothing of real size.
    """

    def __init__(
        self, rows: Rows, plan: Plan, device: torch.device, dtype: torch.dtype, tiny: bool
    ) -> None:
        self.rows, self.plan, self.device, self.tiny = rows, plan, device, tiny
        self.about = {
            "what": plan.what,
            "network": plan.network,
            "batch": plan.batch,
            "dtype": dtype_name(dtype),
            "device": device.type,
            "threads": torch.get_num_threads(),
        }
        self.dtype = dtype
        names = (name for name in plan.providers if not rows.has(**self.about, provider=name))
        self.left = list(names)

    @functools.cached_property
    def work(self) -> Work:
        return Work.make(self.plan, self.device, self.dtype, self.tiny)

    @functools.cached_property
    def judge(self) -> Judge:
        return Judge(self.work, self.plan, self.dtype)

    def ready(self, provider: str) -> tuple[Sampler, Row] | None:
        """Return what takes a time and the rest of its row; None, with a row, if it is wrong."""
        call = self.work.call(provider)
        began = time.monotonic()
        found = call()
        first = time.monotonic() - began
        error = self.judge.error(provider, found)
        more: Row = {"provider": provider, "status": "ok", "first_call_s": short(first)}
        more["relative_error"] = None if error is None else short(error)
        if error is not None and not error <= self.judge.limit:
            reason = f"relative error {error:.3g}, allowed {self.judge.limit:.3g}"
            self.add({**more, "status": "wrong", "reason": reason})
            return None
        more["peak_mib"] = peak_mib(call, self.device)
        cuda = self.device.type == "cuda"
        return cuda_events(call, self.device) if cuda else on_cpu(call), more

    def add(self, more: Row, timing: Any = None) -> None:
        """Make a row and say it."""
        if timing:
            more = {**more, "clips_per_s": short(1e3 * self.plan.batch / timing.ms_p50)}
        row = self.rows.add({**self.about, **more}, timing)
        about = "  ".join(str(value) for value in self.about.values())
        ms = f"{row['ms_p50']} ms (host {row['cpu_ms_p50']} ms)" if timing else row.get("reason")
        print(about, row["provider"], row["status"], ms, flush=True)

    def graph_ms(self) -> float:
        """Milliseconds of a replay of our latents alone, one after the other."""
        step, z, cond = self.work.net.frozen(0.0, 1.0).step, self.work.z, self.work.cond
        w = torch.full((1,), 1.5, dtype=torch.float64, device=z.device)  # as `OneStep` gives it
        graph, _ = recorded(lambda: step(z, guidance=w, mode="cfg_scaled", **cond))
        return short(take_turns({OURS: of_graph(graph)}, 0.3)[OURS].ms_p50)


@torch.no_grad()
def time_plan(
    rows: Rows,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    tiny: bool = False,
    guard: Guard = _refused,
    has_time: Callable[[Row], bool] = lambda fields: True,
    seconds: float = 6.0,
) -> None:
    """Make a row of each provider of a plan that has none yet, and of why one cannot be timed.

    Args:
        rows: Identified by `KEY`.
        plan: What.
        device: Where.
        dtype: Of network and features.
        tiny: Nothing of real size.
        guard: Makes a row of what fails.
        has_time: Whether there is time for a provider.
        seconds: To take the times of all in, where they take turns.
    """
    timer = _Timer(rows, plan, device, dtype, tiny)
    if "compile" in timer.left:
        torch.compiler.reset()  # what was compiled before counts against a limit
    samplers: dict[str, Sampler] = {}
    more: dict[str, Row] = {}
    for provider in timer.left:
        fields = {**timer.about, "provider": provider}
        if not has_time(fields):
            break
        with guard(rows, fields):
            ready = timer.ready(provider)
            if ready is not None and device.type == "cuda":
                (timing,) = take_turns({provider: ready[0]}, 0.3).values()
                alone = provider == OURS and plan.what == "latents"
                try:
                    more_of_it = {"graph_ms": timer.graph_ms()} if alone else {}
                except CaptureFailed as error:
                    timer.add({**ready[1], "graph_ms": None, "reason": str(error)}, timing)
                    raise
                timer.add({**ready[1], **more_of_it}, timing)
            elif ready is not None:
                samplers[provider], more[provider] = ready
    for provider, timing in take_turns(samplers, seconds).items():
        timer.add(more[provider], timing)


def latency(job: Job, which: str = "headline") -> None:
    """Return the piece of `python -m bench gpu`.

    Args:
        job: The piece.
        which: "headline", "compiled" or "rest".
    """
    rows = job.rows(GENERATE)
    torch.backends.cudnn.benchmark = True  # plain PyTorch shall have its best convolutions
    tiny = {"headline": [Plan("nano", "latents", 2, (OURS, "eager", "mfmjt_eager"))]}
    tiny["rest"] = [Plan("nano", "latents", 2, ("eager_25",))]
    for plan in (tiny if job.smoke else plans(job.cuda or job.stand_in)).get(which, []):
        if job.stand_in:
            _launch(plan, job)
            continue
        time_plan(
            *(rows, plan, job.torch_device, torch.bfloat16, job.smoke, job.trying),
            has_time=functools.partial(job.has_time, rows),
            seconds=0.0,
        )
    if which == "rest" and not job.smoke:
        _once(rows, job.torch_device, 3, list(ONCE), job.trying)


@torch.no_grad()
def _launch(plan: Plan, job: Job) -> None:
    """Call ours once, for what it launches."""
    work = Work.make(plan, job.torch_device, torch.bfloat16, job.smoke)
    for provider in (name for name in plan.providers if name.startswith(OURS)):
        work.call(provider)()


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
    row = {name: short(value) for name, value in medians.items()}
    return row | {"seconds": length, "rtf": short(medians["wall_s"] / length), "calls": calls}


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
            timeout=120,
            cwd=ROOT,
        )
        taken.append((time.perf_counter() - began, *map(float, done.stdout.split())))
    names = ("process_s", "import_s", "load_s", "first_sound_s")
    columns = zip(names, zip(*taken, strict=True), strict=True)
    return {name: short(statistics.median(column)) for name, column in columns} | {"calls": calls}


def _launches(network: str) -> Row:
    done = subprocess.run(
        [sys.executable, "-m", "bench.launches", "--network", network, "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    if not done.stdout.strip():
        raise RunError(f"Nothing was counted: {(done.stderr.strip() or '?').splitlines()[-1]}.")
    counted = json.loads(done.stdout)
    return {"launches": counted["launches"], "triton": counted["triton"]}


ONCE: dict[str, tuple[str, Callable[[torch.device, int], Row]]] = {
    "launches": ("small_16k", lambda device, calls: _launches("small_16k")),
    "end_to_end": ("nano", lambda device, calls: _end_to_end(device, calls)),
    "cold_start": ("nano", lambda device, calls: _cold_start(device, calls)),
}
"""What has no peers: its network, and what measures it."""


def _once(
    rows: Rows, device: torch.device, calls: int, wanted: list[str], guard: Guard = _refused
) -> None:
    shared = {"device": device.type, "threads": torch.get_num_threads()}
    stamp = {k: v for k, v in environment(device).items() if k not in shared}
    for name in wanted:
        network, measure = ONCE[name]
        about = {"what": name, "network": network, "provider": OURS, **shared}
        if rows.has(**about):
            continue
        with guard(rows, about):
            if name != "launches" and importlib.util.find_spec("av") is None:
                raise RunError("PyAV is not installed, and a pipeline needs it. Install av.")
            found = measure(device, calls)
            row = rows.add({**about, "status": "ok", **found, "environment": stamp})
            print({k: v for k, v in row.items() if k != "environment"}, flush=True)


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


def main(argv: list[str] | None = None) -> int:
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
    given = parser.parse_args(argv)
    device = torch.device(given.device)
    end = time.monotonic() + 60 * given.minutes
    given.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(given.out / "generate.jsonl", KEY)
    tiny = [Plan("nano", "latents", 2, (OURS, "eager", "mfmjt_eager", "eager_25"))]
    every = [plan for turn in plans(device.type == "cuda").values() for plan in turn]
    for plan in tiny if given.smoke else every:
        named = not given.network or plan.network in given.network
        if not named or (given.what and plan.what not in given.what):
            continue
        if time.monotonic() > end - 60 and not given.smoke:
            print("The time is up; the same command goes on from here.")
            break
        time_plan(rows, plan, device, tiny=given.smoke, seconds=0.0 if given.smoke else 6.0)
    else:
        networks, what = given.network or [*CONFIGS], given.what or ([] if given.smoke else ONCE)
        once = [name for name in ONCE if name in what and ONCE[name][0] in networks]
        _once(rows, device, given.calls, once)
    wrong = [row for row in rows.rows if row["status"] == "wrong"]
    for line in (misses := [] if given.smoke else missed(rows.rows)):
        print("MISSED", line)
    return int(bool(wrong or misses))


if __name__ == "__main__":
    sys.exit(main())
