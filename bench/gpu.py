"""All that needs a GPU, in parts that stop before a time limit and go on at the next call.

check    every op and the network on the device against float64 on the CPU: value, tangent, gradient
kernels  every op against plain PyTorch, torch.compile and other people's kernels
step     training steps of whole networks against PyTorch's ways to them
generate one-step generation: latents, waveforms, batches, one process from its start
train    nano: clips are made, encoded and trained on until the time is up, then on the next call

Needs torch, NumPy and safetensors, and Triton where a part compiles; jvp-flash-attention,
liger-kernel, flash-attn, xformers and rCM are timed where they can be imported. DIR receives small
files only: `environment.json`, `check.jsonl`, `kernels.jsonl`, `train_step.jsonl`,
`generate.jsonl`, `train.jsonl` and `network.safetensors`. Features and training states, some
hundreds of MB, go to the work folder.

Examples:
  python -m bench gpu --out output/gpu                        all parts; call it again to go on
  python -m bench gpu --out output/gpu --part check --minutes 3
  python -m bench gpu --out /tmp/look --device cpu --smoke    no GPU: to see that it runs
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import (
    BACKWARD,
    JVP_BACKWARD,
    MODES,
    TINY,
    VALUE,
    Case,
    Cost,
    Input,
    Operands,
    cases,
    named_ops,
    operands,
)
from bench.harness import (
    MAX_SETS,
    Ceilings,
    DeviceLost,
    Rows,
    Sampler,
    cuda_events,
    dtype_name,
    environment,
    l2_bytes,
    on_cpu,
    peak_mib,
    prepare,
    replayed,
    row_of,
    take_turns,
)
from bench.judge import Truth
from bench.model import bench_generate, bench_train_step
from bench.providers import OURS, Provider, providers, step
from mfmjt import kernels
from mfmjt.codec import NanoCodec
from mfmjt.encoders import NanoEncoders
from mfmjt.errors import InputError
from mfmjt.model import MFMJT
from mfmjt.train.config import FeatureExtraction, NetworkTraining, load_config
from mfmjt.train.features import extract_all
from mfmjt.train.loop import train

__all__ = ["PARTS", "Job", "add_arguments", "run", "run_parts"]

PARTS = ("check", "kernels", "step", "generate", "train")
PRETRAINED = Path(__file__).parent.parent / "mfmjt" / "pretrained" / "nano"
CHECKED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TIMED = (torch.bfloat16, torch.float32)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """What to run and where.

    Attributes:
        out: Folder of the results.
        work: Folder of features and training states.
        device: Device to measure.
        deadline: `time.monotonic()` at which to stop.
        smoke: Everything tiny, to see that it runs.
        ops: Ops to check and time.
        overrides: Settings of the stage `network`, `key=value` each.
    """

    out: Path
    work: Path
    device: torch.device
    deadline: float
    smoke: bool = False
    ops: tuple[str, ...] = ()
    overrides: Sequence[str] = ()

    def seconds_left(self) -> float:
        """Time until the deadline."""
        return self.deadline - time.monotonic()


def run_parts(job: Job, parts: Sequence[str]) -> bool:
    """Run `parts` in order; return whether all was right and nothing is left to do."""
    job.out.mkdir(parents=True, exist_ok=True)
    job.work.mkdir(parents=True, exist_ok=True)
    # TF32 would be PyTorch's error in the reference's place.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    stamp = environment(job.device)
    path = job.out / "environment.json"
    if path.exists():  # ceilings stay those of the rows that are there
        stamp |= {k: v for k, v in json.loads(path.read_text()).items() if k == "ceilings"}
    path.write_text(json.dumps(stamp, indent=2) + "\n")
    print(json.dumps(stamp, indent=2))
    functions = {
        "check": check,
        "kernels": time_kernels,
        "step": training_step,
        "generate": generate,
        "train": train_nano,
    }
    good = True
    for part in parts:
        print(f"== {part}", flush=True)
        good = functions[part](job) and good
    return good


# check


def check(job: Job) -> bool:
    """Compare with float64 on the CPU; an op may err twice as much as its reference does there."""
    path = job.out / "check.jsonl"
    path.unlink(missing_ok=True)  # seconds of work, and the code may have changed
    rows, good = Rows(path, ("op", "case", "dtype", "kind")), True
    for case, dtype in _checks(job):
        if job.seconds_left() < 0:
            print("The time is up; the rest of the checks is left out.")
            return False
        given = operands(case, dtype, CPU).to(dtype, job.device)
        truth = Truth(case, given, CPU)
        both = ((BACKWARD, ""), (JVP_BACKWARD, " under jvp"))
        for mode, where in ((VALUE, ""),) if case.inference else both:
            try:
                found = step(Provider(OURS, case.function), case, mode)(given)
                errors = truth.judge(found).errors
            except Exception as error:  # a broken kernel shall not hide the others
                reason = f"{type(error).__name__}: {error}"
                errors = {"all": {"ok": False, "reason": reason}}  # type: ignore[dict-item]
            for kind, row in errors.items():
                what = {"op": case.op, "case": case.name, "dtype": dtype_name(dtype)}
                rows.add({**what, "kind": kind + where, **row})
                good &= bool(row["ok"])
                if not row["ok"]:
                    print("WRONG", *what.values(), kind + where, row)
    right = sum(bool(row["ok"]) for row in rows.rows)
    print(f"{right} of {len(rows.rows)} checks passed.")
    return good


def _checks(job: Job) -> Iterator[tuple[Case, torch.dtype]]:
    for op in job.ops:
        for case in cases(op, "tiny" if job.smoke else "check"):
            for dtype in CHECKED:
                yield case if case.inference else replace(case, modes=MODES), dtype
    yield _network_case(job), torch.float32


def _network_case(job: Job) -> Case:
    """The whole network as one op of its noisy latent and its times, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MFMJT.from_config("nano", **(TINY if job.smoke else {}))
        with torch.no_grad():
            for p in net.parameters():  # a fresh network gives zero, which anything matches
                p.add_(torch.randn_like(p) * 0.02)
    config, length = net.config, 20 if job.smoke else 80
    video, sync = config.lengths(length)
    inputs = {
        "z": Input((4, length, config.latent_dim)),
        "t": Input((4,), scale=0.5),
        "video": Input((4, video, config.video_dim), moves=False),
        "sync": Input((4, sync, config.sync_dim), moves=False),
        "text": Input((4, config.text_length, config.text_dim), moves=False),
    }
    # Placed ahead: under forward mode parameters cannot be moved.
    placed = {
        (device.type, dtype): copy.deepcopy(net).to(device, dtype)
        for device, dtype in ((CPU, torch.float64), (job.device, torch.float32))
    }

    def function(z: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        u: Tensor = placed[z.device.type, z.dtype](z, torch.zeros_like(t), t, **cond)
        return u

    def reference(**given: Tensor) -> Tensor:
        if isinstance(given["z"], torch._subclasses.FakeTensor):  # its shape is asked for
            return given["z"]
        with kernels.reference():
            return function(**given)

    return Case(
        op="network",
        name=config.name,
        model=config.name,
        batch=4,
        length=length,
        inputs=inputs,
        function=function,
        reference=reference,
        flops=Cost(0),
        elements=Cost(0),
        terms=config.depth * 4 * length * config.mlp_hidden,
    )


# kernels


def time_kernels(job: Job) -> bool:
    """Verify and time every op's providers; rows that are in the file already are left out."""
    rows = Rows(job.out / "kernels.jsonl")
    path = job.out / "environment.json"
    stamp = json.loads(path.read_text())
    if "ceilings" not in stamp:
        stamp["ceilings"] = vars(Ceilings.measure(job.device, TIMED, job.smoke))
        path.write_text(json.dumps(stamp, indent=2) + "\n")
    ceilings = Ceilings(**stamp["ceilings"])
    found = [case for op in job.ops for case in cases(op, "tiny" if job.smoke else "gpu")]
    jobs = list(_jobs(found, job.smoke))
    for number, (case, dtype, compiled) in enumerate(jobs, 1):
        shared = {"threads": torch.get_num_threads(), "malloc": job.device.type}
        about = {"commit": stamp["commit"], "utc": stamp["utc"]}
        if not _time_case(job, rows, case, dtype, compiled, ceilings, shared, about):
            print(f"The time is up at {number} of {len(jobs)}; the same command goes on from here.")
            return False
        print(f"[{number}/{len(jobs)}, {job.seconds_left():.0f} s left]", flush=True)
    return True


def _jobs(found: list[Case], smoke: bool) -> Iterator[tuple[Case, torch.dtype, bool]]:
    """(case, dtype, whether compiled providers or the others), those that matter most first.

    Compiling takes longer than all the rest, so that it waits until every op has been timed once.
    """
    for dtype in TIMED[1:] if smoke else TIMED:
        for headline, compiled in ((True, False), (True, True), (False, False)):
            for case in found:
                if case.headline == headline:
                    yield case, dtype, compiled


def _time_case(
    job: Job,
    rows: Rows,
    case: Case,
    dtype: torch.dtype,
    compiled: bool,
    ceilings: Ceilings,
    shared: dict[str, object],
    about: dict[str, object],
) -> bool:
    truth: Truth | None = None
    sets: list[Operands] = []
    for mode in case.modes:
        fields = {**row_of(case, dtype, mode, ceilings), **shared}
        wanted = [
            p
            for p in providers(case, job.device, mode)
            if p.compiled == compiled and not rows.has(**fields, provider=p.name)
        ]
        if not wanted:
            continue
        if job.seconds_left() < 60 and not job.smoke:
            return False

        def refuse(name: str, reason: dict[str, str], fields: dict[str, Any] = fields) -> None:
            rows.add({**fields, "provider": name, **reason, **about})
            print(case.op, case.name, fields["dtype"], fields["mode"], name, reason, flush=True)

        sets = sets or _operand_sets(case, dtype, job.device)
        try:
            truth = truth or _truth(case, sets[0])
            good, bad = prepare(case, dtype, mode, wanted, job.device, truth)
        except torch.OutOfMemoryError:
            for provider in wanted:
                refuse(provider.name, _unsupported("no memory for the truth in float32"))
            continue
        except DeviceLost as lost:
            refuse(lost.provider, _unsupported(lost.reason))
            raise
        for name, reason in bad.items():
            refuse(name, reason)
        samplers: dict[str, Sampler] = {}
        more: dict[str, dict[str, object]] = {}
        for name, (call, error) in good.items():
            one = functools.partial(call, sets[0])
            try:
                peak = peak_mib(one, job.device)
                samplers[name], timer = _sampler(call, one, sets, job.device)
            except torch.OutOfMemoryError:
                refuse(name, _unsupported("no memory beside the others"))
                continue
            more[name] = {"error_of_limit": error, "peak_mib": peak, "timer": timer}
        for name, timing in take_turns(samplers, 0.0 if job.smoke else 0.4).items():
            extra = {"provider": name, "status": "ok", **more[name], **about}
            row = rows.add({**fields, **extra}, timing)
            what = f"{case.op} {case.name} {fields['dtype']} {mode} {name}"
            share = 100 * row["floor_ms"] / row["ms_p50"]
            print(f"{what}: {row['ms_p50']} ms, {share:.0f} % of the roofline", flush=True)
        del samplers, good
        gc.collect()
    return True


def _unsupported(reason: str) -> dict[str, str]:
    return {"status": "unsupported", "reason": reason}


def _truth(case: Case, given: Operands) -> Truth:
    """In float64, or in float32 where that needs more memory than there is."""
    try:
        return Truth(case, given)
    except torch.OutOfMemoryError:
        gc.collect()
        torch.cuda.empty_cache()
        return Truth(case, given, exact=torch.float32)


def _operand_sets(case: Case, dtype: torch.dtype, device: torch.device) -> list[Operands]:
    """Operands that together exceed the L2 cache three times."""
    sets = [operands(case, dtype, device)]
    if device.type == "cuda":
        count = min(MAX_SETS, -(-3 * l2_bytes(device) // max(1, sets[0].bytes)))
        sets += [operands(case, dtype, device, seed) for seed in range(1, count)]
    return sets


def _sampler(
    call: Callable[[Operands], object],
    one: Callable[[], object],
    sets: list[Operands],
    device: torch.device,
) -> tuple[Sampler, str]:
    """How to time a call, and the name of that."""
    if device.type != "cuda":
        return on_cpu(one), "cpu"
    try:
        return replayed(call, sets), "graph"
    except Exception as error:  # it waits for the device, or allocates where a graph may not
        print(f"No graph ({str(error).partition(chr(10))[0]}); timed between events.")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    sampler = cuda_events(one, device)
    sampler()  # if there is no memory for it, this says so
    return sampler, "events"


# step


def training_step(job: Job) -> bool:
    """Training steps; see `bench.model.bench_train_step`."""
    rows = Rows(job.out / "train_step.jsonl", ("what", "network", "batch", "ratio", "provider"))
    bench = bench_train_step.Bench(rows, job.device, not job.smoke, job.smoke, job.deadline)
    for plan in bench_train_step.plans(job.device, job.smoke):
        if not bench.go_on(plan):
            print("The time is up; the same command goes on from here.")
            return False
    for bar in bench_train_step.bars(rows.rows):
        if bar["met"] is False:
            print(f"MISSED {bar['bar']}: {bar['value']:.4g}, must be {bar['limit']}")
    return all(row.get("status") != "wrong" for row in rows.rows)


# generate


def generate(job: Job) -> bool:
    """One-step generation; see `bench.model.bench_generate`."""
    rows = Rows(job.out / "generate.jsonl", bench_generate.KEY)
    done = bench_generate.run(rows, job.device, job.deadline, smoke=job.smoke)
    for line in [] if job.smoke else bench_generate.missed(rows.rows):
        print("MISSED", line)
    if not done:
        print("The time is up; the same command goes on from here.")
    return done and all(row["status"] != "wrong" for row in rows.rows)


# train


def train_nano(job: Job) -> bool:
    """Go on with the training of nano until the deadline; return whether it is finished."""
    features = job.work / "features"
    ends = _ends(job)
    workers = 0 if job.smoke else max(1, len(os.sched_getaffinity(0)) - 1)
    extract_all(
        FeatureExtraction(
            out=str(features),
            codec=str(ends / "codec.safetensors"),
            encoders=str(ends / "encoders.safetensors"),
            clips=2 if job.smoke else 8000,
            validation=2 if job.smoke else 120,
            workers=workers,
        )
    )
    settings = [
        f"store={features}",
        f"codec={ends / 'codec.safetensors'}",
        f"encoders={ends / 'encoders.safetensors'}",
        f"out={job.work / 'network'}",
        f"device={job.device}",
        "threads=0",
        "tensorboard=false",
    ]
    if job.smoke:
        small = {
            "steps": 3,
            "log_every": 1,
            "batch": 2,
            "full_batch": 1,
            "window": 20,
            "validate_every": 0,
        }
        settings += [f"{k}={v}" for k, v in small.items()] + ["preview_every=0", "dtype=float32"]
        settings += [f"overrides={json.dumps(TINY)}"]
    config = load_config(NetworkTraining, "nano_gpu", "network", [*settings, *job.overrides])
    result = train(config, stop_after=None if job.smoke else max(1.0, job.seconds_left() - 15))
    shutil.copy(job.work / "network" / "log.jsonl", job.out / "train.jsonl")
    shutil.copy(result.network, job.out / "network.safetensors")
    state = "finished" if result.finished else "goes on at the next call"
    print(f"Step {result.step} of {config.steps} after {result.seconds:.0f} s: {state}.")
    return result.finished


def _ends(job: Job) -> Path:
    """The folder of codec and encoders: those that ship, or untrained ones for a smoke test."""
    if not job.smoke:
        for name in ("codec", "encoders"):
            if not (PRETRAINED / f"{name}.safetensors").exists():
                raise InputError(
                    f"{PRETRAINED} has no {name}.safetensors. Train it with the stage `{name}`, "
                    "and copy it there."
                )
        return PRETRAINED
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        NanoCodec().save(job.work / "codec.safetensors")
        NanoEncoders().save(job.work / "encoders.safetensors")
    return job.work


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of `python -m bench gpu`."""
    command.add_argument("--out", required=True, help="folder of the results, small files only")
    command.add_argument("--work", help="folder of features and training states [OUT/work]")
    command.add_argument("--part", choices=(*PARTS, "all"), default="all")
    command.add_argument("--ops", help="check and time only these, separated by commas")
    command.add_argument("--minutes", type=float, default=9.0, help="stop after so long [9]")
    command.add_argument("--device", default="cuda")
    command.add_argument("--smoke", action="store_true", help="everything tiny")
    command.add_argument("override", nargs="*", help="settings of the training, such as lr=1e-3")


def run(given: argparse.Namespace) -> int:
    """Run `python -m bench gpu` and return the exit status."""
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(
            "No CUDA GPU here: nothing was measured. Run this on a machine with one, or try "
            "`--device cpu --smoke` to see that it runs.\n"
        )
        return 2
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    deadline = time.monotonic() + 60 * given.minutes
    work = Path(given.work or f"{given.out}/work")
    ops = named_ops(given.ops)
    job = Job(Path(given.out), work, device, deadline, given.smoke, ops, given.override)
    return 0 if run_parts(job, PARTS if given.part == "all" else (given.part,)) else 1
