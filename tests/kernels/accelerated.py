"""What the tests of `accelerate_jvp` share: the two sides, and what they keep and compute."""

from __future__ import annotations

import weakref

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mfmjt.kernels import accelerate_jvp


def math_attention():
    return sdpa_kernel(SDPBackend.MATH)


def by_pytorch(function):
    def op_ref(**inputs):
        with math_attention():
            return function(**inputs)

    return op_ref


def by_us(function, functions=None):
    """The function inside the block; `functions` is what the block must then have taken."""

    def op(**inputs):
        with accelerate_jvp() as report:
            y = function(**inputs)
        if functions is not None and forward_ad._current_level >= 0:
            assert report.taken == functions
            assert report.left == {}
        return y

    return op


def kept_bytes(function):
    """Bytes that the results' tapes hold when the function has returned, parameters apart."""
    kept = weakref.WeakSet()

    class Box:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        box = Box(tensor)
        kept.add(box)
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        results, net = function()
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    storages = [b.tensor.untyped_storage() for b in kept if not b.tensor._is_zerotensor()]
    sizes = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}
    assert all(y.requires_grad for y in results)
    return sum(sizes.values())


def products(function):
    """FLOPs of matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        function()
    counts = counter.get_flop_counts()["Global"]
    layers = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
    return sum(count for op, count in counts.items() if op in layers)
