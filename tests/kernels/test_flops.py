from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mfmjt import kernels
from mfmjt.kernels import _flops


def count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def shares(op, ref, *values):
    """FLOPs of (value, gradient, value and tangent, gradient beside a tangent) of op over ref."""
    leaves = tuple(x.requires_grad_() for x in values)
    moving = leaves[:1]

    def modes(op):
        y = op(*leaves)

        def dual():
            return torch.func.jvp(lambda x: op(x, *leaves[1:]), moving, moving)[0]

        y_of_dual = dual()
        return (
            count(lambda: op(*leaves)),
            count(lambda: torch.autograd.grad(y.sum(), leaves, retain_graph=True)),
            count(dual),
            count(lambda: torch.autograd.grad(y_of_dual.sum(), leaves)),
        )

    return [ours / theirs for ours, theirs in zip(modes(op), modes(ref), strict=True)]


def in_reference(op):
    def ref(*values):
        with kernels.reference():
            return op(*values)

    return ref


def test_linear():
    """As PyTorch's own, but for the third product of its forward mode."""
    values = torch.randn(3, 5, 8), torch.randn(7, 8)
    ours, ref = kernels.linear, in_reference(kernels.linear)
    assert shares(ours, ref, *values) == [1, 1, pytest.approx(2 / 3), 1]


@pytest.mark.parametrize("taps", [1, 3])
def test_conv1d(taps):
    values = torch.randn(3, 5, 8), torch.randn(7, 8, taps)
    ours, ref = kernels.conv1d, in_reference(kernels.conv1d)
    assert shares(ours, ref, *values) == [1, 1, pytest.approx(2 / 3), 1]


def test_attention():
    """Two products, six of a dual, and five of a gradient where PyTorch's formula does four."""
    q, k = torch.randn(3, 5, 2, 8), torch.randn(3, 7, 2, 8)
    ours, ref = kernels.joint_attention, in_reference(kernels.joint_attention)
    product = 2 * 3 * 2 * 5 * 7 * 8
    value = count(lambda: ours(q, k, k))
    assert value == count(lambda: ref(q, k, k)) == 2 * product
    assert count(lambda: torch.func.jvp(ours, (q, k, k), (q, k, k))) == 6 * product
    leaves = [x.clone().requires_grad_() for x in (q, k, k)]
    y = ours(*leaves)
    assert count(lambda: torch.autograd.grad(y.sum(), leaves)) == 5 * product


def test_attention_without_some_tangents():
    """Streams of 5 and 4 queries, 7 and 6 keys: what has no tangent is not multiplied."""
    streams = [torch.randn(3, n, 2, 8) for n in (5, 4, 7, 6)]

    def dual(*moving):
        def op(*dots):
            given = dict(zip(moving, dots, strict=True))
            q0, q1, k0, k1 = (given.get(i, x) for i, x in enumerate(streams))
            return kernels.joint_attention((q0, q1), (k0, k1), (streams[2], streams[3]))

        values = tuple(streams[i] for i in moving)
        return count(lambda: torch.func.jvp(op, values, values)) / (2 * 3 * 2 * 8)

    assert dual(0) == 2 * 9 * 13 + 2 * 5 * 13  # q_dot k of the first queries, and its W v
    assert dual(3) == 2 * 9 * 13 + 2 * 9 * 6  # q k_dot of the last keys, and its W v
    assert dual(0, 1, 2, 3) == 2 * 9 * 13 + 3 * 9 * 13


def test_toom_and_cook_counts_as_the_convolution():
    x, weight = torch.randn(3, 8, 5), torch.randn(7, 8, 3)
    ours = count(lambda: torch.ops.mfmjt.conv1d_toom(x, weight, None, 1))
    assert ours == count(lambda: torch.nn.functional.conv1d(x, weight, padding=1))


def test_streams():
    """As the layers of every stream."""
    xs = [torch.randn(3, n, 8) for n in (5, 4)]
    pairs = torch.randn(2, 6, 8, 3), torch.randn(2, 6, 8)
    weights = [kernels.streams.pack(*pair) for pair in pairs]
    ours = count(lambda: kernels.streams.project(xs, weights))
    assert ours == 2 * 3 * (5 * 3 + 4) * 2 * 6 * 8
    alone = kernels.streams.pack(torch.randn(24, 8))
    norms = [torch.ones(4)] * 2
    both = count(
        lambda: kernels.streams.project_qkv(xs, [alone] * 2, None, norms, norms, None, num_heads=2)
    )
    assert both == 2 * 3 * 9 * 24 * 8


def test_every_library_op_with_products_has_a_formula():
    """A new one must be entered, or counted nets would do less work than they do."""
    ops = torch._C._dispatch_get_all_op_names()
    ours = {op.removeprefix("mfmjt::") for op in ops if op.startswith("mfmjt::")}
    names = ("linear", "conv1d", "swiglu_product", "joint_attention", "streams_project")
    names += ("vocoder_convolve", "vocoder_upsample")
    products = {op for op in ours if op.startswith(names)}
    assert set(_flops._FORMULAS) == products


@pytest.mark.parametrize("before", [True, False])
def test_whichever_is_imported_first(before):
    first, second = "import torch.utils.flop_counter as counter", "import mfmjt.kernels"
    code = "\n".join(
        [
            *((first, second) if before else (second, first)),
            "import torch, sys",
            "ops = torch.ops.mfmjt",
            "assert ops.linear_jvp in counter.flop_registry",
            "assert sys.modules['torch.utils.flop_counter'] is counter",
            "assert counter.__spec__.origin.endswith('flop_counter.py')",
        ]
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
