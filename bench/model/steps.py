"""Training steps, and the ways to them: what `bench_train_step` and the GPU's command time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.case import TINY
from bench.model.bench_dual import Given, given
from mfmjt import kernels, meanflow
from mfmjt.meanflow import tangent
from mfmjt.meanflow.targets import Network, Target
from mfmjt.model.config import CONFIGS

__all__ = [
    "FEW",
    "FLOW",
    "OF_PYTORCH",
    "OURS",
    "PROVIDERS",
    "VERIFIED_ROWS",
    "Plan",
    "Provider",
    "Verdict",
    "Work",
    "counted",
    "judged",
    "reason_of",
]

RATIOS = (0.0, 0.1, 0.25, 0.75, 1.0)
VERIFIED_ROWS = 4


def _without_graph(
    f: Network, z: Tensor, r: Tensor, t: Tensor, v: Tensor, cond: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """MeanFlow's target, the derivative taken apart from the prediction."""
    with torch.no_grad():
        target = meanflow.mean_velocity(f, z, r, t, v, cond)[1]
    return f(z, r, t, **cond), target


@dataclass(frozen=True)
class Provider:
    """One way to a training step.

    Attributes:
        target: What rows with r < t are regressed to; None for flow matching.
        whole: All rows are treated as if they had r < t.
        pytorch: PyTorch's own ops, not ours.
        exact: The loss is MeanFlow's, and the gradient its.
        compiled: Through torch.compile.
        at_once: One call with all rows, tangents beside, as is quicker on a CPU.
    """

    target: Target | None = meanflow.mean_velocity
    whole: bool = False
    pytorch: bool = False
    exact: bool = True
    compiled: bool = False
    at_once: bool = False


PROVIDERS = {
    "flow": Provider(None, exact=False),
    "flow_pytorch": Provider(None, pytorch=True, exact=False),
    "mfmjt": Provider(),
    "mfmjt_rows": Provider(at_once=True),
    "jvp": Provider(whole=True, pytorch=True),
    "jvp_compiled": Provider(whole=True, pytorch=True, compiled=True),
    "mfmjt_compiled": Provider(compiled=True),
    "jvp_no_grad": Provider(_without_graph, whole=True, pytorch=True),
    "finite_difference": Provider(meanflow.finite_difference(), exact=False),
    "improved": Provider(meanflow.improved_mean_velocity, exact=False),
    "alpha_flow": Provider(meanflow.alpha_flow(0.1), exact=False),
}
FLOW, OURS, TRUTH = "flow", "mfmjt", "jvp"
FEW = (FLOW, OURS)
OF_PYTORCH = (FLOW, OURS, "jvp", "jvp_no_grad")


ON_CPU = tuple(name for name, provider in PROVIDERS.items() if not provider.at_once)
"""A CPU takes all rows at once by itself."""


class Plan(NamedTuple):
    """What to time: a network at a batch and a length, at some ratios.

    Attributes:
        network: A named configuration.
        batch: Rows.
        length: Latents.
        ratios: Shares of rows with r < t.
        providers: Who; those that are compiled only where that is asked for.
    """

    network: str
    batch: int
    length: int
    ratios: tuple[float, ...] = RATIOS
    providers: tuple[str, ...] = ON_CPU


@contextlib.contextmanager
def _at_once() -> Iterator[None]:
    """Inside, a loss calls the network once wherever it can, on any device."""
    before = tangent.one_call_is_cheaper
    tangent.one_call_is_cheaper = lambda z, intervals: intervals > 0
    try:
        yield
    finally:
        tangent.one_call_is_cheaper = before


