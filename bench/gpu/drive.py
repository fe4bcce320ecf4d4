"""All that needs a GPU, in the order of its worth: rows come home whatever happens to a piece.

environment the machine, and its ceilings
check       every op and the network, side by side, against float64 on the CPU
memcheck    small and whole shapes under compute-sanitizer, where that is installed
latency     one guided step of generation: ours, and plain PyTorch
step        training steps as CUDA graphs, against flow matching
kernels     every op against plain PyTorch and other people's kernels, on its headline shapes
train       nano from clips that are made meanwhile, as CUDA graphs
compiled    the torch.compile providers of kernels, steps and generation
rest        float32, other shapes and networks, from a video to sound, training without graphs

Each piece is a process with a time limit, and the next one imports what it needs while one runs;
unused time moves forward. Where a piece crashes, hangs or loses its GPU context, what it was at
becomes a row, and it is started again behind that. DIR receives eight small files: summary.txt,
environment.json, and check, generate, train_step, kernels, train and pieces as .jsonl. Everything
else goes to the work folder. Needs torch, NumPy and safetensors, and Triton; jvp-flash-attention,
liger-kernel, flash-attn, xformers and rCM are timed where they can be imported. Where there is no
.git, COMMIT in the environment is the commit that rows name.

Examples:
  python -m bench gpu --out output/gpu --minutes 9            all; call it again to go on
  python -m bench gpu --out output/gpu --part check,latency --minutes 3
  python -m bench gpu --out output/two --carry output/gpu     what that run has is not made again
  python -m bench gpu --out output/gpu --cache kernels.tar.xz with kernels of `precompile`
  python -m bench gpu --out /tmp/look --device cpu --smoke    no GPU: to see that it runs
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench import ROOT, parser
from bench.gpu import LOST, file_name, summary
from bench.ops import named, named_ops
from bench.rows import Rows, commit, read
from mfmjt.errors import InputError, RunError
from mfmjt.files import atomic_path

__all__ = ["CACHE", "PARTS", "Drive", "Piece", "main", "stages"]

CACHE = Path("/tmp/mfmjt_triton_cache")
"""Triton's cache. Entries name their own place, so that an archive is unpacked to where it was."""
PARTS = (
    *("environment", "check", "memcheck", "latency", "step", "kernels", "train"),
    *("compiled", "rest"),
)
MEMCHECKED = ("joint_attention", "conv1d", "adaln", "snake")
KERNEL_SECONDS = {"joint_attention": 50.0, "conv1d": 25.0, "adaln": 18.0}
LEAST = 8.0
"""Seconds in which a piece can do something."""
GRACE = 4.0
"""Seconds beyond its limit after which a piece is killed; it says where it hangs before that."""
STARTS = 4
"""Times that a piece is started at most."""


class Piece(NamedTuple):
    """A process to run.

    Attributes:
        name: "part what", such as "check adaln".
        seconds: How long it may take.
        prefix: Command in front of it.
        env: What its environment has beside the parent's.
        after: Name of a piece of the background that must have ended.
    """

    name: str
    seconds: float
    prefix: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    after: str = ""


