"""Run a piece of the GPU's command without a GPU, up to the launch of every kernel.

Triton's own path is taken, from specialization to ptxas, launchers and parsed arguments, against a
driver that launches nothing (stand_in.c). PyTorch's operations on what is large compute nothing
either: shapes and memory are real, numbers are not. So every kernel that a piece would launch lands
in Triton's cache, in the time that compiling takes. Prints a line of JSON.

    TRITON_LIBCUDA_PATH=FOLDER python -m bench.gpu.stand_in --ops swiglu check swiglu
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before Triton and the kernels are imported

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.driver import driver

from bench.gpu.job import Job
from bench.gpu.piece import function, listen
from bench.rows import read
from mfmjt import cuda_graph
from mfmjt.meanflow import tangent

__all__ = ["Hollow", "installed", "main"]

SMALL = 2**14
"""Elements below which PyTorch computes: indices, masks and times decide what comes next."""
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Hollow(TorchDispatchMode):
    """Gives memory of the right shape for operations on large tensors; nobody writes to it."""

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
        hollow_args, hollow = pytree.tree_map_only(Tensor, _on("meta"), (args, kwargs))
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
        return pytree.tree_map_only(Tensor, _on("cpu"), found)


def _on(device: str) -> Callable[[Tensor], Tensor]:
    """Return what makes a tensor like another on a device, which nobody writes to."""
    return lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


@contextlib.contextmanager
def installed(folder: str) -> Iterator[ctypes.CDLL]:
    """Make Triton's GPU an H200 behind the stand-in inside; yield the library.

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


def run(piece: str, job: Job, ops: tuple[str, ...]) -> None:
    """Run a piece as on a GPU, with nothing to compute."""
    part, *what = piece.split()
    work = function(part, *what, ops=ops)
    if part == "train":  # reading clips is no work of the GPU's
        from bench.gpu import nano

        nano.extract(job, clips=2, validation=2, workers=0)
        work = functools.partial(nano.training, how="graph", steps=4, flow_steps=2)
    with Hollow():
        work(job)


def _captured(self: Any, first: Tensor, **given: Any) -> Tensor:
    """Call the function of a `Captured` without a graph."""
    result: Tensor = self._function(first, **cuda_graph.floats_as_tensors(given, first.device))
    return result


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.stand_in",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="+")
    parser.add_argument("--ops", required=True)
    parser.add_argument("--smoke", action="store_true", help="everything tiny")
    given = parser.parse_args(argv)
    # The ways that the package goes on a GPU only, without graphs
    tangent.one_call_is_cheaper = lambda *_: False
    cuda_graph.Captured.__call__ = _captured  # type: ignore[method-assign]
    began, piece = time.monotonic(), " ".join(given.name)
    place = os.environ["TRITON_LIBCUDA_PATH"]
    with tempfile.TemporaryDirectory() as name, installed(place) as library:
        folder = Path(name)
        job = Job(piece, folder, folder, "cpu", given.smoke, float("inf"), stand_in=True)
        listen(job.facts)
        run(piece, job, tuple(given.ops.split(",")))
        # That results are wrong is no news where nothing was computed.
        rows = [row for path in folder.glob("*.jsonl") for row in read(path)]
        failed = [row["reason"] for row in rows if row.get("status") == "failed"]
        found = {
            "piece": piece,
            "kernels": job.facts["compiled"] + job.facts["from_cache"],
            **job.facts,
            "launches": library.stand_in_launches(),
            "refused": library.stand_in_refused(),
            "failed": failed[:4],
            "seconds": round(time.monotonic() - began, 1),
            "reason": library.stand_in_reason().decode(),
        }
    sys.stdout.write(json.dumps(found) + "\n")
    return int(bool(failed or found["refused"]))


if __name__ == "__main__":
    sys.exit(main())
