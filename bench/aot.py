"""Compile kernels for GPUs that are not there, and read what the compiler made of them."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "0")  # kernels load Triton on a CPU build too

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

__all__ = ["TARGETS", "offline", "resources"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _Offline:
    """A driver for a GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def offline(target: GPUTarget) -> Iterator[list[Any]]:
    """Inside, a launch compiles for `target` and does nothing more; yields the compiled kernels."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_Offline(target))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = before


def resources(kernel: Any) -> dict[str, Any]:
    """Registers, spilled and shared bytes of a compiled kernel, and its matrix instructions."""
    asm = kernel.asm
    if "cubin" in asm:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            text = subprocess.run(
                [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        usage = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", text)}
        found = sorted(set(re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)", asm["ptx"])))
        row = {"registers": usage["REG"], "spills": usage["STACK"] + usage["LOCAL"]}
    else:
        text = asm["amdgcn"]
        usage = {k: int(v) for k, v in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
        found = sorted(set(re.findall(r"\b(v_mfma)\w*", text)))
        row = {"registers": usage["vgpr_count"], "spills": usage["vgpr_spill_count"]}
    meta = kernel.metadata
    return {
        "kernel": meta.name,
        **row,
        "shared": meta.shared,
        "warps": meta.num_warps,
        "matrix": " ".join(found),
    }
