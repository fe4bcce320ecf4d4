"""Count the kernels of one guided generation step, without a GPU.

A launch is every operation of PyTorch's that writes memory, and every launch of a Triton kernel of
ours; views, allocations and what the host computes are none. Triton's launchers run as on a GPU of
compute capability 9.0, but nothing is compiled or launched, so that results are not looked at.
PyTorch's own operations are counted as one launch each, where some take several on a GPU.

    mfmjt         `meanflow.OneStep`, conditions encoded, guidance and the step taken
    mfmjt_eager   the same through the network as it is trained
    eager         the same in plain PyTorch, one pass after the other, as MMAudio's code has it

    python -m bench.launches
    python -m bench.launches --network large_44k_v2 --show
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before Triton and the kernels are imported

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.jit import JITFunction

from bench.aot import TARGETS, offline_driver
from mfmjt import kernels
from mfmjt.meanflow import OneStep, guide
from mfmjt.model import MFMJT, conditioning
from mfmjt.model.config import CONFIGS

__all__ = ["BARS", "counted", "main"]

BARS = {"small_16k": 110}
"""Most launches of the frozen step."""
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view", "alias"}
FREE |= {"atleast_1d", "promote_types"}


class _Count(TorchDispatchMode):
    """Counts what would be launched, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mfmjt":
            with self:  # what is launched inside of it
                return func.redispatch(_CPU, *args, **kwargs)
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            self.found[f"{func.namespace}::{name}"] += 1
        return func(*args, **kwargs)


@contextlib.contextmanager
def _triton_counted(found: Counter[str]) -> Iterator[None]:
    run, tables = JITFunction.run, conditioning._cached

    def count_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found[f"triton::{self.fn.__name__}"] += 1

    def uncounted(*args: Any) -> Tensor:
        with _disable_current_modes():  # or a table that is kept would be made once more
            return tables(*args)

    with offline_driver(TARGETS["sm_90"].target):
        JITFunction.run = count_only
        conditioning._cached = uncounted  # type: ignore[assignment]
        try:
            yield
        finally:
            JITFunction.run = run
            conditioning._cached = tables


def counted(name: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Counter[str]]:
    """Launches of one guided step at batch 1, by provider and name.

    Args:
        name: A named configuration.
        dtype: Of weights and features.
    """
    net = MFMJT.from_config(name).eval().requires_grad_(False).to(dtype)
    c = net.config
    z = torch.zeros(1, c.latent_length, c.latent_dim)
    cond = {
        "video": torch.zeros(1, c.video_length, c.video_dim, dtype=dtype),
        "sync": torch.zeros(1, c.sync_length, c.sync_dim, dtype=dtype),
        "text": torch.zeros(1, c.text_length, c.text_dim, dtype=dtype),
    }
    no = torch.zeros(1, dtype=torch.bool)

    def eager() -> Tensor:
        with kernels.reference():
            u_c = net(z, 0.0, 1.0, **cond)
            u_0 = net(z, 0.0, 1.0, **cond, video_mask=no, text_mask=no)
        return z - guide(u_c, u_0, 1.5, "cfg_scaled")

    frozen, ours = OneStep(net), OneStep(net, compile=False)
    calls: dict[str, Callable[[], Tensor]] = {
        "mfmjt": lambda: frozen(z, **cond),
        "mfmjt_eager": lambda: ours(z, **cond),
        "eager": eager,
    }
    results = {}
    for provider, call in calls.items():
        with torch.no_grad(), _triton_counted(Counter()):
            call()  # tables and the pass without conditions are made once
        mode = _Count()
        with torch.no_grad(), _triton_counted(mode.found), mode:
            call()
        results[provider] = mode.found
    return results


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and count; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.launches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--network", choices=sorted(CONFIGS), default="small_16k")
    parser.add_argument("--show", action="store_true", help="also what is launched how often")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    given = parser.parse_args(argv)
    found = counted(given.network)
    totals = {provider: sum(counts.values()) for provider, counts in found.items()}
    bar = BARS.get(given.network)
    if given.json:
        about = {"network": given.network, "triton": triton.__version__, "bar": bar}
        print(json.dumps(about | {"launches": totals, "by_kernel": found["mfmjt"]}))
    else:
        for provider, total in totals.items():
            print(f"{given.network} {provider}: {total} launches")
            if given.show:
                for name, count in found[provider].most_common():
                    print(f"  {count:5} {name}")
    return int(bar is not None and totals["mfmjt"] > bar)


if __name__ == "__main__":
    sys.exit(main())
