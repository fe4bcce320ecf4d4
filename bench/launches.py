"""Count the kernels of one guided generation step and of one training step, without a GPU.

A launch is every operation of PyTorch that writes memory, and every launch of a Triton kernel of
ours; views, allocations and what the host computes are none. Tensors have no memory, so nothing is
computed: Triton's launchers run as on a GPU of compute capability 9.0 and launch nothing.
PyTorch's own operations are counted as one launch each, where some take several on a GPU.

    mfmjt         `meanflow.OneStep`, conditions encoded, guidance and the step taken
    mfmjt_eager   the same through the network as it is trained
    eager         the same in plain PyTorch, one pass after the other, as MMAudio's code has it
    training      a loss with du/dt of some clips, and its gradients

With --show also which operations of a training step add in an order that changes (by atomics), so
that two runs differ: there is to be none.

Examples:
  python -m bench launches
  python -m bench launches --network large_44k_v2 --show
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "0"  # before Triton and the kernels are imported

import torch
import triton
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

from bench import parser
from bench.aot import TARGETS, Launch, compile_launch, offline_driver
from bench.networks.given import features
from mfmjt import kernels, meanflow
from mfmjt.meanflow import tangent
from mfmjt.model import MFMJT, conditioning
from mfmjt.model.config import CONFIGS

__all__ = ["MOST", "Event", "atomics", "counted", "holds_none", "in_bfloat16", "main"]
__all__ += ["meanflow_step", "network", "traced"]

MOST = {"small_16k": 101}
"""Launches that a guided step may take."""
Module = TypeVar("Module", bound=nn.Module)
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view", "alias"}
FREE |= {"atleast_1d", "promote_types", "is_same_size", "_has_same_storage_numel", "device"}
FREE |= {"_efficientzerotensor"}
ATOMIC = {"bincount", "embedding_dense_backward", "histc", "index_add", "index_put", "put"}
ATOMIC |= {"_index_put_impl", "_unsafe_index_put", "index_reduce", "scatter_add", "scatter_reduce"}
"""Operations that add by atomics on a GPU, or may."""
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Event(NamedTuple):
    """Something that would be launched.

    Attributes:
        name: Its namespace and name.
        bytes: Of the tensors that an operation of PyTorch takes and gives.
        flops: Of a matrix product of PyTorch's.
        launch: A kernel of ours, where kernels are compiled.
    """

    name: str
    bytes: int = 0
    flops: int = 0
    launch: Launch | None = None


def _bytes(x: Any) -> int:
    """Return the bytes of a tensor; what an axis repeats is there once."""
    if not isinstance(x, Tensor):
        return 0
    sizes = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return math.prod(sizes) * x.element_size()


class _Trace(TorchDispatchMode):
    """Record what would be launched."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Event] = []
        self.make = conditioning._cached

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mfmjt":
            with self:  # what is launched inside of it
                return func.redispatch(_CPU, *args, **kwargs)
        name = func.overloadpacket.__name__
        out = func(*args, **kwargs)
        if not func.is_view and name not in FREE:
            moved = sum(map(_bytes, pytree.tree_leaves((args, kwargs, out))))
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            self.found.append(Event(f"{func.namespace}::{name}", moved, flops))
        return out

    def uncounted(self, *args: Any) -> Tensor:
        """Make a table, which is kept where tensors have memory."""
        before = len(self.found)
        table = self.make(*args)
        del self.found[before:]
        return table


def holds_none(kernel: Any, args: tuple[Any, ...]) -> list[str]:
    """Return arguments that a kernel compares with None though they are tuples that hold None.

    Triton 3.6 has no type for such a tuple, and does not compile the comparison.
    """
    compared = set(re.findall(r"(\w+) is (?:not )?None", kernel.src))
    pairs = zip(kernel.arg_names, args, strict=False)
    return [name for name, x in pairs if name in compared and _holds_none(x)]


def _holds_none(x: Any) -> bool:
    return isinstance(x, tuple) and any(part is None or _holds_none(part) for part in x)


def traced(call: Callable[[], Any], compiles: bool = False) -> list[Event]:
    """Return what a call on tensors without memory would launch, on sm_90.

    Args:
        call: What is called, inside of a FakeTensorMode.
        compiles: Compile our kernels; their launches are in the events.

    Raises:
        ValueError: Triton 3.6 would not compile a kernel, see `holds_none`.
    """
    mode = _Trace()

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if names := holds_none(kernel, args):
            raise ValueError(f"{kernel.fn.__name__}: {', '.join(names)} hold None beside others")
        made = compile_launch(kernel, args, grid, kwargs) if compiles else None
        mode.found.append(Event(f"triton::{kernel.fn.__name__}", launch=made))

    with (
        offline_driver(TARGETS["sm_90"].target),
        patch.object(JITFunction, "run", launch),
        patch.object(Tensor, "data_ptr", lambda _: 0),  # read for its alignment alone
        patch.object(conditioning, "_cached", mode.uncounted),
        mode,
    ):
        call()
    return mode.found


