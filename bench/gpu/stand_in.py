"""Run pieces of the GPU's command without a GPU, up to the launch of every kernel.

Triton's own path is taken, from specialization to ptxas, launchers and parsed arguments, against a
driver that launches nothing (stand_in.c). PyTorch's operations on what is large compute nothing
either: shapes and memory are real, numbers are not. So every kernel that a piece would launch lands
in Triton's cache, in the time that compiling takes. Prints a line of JSON for each piece.

    TRITON_LIBCUDA_PATH=FOLDER python -m bench.gpu.stand_in --ops swiglu "check swiglu" latency
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before Triton and the kernels are imported

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench.gpu.job import Job
from bench.gpu.piece import function
from mfmjt import cuda_graph
from mfmjt.meanflow import tangent

__all__ = ["Hollow", "dry", "installed", "main"]

SMALL = 2**14
"""Elements below which PyTorch computes: indices, masks and times decide what comes next."""
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Hollow(TorchDispatchMode):
    """Operations on large tensors give memory of the right shape, which nobody writes to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mfmjt":
            with self:  # what it launches, and what PyTorch does inside of it
                return func.redispatch(_CPU, *args, **kwargs)
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.is_view or (given and sum(x.numel() for x in given) <= SMALL):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            changed = args[0] if args else given[0]
            return changed if func._schema.returns else None
        hollow_args, hollow = pytree.tree_map(_without_memory, (args, kwargs))
        if not given:
            if "device" not in kwargs:
                return func(*args, **kwargs)
            hollow |= {"device": "meta", **({"generator": None} if "generator" in hollow else {})}
        try:
            found = func(*hollow_args, **hollow)
        except NotImplementedError:  # what it gives depends on numbers
            return func(*args, **kwargs)
        results = [x for x in pytree.tree_leaves(found) if isinstance(x, Tensor)]
        if not given and sum(x.numel() for x in results) <= SMALL:
            return func(*args, **kwargs)
        return pytree.tree_map(_with_memory, found)


def _without_memory(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _with_memory(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)


@contextlib.contextmanager
def installed(folder: str) -> Iterator[ctypes.CDLL]:
    """Inside, Triton's GPU is an H200 behind the stand-in; yields the library.

    Args:
        folder: Where its libcuda.so.1 is; TRITON_LIBCUDA_PATH says the same to Triton's linker.
    """
    library = ctypes.CDLL(f"{folder}/libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    library.stand_in_launches.restype = library.stand_in_refused.restype = ctypes.c_long
    library.stand_in_reason.restype = ctypes.c_char_p
    found = CudaDriver()
    found.get_device_capability = lambda device=None: (9, 0)
    found.get_current_device = lambda: 0
    found.get_current_stream = lambda device=None: 0
    before = driver._active
    driver.set_active(found)
    try:
        yield library
    finally:
        driver._active = before


class _Kernel:
    """What is launched in a dry run."""

    function, packed_metadata = None, ()

    def launch_metadata(self, *_: Any) -> None:
        pass

    def run(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def dry(found: set[tuple[str, Any]]) -> Iterator[None]:
    """Inside, kernels are not compiled: `found` gets the name and the key of each."""
    compile_ = JITFunction._do_compile

    def only_counted(self: Any, key: Any, signature: Any, device: Any, *rest: Any) -> _Kernel:
        kernel = self.device_caches[device][0][key] = _Kernel()
        found.add((self.fn.__name__, key))
        return kernel

    JITFunction._do_compile = only_counted
    try:
        yield
    finally:
        JITFunction._do_compile = compile_


def run(piece: str, job: Job, ops: tuple[str, ...]) -> None:
    """Run a piece as on a GPU, with nothing to compute."""
    part, *what = piece.split()
    work = function(part, *what, ops=ops)
    if part == "train":  # reading clips is no work of the GPU's
        from bench.gpu import nano

        nano.extract(job, clips=2, validation=2, workers=0)
        with Hollow():
            nano.training(job, "graph", steps=4, flow_steps=2)
        return
    with Hollow():
        work(job)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.stand_in",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("piece", nargs="+")
    parser.add_argument("--ops", required=True)
    parser.add_argument("--dry", action="store_true", help="count kernels, compile none")
    parser.add_argument("--smoke", action="store_true", help="everything tiny")
    given = parser.parse_args(argv)
    _act_as_on_a_gpu()
    status = 0
    for piece in given.piece:
        status |= _report(piece, tuple(given.ops.split(",")), given.dry, given.smoke)
    return status


def _act_as_on_a_gpu() -> None:
    """Take the ways that the package goes on a GPU only, without graphs."""
    tangent.one_call_is_cheaper = lambda *_: False

    def call(self: Any, first: Tensor, **given: Any) -> Tensor:
        return self._function(first, **cuda_graph.floats_as_tensors(given, first.device))

    cuda_graph.Captured.__call__ = call  # type: ignore[method-assign]


def _report(piece: str, ops: tuple[str, ...], is_dry: bool, smoke: bool) -> int:
    kernels: set[tuple[str, Any]] = set()
    compiled: list[float] = []

    def listen(*, src: Any, metadata: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        kernels.add((src.name, metadata["hash"]))
        if not cache_hit:
            compiled.append(times.total / 1e6)

    knobs.compilation.listener = listen
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        library = stack.enter_context(installed(os.environ["TRITON_LIBCUDA_PATH"]))
        if is_dry:
            stack.enter_context(dry(kernels))
        launches = library.stand_in_launches()
        job = Job(piece, folder, folder, "cpu", smoke, float("inf"), stand_in=True)
        run(piece, job, ops)
        failed = [row for path in folder.glob("*.jsonl") for row in _failures(path)]
        found = {
            "piece": piece,
            "kernels": len(kernels),
            "compiled": len(compiled),
            "compile_s": round(sum(compiled), 1),
            "launches": library.stand_in_launches() - launches,
            "refused": library.stand_in_refused(),
            "failed": failed[:4],
            "seconds": round(time.monotonic() - began, 1),
        }
        if found["refused"]:
            found["reason"] = library.stand_in_reason().decode()
    sys.stdout.write(json.dumps(found) + "\n")
    return int(bool(failed or found["refused"]))


def _failures(path: Path) -> list[str]:
    """Rows of what raised; that results are wrong is no news where nothing was computed."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["reason"] for row in rows if row.get("status") == "failed"]


if __name__ == "__main__":
    sys.exit(main())
