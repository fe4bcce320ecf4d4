"""What of PyTorch's has no forward mode: said in one line, before the backward pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from mfmjt import meanflow
from mfmjt.errors import InputError
from mfmjt.kernels import recompute

ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    """Linear layers, of which the inner ones are called by `how`."""

    def __init__(self, how=None) -> None:
        super().__init__()
        self.how = how or (lambda block, x: block(x))
        self.inward, self.times, self.outward = nn.Linear(4, 8), nn.Linear(2, 8), nn.Linear(8, 4)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())

    def forward(self, z, r, t, given=0):
        x = self.inward(z) + self.times(torch.stack((r, t), -1)) + given
        return self.outward(self.how(self.inner, x))


def trained(how=None, ratio=0.5, target=meanflow.mean_velocity, **cond):
    torch.manual_seed(0)
    net = Net(how)
    value = meanflow.loss(net, torch.randn(6, 4), cond, ratio=ratio, target=target)
    value.backward()
    return [value.detach(), *(p.grad for p in net.parameters())]


CHECKPOINTS = {
    "plain": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "parts": lambda block, x: checkpoint_sequential(block, 2, x, use_reentrant=False),
    "function": lambda block, x: checkpoint(lambda y: y.tanh() * y, x, use_reentrant=False),
}


unasked = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # no_grad


@unasked
@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("target", [meanflow.mean_velocity, meanflow.improved_mean_velocity])
def test_checkpoints_of_pytorch_are_named(how, target):
    with pytest.raises(InputError, match=r"Call mfmjt\.kernels\.recompute.* in its place\.$"):
        trained(CHECKPOINTS[how], target=target)


@unasked
@pytest.mark.parametrize("how", ["plain", "reentrant"])
def test_checkpoints_outside_of_forward_mode_stay_allowed(how):
    for kind in ({"ratio": 0.0}, {"target": meanflow.alpha_flow(0.5)}):
        for ours, truth in zip(trained(CHECKPOINTS[how], **kind), trained(**kind), strict=True):
            assert torch.equal(ours, truth)


def test_conditions_may_come_from_checkpoints():
    encoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
    given = checkpoint(encoder, torch.randn(6, 3), use_reentrant=False)
    trained(given=given)
    assert encoder[0].weight.grad.any()


def test_saved_tensors_may_be_packed():
    def elsewhere(block, x):
        with torch.autograd.graph.save_on_cpu():
            return block(x)

    assert all(map(torch.equal, trained(elsewhere), trained()))


def test_recompute_takes_their_place():
    assert all(map(torch.equal, trained(recompute), trained()))


def test_other_errors_come_through():
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

    with pytest.raises(RuntimeError, match="setup_context"):
        trained(lambda block, x: Backward.apply(x))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        trained(lambda block, x: checkpoint(block, x[:, :3], use_reentrant=False))


PROCESSES = """
import copy, functools, os, sys
import pytest, torch
import torch._decomp.decompositions_for_jvp
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from mfmjt import meanflow
from mfmjt.errors import InputError
from tests.meanflow.test_tangent import Net

def loss(net, x, e, r, t, given):
    return meanflow.loss(net, x, {"given": given}, noise=e, r=r, t=t)

class Loss(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *batch):
        return loss(self.net, *batch)

def with_buffer(net):  # which DDP sends around in every forward pass
    net.register_buffer("count", torch.zeros(()))
    return DDP(net)

def sharded(net):
    mesh = init_device_mesh("cpu", (2,))
    for part in (net.inner, net):
        fully_shard(part, mesh=mesh)
    return net

def work(rank):
    distributed.init_process_group("gloo", f"file://{sys.argv[1]}", rank=rank, world_size=2)
    torch.manual_seed(0)
    t, first = torch.rand(8), Net()
    data = torch.randn(8, 4), torch.randn(8, 4), torch.randn(8, 8)
    ways = {
        DDP: [0, 2, 4],  # one of the processes has no sample with a tangent
        with_buffer: [0, 2],
        functools.partial(DDP, find_unused_parameters=True): [0, 1],
        functools.partial(DDP, static_graph=True): [1],
        sharded: [0, 1, 2],
        lambda net: DDP(Loss(net), find_unused_parameters=True): [0, 1],
    }
    for wrap, moving in ways.items():
        r = t.clone()
        r[moving] /= 2
        whole = *data[:2], r, t, data[2]
        value = loss(first, *whole)
        truth = torch.autograd.grad(value, list(first.parameters()))
        net = copy.deepcopy(first)
        wrapped = wrap(net)
        compute = wrapped if isinstance(getattr(wrapped, "module", None), Loss) else (
            functools.partial(loss, wrapped)
        )
        for _ in range(2):  # in the second pass DDP arranges its buckets anew
            net.zero_grad()
            compute(*(given[rank::2] for given in whole)).backward()
            for p, g in zip(net.parameters(), truth):
                found = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                assert (found - g).norm() <= 64 * torch.finfo(g.dtype).eps * g.norm()
    part = [given[rank::2] for given in whole]
    hidden = DDP(copy.deepcopy(first), find_unused_parameters=True)
    with pytest.raises(InputError, match="Give it to meanflow.loss itself"):
        loss(lambda *args, **cond: hidden(*args, **cond), *part)
    old = FullyShardedDataParallel(copy.deepcopy(first), device_id=torch.device("cpu"))
    with pytest.raises(InputError, match="torch.distributed.fsdp.fully_shard"):
        loss(old, *part)
    distributed.destroy_process_group()

torch.set_num_threads(1)
children = []
for rank in range(2):
    child = os.fork()
    if not child:
        try:
            work(rank)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


def test_networks_of_several_processes(tmp_path):
    """DDP and fully_shard as they are, with synchronized gradients; others in one line."""
    command = [sys.executable, "-W", "ignore", "-c", PROCESSES, str(tmp_path / "meeting")]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
