"""The whole step compiled, recorded, and without a wait for the device."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

from mfmjt.model import MFMJT
from mfmjt.train import parallel
from mfmjt.train.parallel import Processes
from mfmjt.train.tasks import network
from mfmjt.train.tasks.network import NetworkTask, train_network
from mfmjt.train.tasks.step import Step, compile_step, draw
from mfmjt.train.trainer import Trainer
from tests.train.conftest import TINY
from tests.train.states import curve, load_state
from tests.train.test_step import batch

# What reads a value on the host, or has a shape that depends on values.
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class Waits(TorchDispatchMode):
    """Fails where the host would have to wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        name = func._schema.name.partition("::")[2]
        assert not name.startswith(WAITS), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2, "checkpointing": True}, {"ratio": 1.0}])
def test_a_step_waits_for_nothing(recipe, changes):
    """Loss, gradients, clipping, optimizer and averages: what a CUDA graph records."""
    with Processes() as processes:
        run = Trainer(NetworkTask(recipe(**changes), processes), processes)
    drawn, flags = run.task.draw(0), run._flags()
    before = [p.detach().clone() for p in run.params]
    with Waits() as waits:
        flat = run.work(drawn, flags)
    assert waits.seen > 100
    assert math.isfinite(float(flat[0]))
    assert any(not torch.equal(p, old) for p, old in zip(run.params, before, strict=True))


def test_a_step_begins_without_copies_of_numbers(recipe):
    """To a GPU they are waited for, as is all that came before."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    with Processes() as processes:
        run = Trainer(NetworkTask(recipe(), processes), processes)
    with Names():
        task = run.task
        draw(task.config, task.store, 4, 20, 2, task.generator, task.chooser)
        run._flags()
    assert "rand" in seen
    assert "lift_fresh" not in seen  # what torch.tensor does with numbers


def test_what_is_not_finite_changes_nothing(recipe):
    """And the host is not asked about it: the same call leaves weights, moments and averages."""
    with Processes() as processes:
        run = Trainer(NetworkTask(recipe(ema=(0.5, 0.9)), processes), processes)
    run.work(run.task.draw(0), run._flags())
    before = {key: value.clone() for key, value in run.tensors().items()}
    drawn = run.task.draw(0)
    features = drawn.passes[0].inputs[0]
    features["latent"][0, 0, 0] = math.inf
    with Waits():
        flat = run.work(drawn, run._flags())
    assert not torch.isfinite(flat[len(drawn.figures)])
    assert all(torch.equal(value, before[key]) for key, value in run.tensors().items())
    assert run.ema.updates == 1
    assert all(float(slots["step"]) == 1 for slots in run.optimizer.state.values())


def gradients(call, net: MFMJT, intervals: int) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    torch.manual_seed(0)
    features, draws = batch()
    net.zero_grad(set_to_none=True)
    value, _ = call(features, draws, intervals)
    value.backward()
    return value.detach(), [None if p.grad is None else p.grad.clone() for p in net.parameters()]


@pytest.mark.slow
def test_compiled_it_is_the_same_also_inside_ddp(recipe):
    """One graph forward and one back, forward mode inside, and in them no wait."""
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch.manual_seed(0)
    net = MFMJT.from_config("nano", **TINY)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    config = recipe(compile=True)
    value, expected = gradients(Step(net, config), net, 3)
    step = Step(net, config)
    compile_step(step, aot_autograd(fw_compiler=look, bw_compiler=look))
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        found = gradients(parallel.replicate(step), net, 3)
    finally:
        dist.destroy_process_group()
    eps = torch.finfo(torch.float32).eps
    assert abs(float(found[0] - value)) <= eps * float(value)
    for ours, theirs in zip(found[1], expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert (ours - theirs).norm() <= 64 * eps * theirs.norm()
    assert any("_jvp" in name for name in seen)
    assert not any(word in name for name in seen for word in (*WAITS, "refuse_gradient"))


@pytest.mark.slow
def test_a_compiled_training_is_the_same(recipe, monkeypatch, tmp_path):
    eager, compiled = (
        recipe(out=str(tmp_path / name), steps=3, full_every=0, compile=name == "compiled")
        for name in ("eager", "compiled")
    )
    train_network(eager)
    # Not the real backend: that is another arithmetic, and minutes of a C++ compiler.
    fast = functools.partial(compile_step, backend="aot_eager")
    monkeypatch.setattr(network, "compile_step", fast)
    train_network(compiled)
    for ours, theirs in zip(curve(compiled.out), curve(eager.out), strict=True):
        assert ours == pytest.approx(theirs, rel=64 * torch.finfo(torch.float32).eps)


@pytest.mark.gpu
def test_a_recorded_training_is_the_same(recipe, tmp_path):
    """From the warm-up on, in both shapes of batch; and it is resumed as any other."""
    common = {"device": "cuda", "steps": 16, "checkpoint_every": 8, "lr": 1e-3}
    plain, recorded, parted = (recipe(out=str(tmp_path / n), **common) for n in "abc")
    train_network(plain)
    train_network(recipe(out=recorded.out, **common, cuda_graph=True))
    for ours, theirs in zip(curve(recorded.out), curve(plain.out), strict=True):
        assert ours == pytest.approx(theirs, rel=1024 * torch.finfo(torch.float32).eps)
    train_network(recipe(out=parted.out, **common | {"steps": 8}, cuda_graph=True))
    train_network(recipe(out=parted.out, **common, cuda_graph=True))
    assert load_state(parted.out)[1]["step"] == 16
