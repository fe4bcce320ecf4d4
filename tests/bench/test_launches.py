from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def counted():
    command = [sys.executable, "-m", "bench", "launches", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_step_of_small_16k_takes_few_launches(counted):
    launches = counted["launches"]
    assert launches["mfmjt"] <= counted["most"] == 101
    assert counted["most"] < launches["mfmjt_eager"] < launches["eager"]
    assert counted["by_kernel"]["mfmjt"]["triton::attention_fwd_kernel"] == 12


def test_a_tuple_that_holds_none_is_not_compared_with_none():
    """Triton 3.6 does not compile that; every launch that is counted above is held against it."""
    script = """
from types import SimpleNamespace
from bench.launches import holds_none
source = "def kernel(xs, ys, zs, n):\\n if xs is not None: ...\\n if ys is None: ..."
kernel = SimpleNamespace(src=source, arg_names=["xs", "ys", "zs", "n"])
mixed = ((1, (2, None)), (None, 1), (None, 1), 3)
print(*holds_none(kernel, mixed), *holds_none(kernel, (None, (1, 2), *mixed[2:])))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == ["xs", "ys"], done.stderr


def test_attention_with_rules_is_compiled_and_launches_our_kernels():
    """A mask, causal order, grouped queries, lengths and narrower values, of one launch each."""
    script = """
from collections import Counter
import torch
from bench.launches import FakeTensorMode, traced
from mfmjt.kernels import joint_attention

def call():
    sizes = ((2, 70, 4, 64), (2, 90, 2, 64), (2, 90, 2, 48))
    dots = tuple(torch.empty(size, dtype=torch.bfloat16) for size in sizes)
    given = tuple(x.clone().requires_grad_() for x in dots)
    rules = {"mask": torch.empty(2, 1, 70, 90, dtype=torch.bool), "causal": True}
    rules["lengths"] = torch.empty(2, dtype=torch.int64)
    y, _ = torch.func.jvp(lambda *x: joint_attention(*x, **rules), given, dots)
    torch.autograd.grad(y, given, torch.empty_like(y))

with FakeTensorMode():
    events = traced(call, compiles=True)
for name, count in sorted(Counter(e.name for e in events).items()):
    print(name, count)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert {name: n for name, n in found.items() if name.startswith("triton::")} == {
        "triton::attention_bwd_kv_kernel": "1",
        "triton::attention_bwd_q_kernel": "1",
        "triton::attention_fwd_kernel": "1",
        "triton::attention_visits_kernel": "3",
    }
    assert not {"aten::bmm", "aten::baddbmm"} & found.keys()


def test_nothing_in_a_training_step_is_added_by_atomics(counted):
    """Gradients are the same twice, and the frames' modulations are neither copied nor added up."""
    assert counted["atomics"] == {}
    ours = (Path(__file__).parents[2] / "mfmjt" / "kernels" / "triton").glob("*.py")
    assert not any("tl.atomic" in path.read_text() for path in ours)
    # Of rows of a table, such as null features; modulations have 12 blocks in each call
    assert counted["by_kernel"]["training"].get("aten::index_select", 0) < 12


def test_streams_of_a_joint_block_share_launches_in_training(counted):
    """One call of 12 blocks under forward mode, one without, and the gradients of both values."""
    by_kernel = counted["by_kernel"]["training"]
    assert by_kernel["triton::attention_fwd_kernel"] == 2 * 12
    assert by_kernel["triton::_norm_fwd_kernel"] == 2 * (2 * 12 + 1)
    assert by_kernel["triton::_qk_norm_rope_fwd_kernel"] == 2 * 12


def test_a_gated_unit_is_one_launch_in_training(counted):
    """Twelve blocks, four inputs and the global condition; nothing is activated afterwards."""
    by_kernel = counted["by_kernel"]["training"]
    assert by_kernel["triton::_product_gated_kernel"] == 2 * (12 + 4 + 1)
    assert by_kernel["triton::_swiglu_bwd_kernel"] == 2 * (12 + 4 + 1)
    assert "triton::_swiglu_fwd_kernel" not in by_kernel