def in_bfloat16(net: Module) -> Module:
    """Give a network without memory other weights: `Module.to` refuses to."""
    weights = {k: v.to(torch.bfloat16) for k, v in net.state_dict().items()}
    net.load_state_dict(weights, assign=True)
    return net


def network(name: str) -> tuple[MFMJT, Tensor, dict[str, Tensor]]:
    """Return a named network in bfloat16, latents of one sound, and its features."""
    dtype, net = torch.bfloat16, in_bfloat16(MFMJT.from_config(name))
    z = torch.zeros(1, net.config.latent_length, net.config.latent_dim)
    return net, z, {n: x.to(dtype) for n, x in features(net.config, 1).items()}


def meanflow_step(
    name: str, batch: int, intervals: int, one_call: bool = False
) -> Callable[[], None]:
    """Return a call that makes a loss of some clips and its gradients; the first have du/dt.

    Args:
        name: A named network; it is made here, as a training makes it once.
        batch: Clips.
        intervals: How many have du/dt.
        one_call: The network is called once for all of them, and not once for each kind.
    """
    net, z, cond = network(name)
    clips = {key: x.expand(batch, -1, -1) for key, x in cond.items()}
    no = torch.zeros(batch, dtype=torch.bool)
    clips |= dict.fromkeys(("video_mask", "text_mask"), no)
    x, r = z.to(torch.bfloat16).expand(batch, -1, -1), torch.zeros(batch)
    t = torch.ones(batch)

    def step() -> None:
        with patch.object(tangent, "one_call_is_cheaper", lambda *_: one_call):
            loss, *_ = meanflow.loss_and_errors(
                net, x, clips, noise=x, r=r, t=t, intervals=intervals
            )
            loss.backward()

    return step


def _count(call: Callable[[], Any]) -> Counter[str]:
    return Counter(event.name for event in traced(call))


def counted(name: str) -> dict[str, Counter[str]]:
    """Return each provider's launches by kernel: a named network in bfloat16, one sound."""
    with FakeTensorMode():
        net, z, cond = network(name)
        no = torch.zeros(1, dtype=torch.bool)

        @torch.no_grad()
        @kernels.reference()
        def eager() -> Tensor:
            u_c = net(z, 0.0, 1.0, **cond)
            u_0 = net(z, 0.0, 1.0, **cond, video_mask=no, text_mask=no)
            return z - meanflow.guide(u_c, u_0, 1.5, "cfg_scaled")

        frozen, ours = meanflow.OneStep(net), meanflow.OneStep(net, compile=False)
        frozen(z, **cond)  # the pass without conditions is encoded once
        return {
            "mfmjt": _count(lambda: frozen(z, **cond)),
            "mfmjt_eager": _count(lambda: ours(z, **cond)),
            "eager": _count(eager),
            "training": _count(meanflow_step(name, 3, 2)),
        }


def atomics(counts: Counter[str]) -> dict[str, int]:
    """Return PyTorch's launches that add by atomics; no kernel of ours does."""
    return {n: c for n, c in counts.items() if n.partition("::")[2].rstrip("_") in ATOMIC}


def main(argv: list[str] | None = None) -> int:
    """Count, and print; return the exit status."""
    options = parser("launches", __doc__)
    options.add_argument("--network", choices=sorted(CONFIGS), default="small_16k")
    options.add_argument("--show", action="store_true", help="also what is launched how often")
    options.add_argument("--json", action="store_true", help="print one line of JSON")
    given = options.parse_args(argv)
    found, most = counted(given.network), MOST.get(given.network)
    totals = {provider: counts.total() for provider, counts in found.items()}
    for provider, total in totals.items() if not given.json else ():
        print(f"{given.network} {provider}: {total} launches")
        for name, count in found[provider].most_common() if given.show else ():
            print(f"  {count:5} {name}")
    by_atomics = atomics(found["training"])
    if given.show:
        print(f"{given.network} training: {sum(by_atomics.values())} launches add by atomics")
    if given.json:
        row = {"network": given.network, "triton": triton.__version__, "most": most}
        row |= {"training": totals.pop("training"), "launches": totals, "by_kernel": found}
        row["atomics"] = by_atomics
        print(json.dumps(row))
    return int(most is not None and totals["mfmjt"] > most)
