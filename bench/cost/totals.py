"""Model what a training step, a guided step and a vocoder take on sm_90, launch by launch.

Nothing here is measured. The launches are traced without a GPU as `bench.launches` counts them; our
kernels are compiled and modelled (`bench.cost.model` says how, and what that cannot see), all of
them one after the other. PyTorch's own operations are charged their bytes at 4.3 TB/s or, where
that is more, a share of 60 % of 790 TFLOP/s for products; convolutions of cuDNN three times their
bytes, as it turns NCHW to NHWC and back; sums by atomics 60 G elements/s, a guess. Where PyTorch
takes several kernels for an operation one is counted. Each launch costs 1.3 us more, or 0.5 us with
programmatic dependent launch: published figures of a graph's dependent nodes, not ours.

    training_step     small_16k in bf16, 256 clips of which 26 have du/dt: loss and gradients
    training_step_at_once   the same in one call of the network (`jvp_rows`)
    guided_step       small_16k in bf16, one clip, conditions encoded: `meanflow.OneStep`
    guided_step_early   the same with programmatic dependent launch, which is off
    vocoder           BigVGAN 16k in bf16, 8 s

Examples:
  python -m bench totals --of guided_step
  python -m bench totals --out bench/results/aot
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "0"  # before Triton and the kernels are imported

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import parser
from bench.aot import Launch, table_of, write_table
from bench.cost.model import MEMORY, NODE, TENSOR, cost
from bench.launches import Event, in_bfloat16, meanflow_step, network, traced
from bench.rows import Row
from mfmjt import meanflow
from mfmjt.codec.bigvgan import BigVGAN
from mfmjt.kernels.triton import launching

__all__ = ["TOTALS", "main", "total"]

SHARE = 0.6
"""Of the tensor cores' rate that the vendor's products and convolutions reach."""
ATOMICS = 60e9
"""Elements a second that are added by atomics."""


def _training_step() -> list[Event]:
    return traced(meanflow_step("small_16k", 256, 26), compiles=True)


def _training_step_at_once() -> list[Event]:
    return traced(meanflow_step("small_16k", 256, 26, one_call=True), compiles=True)


def _guided_step() -> list[Event]:
    net, z, cond = network("small_16k")
    frozen = meanflow.OneStep(net)
    frozen(z, **cond)  # the pass without conditions is encoded once
    return traced(lambda: frozen(z, **cond), compiles=True)


def _guided_step_early() -> list[Event]:
    with patch.object(launching, "EARLY", frozenset({90})):
        return _guided_step()


@torch.no_grad()
def _vocoder() -> list[Event]:
    net = in_bfloat16(BigVGAN("16k"))
    mel = torch.zeros(1, net.config.bands, 500, dtype=torch.bfloat16)
    net(mel)  # weights are arranged once
    return traced(lambda: net(mel), compiles=True)


TOTALS: dict[str, Callable[[], list[Event]]] = {
    "training_step": _training_step,
    "training_step_at_once": _training_step_at_once,
    "guided_step": _guided_step,
    "guided_step_early": _guided_step_early,
    "vocoder": _vocoder,
}


def _library(event: Event) -> Row:
    """Return the figures of an operation of PyTorch's."""
    moved = event.bytes * (3 if "convolution" in event.name else 1)
    times = {"memory": moved / MEMORY, "tensor": event.flops / (SHARE * TENSOR)}
    if "index_add" in event.name or "index_put" in event.name or "scatter_add" in event.name:
        times["atomics"] = event.bytes / 4 / ATOMICS  # read and written, of two bytes
    bound = max(times, key=lambda name: times[name])
    about = {"grid": "", "gflop": event.flops / 1e9, "megabytes": moved / 1e6}
    return {"kernel": event.name, **about, "us": times[bound] * 1e6, "bound": bound}


def _overlaps(launch: Launch) -> bool:
    """Return whether a kernel begins before the one before it has ended."""
    return bool(getattr(launch.kernel.metadata, "launch_pdl", False))


def total(name: str) -> list[Row]:
    """Return a row for each kind of launch of one of `TOTALS`, the dearest first, and their sum."""
    with FakeTensorMode():
        events = TOTALS[name]()
        found: dict[Any, Row] = {}
        for event in events:
            each = cost(event.launch) if event.launch else _library(event)
            figures = {k: each[k] for k in ("kernel", "grid", "gflop", "megabytes", "us", "bound")}
            figures["us"] = float(f"{figures['us']:.4g}")
            figures["gap_us"] = NODE[bool(event.launch and _overlaps(event.launch))]
            row = found.setdefault(tuple(figures.values()), {"launches": 0, **figures})
            row["launches"] += 1
    rows = list(found.values())
    for row in rows:
        row["total_us"] = row["launches"] * (row["us"] + row["gap_us"])
    rows.sort(key=lambda row: -row["total_us"])
    sums = {
        k: sum(r["launches"] * r[k] for r in rows) for k in ("gflop", "megabytes", "us", "gap_us")
    }
    launches, whole = sum(r["launches"] for r in rows), sum(r["total_us"] for r in rows)
    about = {"launches": launches, "kernel": "all", "grid": "", **sums, "bound": ""}
    rows.insert(0, {**about, "total_us": whole})
    order = (
        "kernel",
        "grid",
        "launches",
        "gflop",
        "megabytes",
        "us",
        "bound",
        "gap_us",
        "total_us",
    )
    return [
        {"target": "sm_90", "op": name}
        | {k: float(f"{row[k]:.4g}") if isinstance(row[k], float) else row[k] for k in order}
        for row in rows
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and model; return the exit status."""
    command = parser("totals", __doc__)
    command.add_argument("--of", action="append", choices=[*TOTALS], help="[all]")
    command.add_argument(
        "--out", metavar="DIR", help="put rows into DIR/totals_triton_<version>.csv"
    )
    given = command.parse_args(argv)
    for name in given.of or TOTALS:
        rows = total(name)
        for row in rows:
            print("  ".join(f"{row[k]}" for k in list(row)[1:]), flush=True)
        if given.out:
            write_table(rows, table_of("totals_", given.out), [*TOTALS])
    return 0