def stages(parts: Sequence[str], ops: Sequence[str], device: str) -> list[list[Piece]]:
    """Return what runs one after the other, and in each stage side by side."""
    cuda = device.startswith("cuda")
    most = 1.0 if cuda else 3.0  # of few cores, which compute as well

    def each(part: str, seconds: float, names: Sequence[str]) -> list[Piece]:
        return [Piece(f"{part} {name}", most * seconds) for name in names]

    def alone(part: str, seconds: float, names: Sequence[str]) -> list[list[Piece]]:
        return [[piece] for piece in each(part, seconds, names)]

    sanitizer = shutil.which("compute-sanitizer") if cuda else None
    options = (
        *("--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "20"),
        *("--kernel-name", "kernel_substring=_kernel"),  # ours, and few others
    )
    watched = [
        piece._replace(
            prefix=(sanitizer, *options) if sanitizer else (),
            env=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        )
        for piece in each("memcheck", 60.0, [op for op in ops if op in MEMCHECKED])
    ]
    first = sorted(ops, key=lambda op: (op not in KERNEL_SECONDS, op))
    train = [Piece(f"train {how}", most * 60.0, after="features") for how in ("graph", "eager")]
    of: dict[str, list[list[Piece]]] = {
        "environment": [[Piece("environment", most * 40.0)]],
        # Compiling is what takes time in a check, and cores do that side by side.
        "check": [each("check", 110.0, [*ops, "network"])],
        "memcheck": [watched] if sanitizer or not cuda else [],
        "latency": [[Piece("latency", most * 60.0)]],
        "step": [[Piece("step", most * 120.0)]],
        "kernels": [each("kernels", KERNEL_SECONDS.get(op, 14.0), [op]) for op in first],
        "train": [train[:1]],
        "compiled": alone("compiled", 150.0, ("kernels", "latency", "step")),
        "rest": [*alone("rest", 200.0, ("latency", "step", "kernels")), train[1:]],
    }
    return [stage for part in PARTS if part in parts for stage in of[part] if stage]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass
class Drive:
    """The parent of all pieces; it never touches the GPU. A thread waits for each piece.

    Attributes:
        out: Folder of the results.
        work: Folder of everything else.
        end: `time.monotonic()` at which all must be over.
        command: The command of a piece by its name.
        env: Environment of the pieces.
        least: Seconds in which a piece can do something.
    """

    out: Path
    work: Path
    end: float
    command: Callable[[str], list[str]]
    env: dict[str, str]
    least: float = LEAST
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.pieces = Rows(self.out / "pieces.jsonl", ("piece",))
        self.started: list[subprocess.Popen[bytes]] = []

    def run(self, plan: list[list[Piece]], background: Sequence[Piece] = ()) -> bool:
        """Run all stages; return whether every piece ended well."""
        known = len(self.pieces.rows)
        with ThreadPoolExecutor(64) as pool:
            try:
                behind = {p.name: pool.submit(self._run, p, self._start(p)) for p in background}
                ahead = self._ahead(plan[0] if plan else [])
                for stage, following in zip(plan, [*plan[1:], []], strict=True):
                    wait([behind[p.after] for p in stage if p.after in behind])
                    if self.left() < self.least:
                        for piece in stage:
                            self._record(piece.name, "not reached")
                        continue
                    running = [pool.submit(self._run, *started) for started in ahead]
                    ahead = self._ahead(following)
                    for ended in running:
                        ended.result()
                    summary.write(self.out)
                for ended in behind.values():
                    ended.result()
            finally:
                self.end = 0.0  # so that nothing is started again
                for process in self.started:
                    if process.poll() is None:
                        _kill(process)
                summary.write(self.out)
        return {row["status"] for row in self.pieces.rows[known:]} <= {"ok"}

    def left(self) -> float:
        """Return the seconds that a piece may still take."""
        return self.end - time.monotonic() - GRACE

    def _ahead(self, stage: list[Piece]) -> list[tuple[Piece, subprocess.Popen[bytes]]]:
        """Start a stage, which imports and then waits for its turn."""
        return [(p, self._start(p)) for p in stage] if self.left() > self.least else []

    def _start(self, piece: Piece) -> subprocess.Popen[bytes]:
        (self.work / f"{file_name(piece.name)}.note").unlink(missing_ok=True)
        with self._log(piece).open("ab") as file:
            process = subprocess.Popen(
                [*piece.prefix, *self.command(piece.name)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.env, **dict(piece.env)},
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def _log(self, piece: Piece) -> Path:
        return self.work / f"{file_name(piece.name)}.log"

    def _run(self, piece: Piece, process: subprocess.Popen[bytes]) -> None:
        """Let a piece begin, wait for its end, and start it again behind what broke."""
        end = time.monotonic() + piece.seconds
        for starts in range(1, STARTS + 1):
            began = time.monotonic()
            seconds = min(end - began, self.left())
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(f"{seconds}\n".encode(), seconds + GRACE)
            _kill(process)
            status = self._ended(piece, process.returncode, time.monotonic() - began, seconds)
            left = min(end - time.monotonic(), self.left())
            if status not in ("crashed", "lost") or left < self.least or starts == STARTS:
                break
            process = self._start(piece)

    def _ended(self, piece: Piece, code: int, took: float, seconds: float) -> str:
        """Record how a piece ended, and what its note names; return its status."""
        status = "ok" if code == 0 else "lost" if code == LOST else "failed"
        if code < 0:
            status = "crashed"
        if code and took > seconds:
            status = "timed out"
        path = self.work / f"{file_name(piece.name)}.note"
        note = json.loads(path.read_text()) if path.exists() else {}
        more = dict(note.get("facts", {}))
        if "row" in note:
            row = note["row"]
            if code:
                row["status"] = status
                row.setdefault("reason", f"exit status {code} after {took:.0f} s")
                row |= {"ok": False} if "ok" in row else {}
                more["at_row"] = {k: v for k, v in row.items() if k not in ("commit", "ok")}
            Rows(self.out / note["file"]).add(row)
        if code:
            lines = self._log(piece).read_text(errors="replace").splitlines()
            more["log"] = [line[:300] for line in lines[-20:]]
        self._record(piece.name, status, exit=code, seconds=round(took, 1), **more)
        return status

    def _record(self, name: str, status: str, **more: Any) -> None:
        at = round(time.monotonic() - self.began, 1)
        self.pieces.add({"piece": name, "status": status, "at": at, **more})
        took = f"{more['seconds']:6.1f} s" if "seconds" in more else ""
        print(f"{at:6.1f} s  {name:28} {status:12} {took}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run `python -m bench gpu`; return the exit status."""
    options = parser("gpu", __doc__, out="", smoke=True)
    options.add_argument("--work", type=Path, help="folder of everything else [a temporary one]")
    options.add_argument("--minutes", type=float, default=9.0, help="stop after so long [9]")
    options.add_argument("--part", help=f"only these of {','.join(PARTS)} [all]")
    options.add_argument("--ops", help="check and time only these, separated by commas")
    options.add_argument("--carry", type=Path, help="results of an earlier run, to go on from")
    options.add_argument("--cache", type=Path, help="kernels that `precompile` packed")
    options.add_argument("--device", default="cuda")
    given = options.parse_args(argv)
    began = time.monotonic()
    ops, parts = named_ops(given.ops), named(given.part, PARTS, "part")
    if given.device.startswith("cuda") and not _has_gpu():
        raise InputError(
            "No CUDA GPU here: nothing was measured. Run this on a machine with one, or try "
            "`--device cpu --smoke` to see that it runs."
        )
    out = given.out.resolve()
    work = Path(given.work or tempfile.mkdtemp(prefix="mfmjt_gpu_")).resolve()
    if work.is_relative_to(out):
        raise InputError(f"{work} is inside of the results, which stay small. Give another --work.")
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    if given.carry:
        carry(given.carry, out)
    if given.cache:
        unpack(given.cache)
    cores = len(os.sched_getaffinity(0))
    cache = CACHE if given.cache else os.environ.get("TRITON_CACHE_DIR", CACHE)
    env = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // 8))),
        "GOMP_SPINCOUNT": "100",
        # Inductor would choose a place of its own.
        "TRITON_CACHE_DIR": str(cache),
        "COMMIT": commit() or "",
    }
    smoke = ["--smoke"] if given.smoke else []
    places = ["--out", str(out), "--work", str(work), "--device", given.device]
    places += ["--ops", ",".join(ops), *smoke]

    def command(name: str) -> list[str]:
        return [sys.executable, "-m", "bench.gpu.piece", *places, *name.split()]

    background = []
    if "train" in parts or "rest" in parts:
        background = [Piece("features", 30 * given.minutes, ("nice", "-n", "19"))]
    least = 1.0 if given.smoke else LEAST
    drive = Drive(out, work, began + 60 * given.minutes, command, env, least, began)
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the summary is written
    try:
        good = drive.run(stages(parts, ops, given.device), background)
    finally:
        signal.signal(signal.SIGTERM, previous)
    print((out / "summary.txt").read_text())
    print(f"{out} has the results, {work} all else.")
    return 0 if good and not summary.wrong(out) else 1


def carry(source: Path, out: Path) -> None:
    """Take over the rows of an earlier run that are good; the others are to be made again.

    A file that `out` has already stays as it is: the same command was given before.

    Raises:
        InputError: There are none.
    """
    paths = sorted(source.glob("*.jsonl"))
    if not paths:
        raise InputError(f"{source} has no results (*.jsonl). Give the folder of an earlier run.")
    for path in paths:
        if path.name == "pieces.jsonl" or (out / path.name).exists():
            continue
        rows = [r for r in read(path) if r.get("status", "ok") == "ok" and r.get("ok", True)]
        with atomic_path(out / path.name) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stamp = source / "environment.json"
    if stamp.exists() and not (out / stamp.name).exists():
        shutil.copy(stamp, out)


def unpack(archive: Path) -> None:
    """Unpack a cache of kernels to where it was made.

    Raises:
        RunError: It cannot be read.
    """
    try:
        with tarfile.open(archive) as file:
            file.extractall(CACHE.parent, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise RunError(f"Cannot unpack {archive}: {error}. Make it with `precompile`.") from error


def _has_gpu() -> bool:
    """Return whether a driver is there, without PyTorch, which would start it up here."""
    devices = "/dev/nvidiactl", "/dev/kfd", "/dev/dxg"
    return any(map(os.path.exists, devices)) or shutil.which("nvidia-smi") is not None
