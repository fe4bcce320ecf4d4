"""`python -m mfmjt.info`: versions, hardware, which ops run where, and what is not installed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from mfmjt.errors import InputError, short

__all__ = ["main", "report", "terms"]

PACKAGES = ("torch", "numpy", "safetensors", "av", "soundfile", "soxr", "typer", "rich")
OPTIONAL = {
    "triton": "kernels on NVIDIA GPUs; comes with a CUDA build of PyTorch",
    "matplotlib": "plots; pip install 'mfmjt[plot]'",
    "tensorboard": "training curves; pip install 'mfmjt[train]'",
}
NOT_OPS = ("accelerate_jvp", "jvp_rows", "reference")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "bf16")


def report() -> str:
    """Return what a report of a problem or a measurement should state, as lines of text."""
    import torch

    import mfmjt

    lines = [
        f"mfmjt       {mfmjt.__version__} ({Path(mfmjt.__file__).parent})",
        f"Python      {platform.python_version()} ({sys.executable})",
        f"System      {platform.platform()}",
        *(f"{name:<12}{_version(name) or 'not installed'}" for name in PACKAGES),
        "",
        f"CPU         {_cpu()}",
        f"Threads     {torch.get_num_threads()} of {os.cpu_count()} cores",
        f"CPU code    {torch.backends.cpu.get_cpu_capability()}, oneDNN "
        f"{'yes' if torch.backends.mkldnn.is_available() else 'no'}",
        f"Precision   {_precision()}",
        *_gpus(),
        "",
        *_ops(),
        "",
        "Models      " + (", ".join(_models()) or "none ships"),
        *(
            f"{name:<12}{_version(name) or f'not installed ({use})'}"
            for name, use in OPTIONAL.items()
        ),
    ]
    return "\n".join(lines)


def terms(model: str) -> str:
    """Return under which terms a model may be used, in a line for each network of it.

    Raises:
        InputError: There is no such model.
    """
    from mfmjt.families.licenses import terms_of

    if found := terms_of(model):
        return "\n".join(map(str, found))
    if not os.path.exists(model):
        raise InputError(
            f"There is no model {model}: it is neither a file, nor a folder, nor a name or a "
            "repository that docs/licenses.md lists. Give one of these."
        )
    return (
        f"{short(model, 200)}: not known by its name. A network is under the terms of whoever "
        "trained it, and of the one that it began from; docs/licenses.md lists those of published "
        "ones."
    )


def main() -> None:
    """Print the report."""
    sys.stdout.write(report() + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    from mfmjt.devices import cpu_info, cpu_name

    fields = cpu_info()
    if not fields:
        return cpu_name()
    flags = fields.get("flags", fields.get("Features", "")).split()
    return (
        f"{cpu_name()} ({', '.join(f for f in CPU_FLAGS if f in flags) or 'no vector extensions'})"
    )


def _precision() -> str:
    """Return what matmuls on the CPU are computed in."""
    from mfmjt.kernels import precision

    slow = sorted(str(dtype).removeprefix("torch.") for dtype in precision.SLOW)
    return f"{' and '.join(slow)} in float32 on this CPU" if slow else "as asked for"


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return [f"GPU         none (PyTorch is {built})"]
    lines = []
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        memory = found.total_memory / 2**30
        lines.append(
            f"GPU {i}       {found.name}, sm_{found.major}{found.minor}, {memory:.0f} GiB, "
            f"CUDA {torch.version.cuda}"
        )
    return lines


def _ops() -> list[str]:
    """Return a line on the C++ kernels, and one for each op: what runs it on each device."""
    import torch

    from mfmjt import kernels
    from mfmjt.kernels import _backends, _native

    status = _native.status()
    if "missing" in status:
        lines = [f"C++ kernels {status['missing']}"]
    else:
        lines = [f"C++ kernels {status['used']} in use, compiled by {status['compiler']}"]
    lines.append(f"{'Ops':<24}{'on the CPU':<32}on CUDA")
    served = set(status.get("ops", "").split())
    registered = torch._C._dispatch_get_all_op_names()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in (name for name in kernels.__all__ if name not in NOT_OPS):
        names = [n for n in registered if n.rsplit("_", 1)[0] == f"mfmjt::{op}"]
        triton = any(has_kernel(name, "CUDA") for name in names)
        cuda = "Triton" if triton else "PyTorch" if _backends.AVAILABLE else "-"
        parts = sorted({name.rsplit("_", 1)[1] for name in names})
        lines.append(f"  {op:<22}{_on_cpu(op, parts, served):<32}{cuda}")
    lines.append("  accelerate_jvp        any network; print its report to see what was taken")
    return lines


def _on_cpu(op: str, parts: list[str], served: set[str]) -> str:
    """Return what runs the parts of an op (value fwd, tangent jvp, gradient bwd) on a CPU."""
    native = [part for part in parts if f"{op}_{part}" in served]
    if native and native == parts:
        return "C++"
    if native:
        rest = [part for part in parts if part not in native]
        return f"C++ {' '.join(native)}, PyTorch {' '.join(rest)}"
    return "PyTorch, parts in C++" if any(n.startswith(f"{op}_") for n in served) else "PyTorch"


def _models() -> list[str]:
    from mfmjt.families import PRETRAINED

    return sorted(path.parent.name for path in PRETRAINED.glob("*/network.safetensors"))


if __name__ == "__main__":
    main()
