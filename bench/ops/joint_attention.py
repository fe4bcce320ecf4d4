"""`joint_attention` of the latent alone, of three streams, and on the peers' own shapes.

Of masks, causal order and grouped queries the kernels are compiled; nobody times them yet.

Whoever takes one tensor concatenates the streams first, as a network must; that is timed. The
peers' shapes are those of their published tables, in the memory order that they want. FLOPs are
those of the matrix products: two for the value, four more for the tangent, five for the gradients,
one of them a second time, as PyTorch counts them too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.case import Case, Cost, Input, Shape, shapes
from bench.providers import Provider, Unsupported, package
from mfmjt.kernels.joint_attention import joint_attention, joint_attention_ref

__all__ = ["cases", "providers"]

One = Callable[[Tensor, Tensor, Tensor], Tensor]

PEERS = (
    *((2, 12, 64, length) for length in (512, 256, 1024, 2048)),  # jvp_flash_attention's table
    (1, 16, 64, 8192),  # flash-attention's thread on forward mode, and TVM's widths
    (1, 16, 128, 8192),
)
"""(B, H, D, N)."""


def _streams(tensors: dict[str, Tensor], name: str) -> tuple[Tensor, ...]:
    return tuple(x for key, x in tensors.items() if key[0] == name)


def _apply(op: Any, causal: bool = False, **tensors: Tensor) -> tuple[Tensor, ...]:
    mask = tensors.get("mask")
    if mask is not None and mask.is_floating_point():
        mask = mask.to(tensors["q0"].dtype)
    return tuple(op(*(_streams(tensors, name) for name in "qkv"), mask=mask, causal=causal))


def _joined(one: One) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function of several streams from one of a single (B, N, H, D) each."""

    def function(**tensors: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (_streams(tensors, name) for name in "qkv")
        out = one(*(s[0] if len(s) == 1 else torch.cat(s, dim=1) for s in (q, k, v)))
        return tuple(out.split([x.shape[1] for x in q], dim=1))

    return function


def _case(
    name: str,
    model: str,
    size: tuple[int, int, int],
    lengths: Sequence[int],
    compile_too: bool,
    heads_first: bool = False,
) -> Case:
    """Return a case of several streams from (B, H, D) and their tokens."""
    (batch, heads, width), length = size, sum(lengths)
    return Case(
        op="joint_attention",
        name=name,
        model=model,
        batch=batch,
        length=length,
        inputs={
            f"{kind}{i}": Input((batch, tokens, heads, width), heads_first=heads_first)
            for kind in "qkv"
            for i, tokens in enumerate(lengths)
        },
        function=lambda **tensors: _apply(joint_attention, **tensors),
        reference=lambda **tensors: _apply(joint_attention_ref, **tensors),
        flops=Cost(2, 4, 5).times(2 * batch * heads * length**2 * width),
        elements=Cost(4, 4, 8).times(batch * length * heads * width),
        terms=length,
        compile_too=compile_too,
    )


def _masked(
    name: str,
    size: tuple[int, int, int],
    length: int,
    groups: int,
    mask: Tensor | None,
    causal: bool,
) -> Case:
    """Return a case of one stream with grouped queries, a mask, and causal order, or some of it."""
    case = _case(name, "masks", size, (length,), False)
    batch, heads, width = size
    inputs = dict(case.inputs)
    inputs |= dict.fromkeys(("k0", "v0"), Input((batch, length, heads // groups, width)))
    if mask is not None:
        inputs["mask"] = Input(tuple(mask.shape), constant=lambda: mask)
    return replace(
        case,
        inputs=inputs,
        function=functools.partial(_apply, joint_attention, causal),
        reference=functools.partial(_apply, joint_attention_ref, causal),
    )


def _masks() -> list[Case]:
    """Return what is compiled of masks: each alone, and all at once in the tiles of three sizes."""
    added, shown = torch.zeros(12, 250, 250), torch.ones(64, 1, 250, 250, dtype=torch.bool)
    large, small = (64, 12, 64), (1, 12, 64)
    return [
        _masked("causal, grouped", large, 250, 3, None, True),
        _masked("a mask of bool", large, 250, 1, shown, False),
        _masked("all of it", large, 250, 3, added, True),
        _masked("all of it, one sample", small, 250, 3, added, True),
        _masked("all of it, heads of 128", (2, 12, 128), 250, 3, added, True),
    ]


def _network(s: Shape, streams: Sequence[int], kind: str, compile_too: bool) -> Case:
    size = (s.batch, s.heads, s.dim // s.heads)
    return _case(f"{s.name} {kind}", s.model, size, streams, compile_too)


def cases(scale: str) -> list[Case]:
    """Return the cases of a scale."""
    found = []
    for s in shapes(scale):
        joint = (s.length, sum(s.streams[1:])) if scale == "aot" else s.streams
        found.append(_network(s, joint, "joint", s.compile_too))
        found.append(_network(s, (s.length,), "self", s.compile_too and scale == "gpu"))
    if scale == "aot":
        wide = _case("heads of 128", shapes(scale)[0].model, (2, 12, 128), (512,), False)
        found.insert(2, wide)
        found += _masks()
    if scale == "gpu":
        peers = [
            _case(f"B={b} H={h} d={d} N={n}", "peers", (b, h, d), (n,), n == 512, heads_first=True)
            for b, h, d, n in PEERS
        ]
        found = [*found[:4], *peers, *found[4:]]
    return found


def providers(case: Case) -> list[Provider]:
    """Return PyTorch's four ways, compiled forward mode over one of them, and the packages."""
    gpu = ("cuda",)
    found = [
        Provider("sdpa_math", _joined(_math)),
        Provider("compile_sdpa_math", _joined(_math), compiled=True, devices=gpu),
        Provider("sdpa_flash", _joined(_sdpa(SDPBackend.FLASH_ATTENTION))),
        Provider("sdpa_cudnn", _joined(_sdpa(SDPBackend.CUDNN_ATTENTION)), devices=gpu),
        Provider("sdpa_efficient", _joined(_sdpa(SDPBackend.EFFICIENT_ATTENTION)), devices=gpu),
    ]
    packages = {
        "jvp_flash_attention": _jvp_flash_attention,
        "rcm": _rcm,
        "flash_attn": _flash_attn,
        "xformers": _xformers,
    }
    return found + [Provider(name, _joined(one), devices=gpu) for name, one in packages.items()]


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0].transpose(1, 2)


def _sdpa(backend: SDPBackend) -> One:
    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2)

    return one


def _jvp_flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attention = package("jvp_flash_attention.jvp_attention").JVPAttn
    if q.shape[1] % 32:  # it asserts less, and then reads and writes past the end
        raise Unsupported(f"{q.shape[1]} tokens are no multiple of 32")
    dual = forward_ad._current_level >= 0
    function = attention.fwd_dual if dual else attention.fwd
    out: Tensor = function(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2)


def _rcm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attention = package("rcm.utils.flash_attention_jvp_triton")._attention
    duals = [forward_ad.unpack_dual(x.transpose(1, 2)) for x in (q, k, v)]
    if any(dual.tangent is None for dual in duals):
        raise Unsupported("it computes a value only together with a tangent")
    tangents = [dual.tangent.detach() for dual in duals]
    out, out_dot = attention.apply(*(dual.primal for dual in duals), *tangents)
    return forward_ad.make_dual(out, out_dot).transpose(1, 2)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = package("flash_attn").flash_attn_func(q, k, v)
    return out


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = package("xformers.ops").memory_efficient_attention(q, k, v)
    return out
