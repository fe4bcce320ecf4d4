"""Triton's GPU is an H200 behind a driver that launches nothing: libcuda.c."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

__all__ = ["build", "install"]

NAME = "libcuda.so.1"


def build(folder: Path) -> None:
    """Compile the driver into `folder`, which TRITON_LIBCUDA_PATH then has to name."""
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    options = ["-O1", "-shared", "-fPIC", f"-I{include}", f"-Wl,-soname,{NAME}"]
    source = Path(__file__).with_name("libcuda.c")
    subprocess.run(["gcc", *options, "-o", folder / NAME, source], check=True)


def install() -> ctypes.CDLL:
    """Let kernels be launched by it, on tensors of the CPU; call before they are imported.

    Returns:
        The library, to be asked for what was launched and refused.
    """
    os.environ["TRITON_INTERPRET"] = "0"
    # What Triton compiles is linked to this name, and finds it loaded.
    library = ctypes.CDLL(f"{os.environ['TRITON_LIBCUDA_PATH']}/{NAME}", mode=ctypes.RTLD_GLOBAL)
    library.stand_in_reason.restype = ctypes.c_char_p

    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime.driver import driver

    found = object.__new__(CudaDriver)  # its constructor asks PyTorch for a GPU
    found.utils, found.launcher_cls = CudaUtils(), CudaLauncher
    found.get_device_capability = lambda device=None: (9, 0)
    found.get_current_device = lambda: 0
    found.get_current_stream = lambda device=None: 0
    driver.set_active(found)
    return library