class Work:
    """A network, its data, and the steps on them.

    Args:
        plan: Sizes.
        device: Where.
        dtype: float32, or what autocast casts to.
        tiny: Two blocks of 16 channels.
    """

    def __init__(
        self, plan: Plan, device: torch.device, dtype: torch.dtype, tiny: bool = False
    ) -> None:
        video, sync = CONFIGS[plan.network].lengths(plan.length)
        lengths = {"latent_length": plan.length, "video_length": video, "sync_length": sync}
        with torch.device(device):
            self.case: Given = given(plan.network, plan.batch, **lengths, **(TINY if tiny else {}))
            self.noise = torch.randn_like(self.case.x)
        self.plan, self.device, self.dtype = plan, device, dtype

    def step(
        self, provider: Provider, ratio: float, rows: int | None = None, exact: bool = False
    ) -> Callable[[], Tensor]:
        """Return a function that gives the loss and leaves the gradients.

        Args:
            provider: Who.
            ratio: Share of rows with r < t, the first ones.
            rows: Only these first rows of the batch.
            exact: Without autocast.
        """
        case, rows = self.case, rows or self.plan.batch
        moving = 0 if provider.target is None else round(ratio * rows)
        t = case.t[:rows]
        r = torch.where(torch.arange(rows, device=self.device) < moving, case.r[:rows], t)
        x, noise = case.x[:rows], self.noise[:rows]
        cond = {name: value[:rows] for name, value in case.cond.items()}
        low = self.dtype != torch.float32 and not exact

        def loss() -> Tensor:
            return meanflow.loss(
                case.net,
                x,
                cond,
                noise=noise,
                r=r,
                t=t,
                intervals=rows if provider.whole else moving,
                target=provider.target or meanflow.mean_velocity,
            )

        forward = torch.compile(loss, dynamic=False) if provider.compiled else loss

        def step() -> Tensor:
            case.net.zero_grad(set_to_none=True)
            ops = kernels.reference() if provider.pytorch else contextlib.nullcontext()
            with ops, _at_once() if provider.at_once else contextlib.nullcontext():
                with torch.autocast(self.device.type, self.dtype, enabled=low):
                    found = forward()
                found.backward()
            return found.detach()

        return step


def counted(work: Work, ratio: float, name: str) -> tuple[int, int]:
    """FLOPs of a step, and bytes it saves for backward beside weights and data, each memory once.

    Args:
        work: Where it has no memory, call this inside the FakeTensorMode that it was made in.
        ratio: Share of rows with r < t.
        name: A provider that is not compiled: nothing inside of what is can be counted.
    """
    case = work.case
    free = [*case.net.parameters(), *case.cond.values(), case.x, work.noise]
    known = {tensor.untyped_storage()._cdata for tensor in free}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage  # held, or another would get its address
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        work.step(PROVIDERS[name], ratio)()
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


class Verdict(NamedTuple):
    """Whether a provider may be timed.

    Attributes:
        status: `ok`, `wrong` or `unsupported`.
        reason: Why not.
        error: Relative distance of its gradients from those of `jvp`; None if there are none.
    """

    status: str
    reason: str = ""
    error: float | None = None


def judged(work: Work, providers: dict[str, Provider]) -> dict[str, Verdict]:
    """Compare providers with `jvp`, in float32, on a few rows half of which have r < t.

    Of those that are exact half the digits must agree, in the loss and in all gradients together.
    """
    rows = min(VERIFIED_ROWS, work.plan.batch)

    def run(provider: Provider) -> tuple[float, Tensor]:
        loss = work.step(provider, 0.5, rows, exact=True)()
        parameters = work.case.net.parameters()
        flat = [(p if p.grad is None else p.grad).detach().flatten() for p in parameters]
        return float(loss), torch.cat(flat)

    loss, gradient = run(PROVIDERS[TRUTH])
    allowed = torch.finfo(torch.float32).eps ** 0.5
    found = {}
    for name, provider in providers.items():
        try:
            its_loss, its = run(provider)
        except Exception as failure:  # of a compiler, or for want of memory
            found[name] = Verdict("unsupported", reason_of(failure))
            continue
        of_loss = abs(its_loss / loss - 1)
        error = float((its - gradient).norm() / gradient.norm())
        right = error <= allowed and of_loss <= allowed
        why = f"loss {of_loss:.1e} and gradients {error:.1e} off; {allowed:.1e} is allowed"
        found[name] = Verdict("ok", error=error)
        if provider.exact and not right:
            found[name] = Verdict("wrong", why, error)
    work.case.net.zero_grad(set_to_none=True)
    return found


def reason_of(failure: Exception) -> str:
    """Return an error in one line."""
    return f"{type(failure).__name__}: {failure}".partition("\n")[0][:200]
