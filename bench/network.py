"""Training steps of whole networks, ours and the reference.

A step is loss and gradients, at three shares of rows with r != t.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness import Rows, Sampler, cuda_events, on_cpu, peak_mib, take_turns
from bench.providers import OURS, REFERENCE
from mfmjt import kernels, meanflow
from mfmjt.model import MFMJT

__all__ = ["KEY", "TINY", "time_networks"]

TINY = {"hidden_dim": 16, "num_heads": 1, "depth": 2, "fused_depth": 1}
KEY = ("model", "mode", "dtype", "provider")
RATIOS = (0.0, 0.1, 0.25)


def time_networks(rows: Rows, device: torch.device, end: float, tiny: bool = False) -> bool:
    """Time what is not in `rows` yet; return whether all is there.

    Args:
        rows: Identified by `KEY`.
        device: Where.
        end: `time.monotonic()` a minute before which to stop.
        tiny: Nothing of real size.
    """
    for name in ("nano",) if tiny else ("nano", "small_16k"):
        net = MFMJT.from_config(name, **(TINY if tiny else {})).to(device)
        dtype = "float32" if tiny else "bfloat16"
        batch, length = (2, 20) if tiny else (64, net.config.latent_length)
        for ratio in RATIOS:
            mode = f"train ratio={ratio}"
            fields = {"model": name, "mode": mode, "dtype": dtype, "length": length}
            if rows.has(**fields, provider=OURS):
                continue
            if time.monotonic() > end - 60 and not tiny:
                return False
            calls = _train_calls(net, batch, length, ratio, dtype)
            fields["batch"] = batch
            _compare(rows, calls, device, 0.0 if tiny else 1.0, fields)
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

    return {OURS: ours, REFERENCE: reference}


def _compare(
    rows: Rows,
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    fields: dict[str, Any],
) -> None:
    """Time providers against one another and write a row for each; what fails says so."""
    samplers: dict[str, Sampler] = {}
    peaks: dict[str, float | None] = {}
    for provider, call in calls.items():
        try:
            call()
            peaks[provider] = peak_mib(call, device)
            samplers[provider] = (
                cuda_events(call, device) if device.type == "cuda" else on_cpu(call)
            )
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            rows.add({**fields, "provider": provider, "status": "unsupported", "reason": reason})
    for provider, timing in take_turns(samplers, seconds).items():
        extra = {"provider": provider, "status": "ok", "peak_mib": peaks[provider]}
        row = rows.add({**fields, **extra}, timing)
        about = " ".join(str(v) for v in fields.values())
        print(f"{about} {provider}: {row['ms_p50']} ms (host {row['cpu_ms_p50']} ms)", flush=True)
