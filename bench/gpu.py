"""All that needs a GPU, in parts that stop before a time limit and go on at the next call.

check   every op and the network on the device against float64 on the CPU: value, tangent, gradient
time    the same ops, a training step and one-step generation: ours, the reference, and, without
        tangents, the compiled reference; generation also as one CUDA graph
train   nano: clips are made, encoded and trained on until the time is up, then on the next call

Needs torch, NumPy and safetensors, and Triton where a part compiles. DIR receives small files only:
`environment.json`, `check.jsonl`, `time.jsonl`, `train.jsonl` and `network.safetensors`. Features
and training states, some hundreds of MB, go to the work folder.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import SHAPES, SMOKE, Case, op_cases
from bench.harness import Rows, environment, measure, peak_mib
from mfmjt import kernels, meanflow
from mfmjt.codec import NanoCodec
from mfmjt.encoders import NanoEncoders
from mfmjt.errors import InputError
from mfmjt.model import MFMJT
from mfmjt.train.config import FeatureExtraction, NetworkTraining, load_config
from mfmjt.train.features import extract_all
from mfmjt.train.loop import train

__all__ = ["PARTS", "Job", "run"]

PARTS = ("check", "time", "train")
PRETRAINED = Path(__file__).parent.parent / "mfmjt" / "pretrained" / "nano"
TINY = {"hidden_dim": 16, "num_heads": 1, "depth": 2, "fused_depth": 1}
GRADIENT = "gradient"


@dataclass(frozen=True)
class Job:
    """What to run and where.

    Attributes:
        out: Folder of the results.
        work: Folder of features and training states.
        device: Device to measure.
        deadline: `time.monotonic()` at which to stop.
        smoke: Everything tiny, to see that it runs.
        overrides: Settings of the stage `network`, `key=value` each.
    """

    out: Path
    work: Path
    device: torch.device
    deadline: float
    smoke: bool = False
    overrides: Sequence[str] = ()

    def seconds_left(self) -> float:
        """Time until the deadline."""
        return self.deadline - time.monotonic()


def run(job: Job, parts: Sequence[str]) -> bool:
    """Run `parts` in order; return whether all was right and nothing is left to do."""
    job.out.mkdir(parents=True, exist_ok=True)
    job.work.mkdir(parents=True, exist_ok=True)
    stamp = json.dumps(environment(job.device), indent=2)
    (job.out / "environment.json").write_text(stamp + "\n")
    print(stamp)
    functions = {"check": check, "time": time_all, "train": train_nano}
    good = True
    for part in parts:
        print(f"== {part}", flush=True)
        good = functions[part](job) and good
    return good


# check


def check(job: Job) -> bool:
    """Compare with float64 on the CPU; an op may err twice as much as its reference does there."""
    # TF32 would be PyTorch's error in the reference's place.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    path = job.out / "check.jsonl"
    path.unlink(missing_ok=True)  # seconds of work, and the code may have changed
    rows, good = Rows(path, ()), True
    for case, dtype in _checks(job):
        if job.seconds_left() < 0:
            print("The time is up; the rest of the checks is left out.")
            return False
        truth = _results(case, case.reference, torch.float64, torch.device("cpu"), dtype)
        theirs = _results(case, case.reference, dtype, job.device, dtype)
        try:
            ours = _results(case, case.function, dtype, job.device, dtype)
        except Exception as error:  # a broken kernel shall not hide the others
            ours = {}
            print(f"FAILED {case.op} {case.shape} {dtype}: {type(error).__name__}: {error}")
        for kind in truth:
            row = _judge(truth[kind], ours.get(kind), theirs[kind], dtype, case.terms)
            name = str(dtype).removeprefix("torch.")
            rows.add(op=case.op, shape=case.shape, dtype=name, kind=kind, **row)
            good &= bool(row["ok"])
            if not row["ok"]:
                print(f"WRONG {case.op} {case.shape} {name} {kind}: {row}")
    right = sum(bool(row["ok"]) for row in rows.rows)
    print(f"{right} of {len(rows.rows)} checks passed.")
    return good


def _checks(job: Job) -> Iterator[tuple[Case, torch.dtype]]:
    for shape in SMOKE if job.smoke else SHAPES:
        for case in op_cases(shape):
            for dtype in (torch.float32, torch.bfloat16):
                yield case, dtype
    yield _network_case(job), torch.float32


Results = dict[str, list[Tensor]]


def _results(
    case: Case,
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    dtype: torch.dtype,
    device: torch.device,
    rounded: torch.dtype,
) -> Results:
    """Values, tangents and gradients of `case` computed in `dtype`, from inputs in `rounded`."""
    generator = torch.Generator().manual_seed(1)

    def place(x: Tensor) -> Tensor:
        return x.to(rounded).to(device, dtype)

    def draw(like: Tensor) -> Tensor:
        return place(torch.randn(like.shape, generator=generator, dtype=torch.float64))

    leaves = {name: place(x).requires_grad_() for name, x in case.inputs.items()}
    dots = tuple(draw(leaves[name]) for name in case.moving)

    def moved(*xs: Tensor) -> tuple[Tensor, ...]:
        return _tuple(function(**(leaves | dict(zip(case.moving, xs, strict=True)))))

    plain = _tuple(function(**leaves))
    bars = [draw(y) for y in plain]
    loss = sum(((y * bar).sum() for y, bar in zip(plain, bars, strict=True)), torch.zeros(()))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    xs = tuple(leaves[name] for name in case.moving)
    values, tangents, *_ = torch.func.jvp(moved, xs, dots)
    results = {
        "value": list(plain),
        "value under jvp": list(values),
        "tangent": list(tangents),
        GRADIENT: list(gradients),
    }
    return {kind: [x.detach().double().cpu() for x in found] for kind, found in results.items()}


def _tuple(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (y,) if isinstance(y, Tensor) else tuple(y)


def _judge(
    truth: list[Tensor],
    ours: list[Tensor] | None,
    theirs: list[Tensor],
    dtype: torch.dtype,
    terms: int,
) -> dict[str, Any]:
    """Largest errors over the results of a kind, and whether ours is within what is allowed.

    Allowed is twice the reference's error in the same dtype on the same device, and as many
    roundings of the result as a sum of `terms` numbers may gather.
    """
    scale = max(float(x.abs().max()) for x in truth)
    error, reference = (
        max(float((x - y).abs().max()) for x, y in zip(found, truth, strict=True))
        if found
        else float("nan")
        for found in (ours, theirs)
    )
    limit = 2 * reference + (4 + terms**0.5) * torch.finfo(dtype).eps * scale
    return {"ok": error <= limit, "error": error, "reference": reference, "scale": scale}


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
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    inputs = {
        "z": randn(4, length, config.latent_dim),
        "t": torch.tensor([1.0, 0.75, 0.5, 0.125], dtype=torch.float64),
        "video": randn(4, video, config.video_dim),
        "sync": randn(4, sync, config.sync_dim),
        "text": randn(4, config.text_length, config.text_dim),
    }

    placed: dict[tuple[torch.device, torch.dtype], MFMJT] = {}

    def function(z: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        # The first call with new inputs is a plain one: under jvp parameters cannot be moved.
        where = (z.device, z.dtype)
        if where not in placed:
            placed[where] = copy.deepcopy(net).to(*where)
        result: Tensor = placed[where](z, torch.zeros_like(t), t, **cond)
        return result

    def reference(**given: Tensor) -> Tensor:
        with kernels.reference():
            return function(**given)

    terms = config.depth * 4 * length * config.mlp_hidden
    return Case("network", "nano", function, reference, inputs, ("z", "t"), terms)


# time


def time_all(job: Job) -> bool:
    """Time what exists; cases that are in the file already are left out."""
    rows = Rows(job.out / "time.jsonl", ("what", "shape", "dtype", "mode"))
    dtypes = (torch.float32,) if job.smoke else (torch.bfloat16, torch.float32)
    works: list[Callable[[], bool]] = [lambda: _time_network(job, rows)]
    for shape in SMOKE if job.smoke else SHAPES:
        for case in op_cases(shape):
            works += [
                lambda case=case, dtype=dtype: _time_op(job, rows, case, dtype)  # type: ignore[misc]
                for dtype in dtypes
            ]
    for work in works:
        if (job.seconds_left() < 60 and not job.smoke) or not work():
            print("The time is up; the same command goes on from here.")
            return False
    return True


def _time_op(job: Job, rows: Rows, case: Case, dtype: torch.dtype) -> bool:
    name = str(dtype).removeprefix("torch.")
    leaves = {k: x.to(job.device, dtype).requires_grad_() for k, x in case.inputs.items()}
    for mode in ("value", "value_bwd", "jvp", "jvp_bwd"):
        if rows.has(what=case.op, shape=case.shape, dtype=name, mode=mode):
            continue
        functions = {"mfmjt": case.function, "reference": case.reference}
        if job.device.type == "cuda" and mode.startswith("value"):
            torch.compiler.reset()
            functions["compile"] = torch.compile(case.reference)
        calls = {k: _op_call(f, leaves, case.moving, mode) for k, f in functions.items()}
        _compare(job, rows, calls, what=case.op, shape=case.shape, dtype=name, mode=mode)
    return True


def _op_call(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    leaves: dict[str, Tensor],
    moving: tuple[str, ...],
    mode: str,
) -> Callable[[], object]:
    xs = tuple(leaves[name] for name in moving)
    dots = tuple(torch.ones_like(x) for x in xs)

    def forward() -> tuple[Tensor, ...]:
        if not mode.startswith("jvp"):
            return _tuple(function(**leaves))
        values, *_ = torch.func.jvp(
            lambda *at: _tuple(function(**(leaves | dict(zip(moving, at, strict=True))))), xs, dots
        )
        return values

    def call() -> object:
        if not mode.endswith("bwd"):
            with torch.no_grad():
                return forward()
        ys = forward()
        return torch.autograd.grad(ys, list(leaves.values()), [torch.ones_like(y) for y in ys])

    return call


def _time_network(job: Job, rows: Rows) -> bool:
    """Training steps and one-step generation of whole networks."""
    names = ("nano",) if job.smoke else ("nano", "small_16k")
    for name in names:
        overrides = TINY if job.smoke else {}
        net = MFMJT.from_config(name, **overrides).to(job.device)
        half = "float32" if job.smoke else "bfloat16"
        batch, length = (2, 20) if job.smoke else (64, net.config.latent_length)
        for ratio in (0.0, 0.1, 0.25):
            if job.seconds_left() < 60 and not job.smoke:
                return False
            mode = f"train_ratio_{ratio}"
            if not rows.has(what="network", shape=name, dtype=half, mode=mode):
                calls = _train_calls(net, batch, length, ratio, half)
                fields = {"what": "network", "shape": name, "dtype": half, "mode": mode}
                _compare(job, rows, calls, **fields, batch=batch, length=length)
        if not rows.has(what="network", shape=name, dtype=half, mode="generate"):
            net = net.eval().requires_grad_(False).to(dtype=getattr(torch, half))
            calls = _generate_calls(net, length)
            fields = {"what": "network", "shape": name, "dtype": half, "mode": "generate"}
            _compare(job, rows, calls, **fields, batch=1, length=length)
    return True


def _batch(net: MFMJT, batch: int, length: int) -> tuple[Tensor, dict[str, Tensor]]:
    config, weight = net.config, net.sync_pos_emb
    video, sync = config.lengths(length)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=weight.device, dtype=weight.dtype)

    cond = {
        "video": randn(batch, video, config.video_dim),
        "sync": randn(batch, sync, config.sync_dim),
        "text": randn(batch, config.text_length, config.text_dim),
    }
    return randn(batch, length, config.latent_dim), cond


def _train_calls(
    net: MFMJT, batch: int, length: int, ratio: float, dtype: str
) -> dict[str, Callable[[], object]]:
    x, cond = _batch(net, batch, length)

    def ours() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = meanflow.loss(net, x, cond, ratio=ratio)
        loss.backward()
        net.zero_grad(set_to_none=True)

    def reference() -> None:
        with kernels.reference():
            ours()

    return {"mfmjt": ours, "reference": reference}


def _generate_calls(net: MFMJT, length: int) -> dict[str, Callable[[], object]]:
    z, cond = _batch(net, 1, length)
    step = meanflow.OneStep(net)

    def reference() -> Tensor:
        with kernels.reference():
            return step(z, **cond)

    calls: dict[str, Callable[[], object]] = {
        "mfmjt": lambda: step(z, **cond),
        "reference": reference,
    }
    if z.device.type == "cuda":
        compiled = meanflow.OneStep(torch.compile(net))
        calls["compile"] = lambda: compiled(z, **cond)
        calls["graph"] = _captured(lambda: step(z, **cond))
    return calls


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """Replay `call` as one CUDA graph, captured at its first use."""
    graphs: list[torch.cuda.CUDAGraph] = []

    def capture() -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph

    def replay() -> None:
        if not graphs:
            graphs.append(capture())
        graphs[0].replay()

    return replay


def _compare(job: Job, rows: Rows, calls: dict[str, Callable[[], object]], **fields: Any) -> None:
    """Time providers against one another and write a row for each; what fails says so."""
    able: dict[str, Callable[[], object]] = {}
    peaks: dict[str, float | None] = {}
    for provider, call in calls.items():
        try:
            call()
            peaks[provider] = peak_mib(call, job.device)
            able[provider] = call
        except (RuntimeError, NotImplementedError) as error:
            rows.add(provider=provider, error=str(error).splitlines()[0], **fields)
    seconds = 0.0 if job.smoke else 1.0
    for provider, timing in measure(able, job.device, seconds).items() if able else ():
        row = rows.add(timing, provider=provider, peak_mib=peaks[provider], **fields)
        about = " ".join(str(v) for v in fields.values())
        print(f"{about} {provider}: {row['ms_p50']} ms (launches {row['cpu_ms_p50']} ms)")


# train


def train_nano(job: Job) -> bool:
    """Go on with the training of nano until the deadline; return whether it is finished."""
    features = job.work / "features"
    ends = _ends(job)
    workers = 0 if job.smoke else max(1, (environment(job.device)["cores"] or 2) - 1)
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


def main(arguments: Any) -> int:
    """Run `python -m bench gpu` and return the exit status."""
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(
            "No CUDA GPU here: nothing was measured. Run this on a machine with one, or try "
            "`--device cpu --smoke` to see that it runs.\n"
        )
        return 2
    deadline = time.monotonic() + 60 * arguments.minutes
    work = Path(arguments.work or f"{arguments.out}/work")
    job = Job(Path(arguments.out), work, device, deadline, arguments.smoke, arguments.override)
    return 0 if run(job, PARTS if arguments.part == "all" else (arguments.part,)) else 1
