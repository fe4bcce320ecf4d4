"""Every bench file: its counts are the reference's, and its providers run and are right."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

from bench.case import SCALES, Case, cases, operands, shapes
from bench.machine import Ceilings, row_of
from bench.ops import OPS, named_ops
from bench.providers import OURS, REFERENCE, Provider, Unsupported, providers, step
from bench.run import prepare, truth_of
from mfmjt import kernels
from mfmjt.errors import InputError
from mfmjt.model.config import CONFIGS
from mfmjt.testing import BACKWARD, JVP, MODES, VALUE

CPU = torch.device("cpu")
FEW = Ceilings(copy_gbps=10.0, gemm_tflops={"float32": 0.1})


def tiny(op: str) -> Case:
    return cases(op, "tiny")[0]


def counted(case: Case, mode: str) -> int:
    given = operands(case, torch.float32, CPU)
    call = step(Provider(REFERENCE, case.reference), mode)
    with FlopCounterMode(display=False) as counter:
        call(given)
    return counter.get_total_flops()


def test_every_op_has_a_file():
    public = {name for name in kernels.__all__ if hasattr(torch.ops.mfmjt, f"{name}_jvp")}
    assert set(OPS) == public | {"streams", "vocoder"}  # which have no derivatives


def test_ops_are_named():
    assert named_ops(None) == OPS
    assert named_ops("swiglu,adaln") == ("swiglu", "adaln")
    with pytest.raises(InputError, match="no benchmark of relu"):
        named_ops("swiglu,relu")


@pytest.mark.parametrize("op", OPS)
def test_cases_are_told_apart_and_of_known_networks(op):
    for scale in SCALES:
        found = cases(op, scale)
        assert len({case.name for case in found}) == len(found)
        for case in found:
            known = case.model in CONFIGS or case.model in (
                "tiny",
                "peers",
                "masks",
                "small_16k_one",
                "widest",
            )
            assert known or case.model.startswith("bigvgan_")
    assert {case.batch for case in cases(op, "gpu")} >= (
        {1} if op in ("snake", "vocoder") else {1, 2, 26, 64}
    )


def test_shapes_are_the_networks():
    (s,) = (s for s in shapes("gpu") if s.name == "small_16k B=26")
    assert (s.length, s.dim, s.heads, s.hidden) == (250, 448, 7, 1280)
    assert s.streams == (250, 64, 77)


@pytest.mark.parametrize("op", ["linear", "conv1d", "swiglu_product", "joint_attention", "streams"])
def test_flops_are_those_that_torch_counts(op):
    for case in cases(op, "tiny"):
        assert case.flops.of(VALUE) == counted(case, VALUE)
        if op == "joint_attention":
            batch, _, heads, width = case.inputs["q0"].shape
            shape = (batch, heads, case.length, width)
            assert case.flops.backward == sdpa_backward_flop_count(*[shape] * 4)
        elif BACKWARD in case.modes:
            assert case.flops.of(BACKWARD) == counted(case, BACKWARD)


def test_a_tangent_costs_one_product_where_torch_takes_two():
    case = tiny("linear")
    assert case.flops.of(JVP) == 2 * case.flops.of(VALUE)
    assert counted(case, JVP) == 3 * case.flops.of(VALUE)


@pytest.mark.parametrize("op", ["adaln", "gated_residual_adaln", "qk_norm_rope", "swiglu", "snake"])
def test_element_wise_ops_count_what_goes_in_and_out(op):
    case = tiny(op)
    given = operands(case, torch.float32, CPU)
    rows = [x.numel() for n, x in given.inputs.items() if case.inputs[n].moves and n != "rope"]
    out = sum(bar.numel() for bar in given.cotangents)
    assert case.flops == (0, 0, 0)
    assert case.elements.value == case.elements.tangent == sum(rows) + out


def test_the_floor_is_the_larger_of_two():
    case = tiny("linear")
    row = row_of(case, torch.float32, VALUE, FEW)
    flops = 1e3 * row["flops"] / (FEW.gemm_tflops["float32"] * 1e12)
    move = 1e3 * row["bytes"] / (FEW.copy_gbps * 1e9)
    assert math.isclose(row["floor_ms"], max(flops, move), rel_tol=1e-4)
    assert row["bytes"] == 4 * case.elements.value
    assert row.keys() == row_of(tiny("snake"), torch.float32, JVP, FEW).keys()


@pytest.mark.parametrize("op", OPS)
def test_every_provider_is_right_or_says_why(op):
    case = tiny(op)
    given = operands(case, torch.float32, CPU)
    truth = truth_of(case, given)
    for mode in case.modes:
        for provider in providers(case, CPU, mode):
            row, call = prepare(provider, mode, given, truth)
            if call:
                assert row["status"] == "ok"
                assert 0 <= row["error_of_limit"] <= 1
            else:
                assert op == "joint_attention"
                assert provider.name not in (REFERENCE, OURS)
                assert row["status"] == "unsupported"
                assert row["reason"]


def test_peers_that_are_not_here_say_so():
    """As on a GPU without them; where they are installed, they refuse the CPU."""
    case = tiny("joint_attention")
    peers = [p for p in providers(case, torch.device("cuda"), VALUE) if p.devices == ("cuda",)]
    assert {"jvp_flash_attention", "rcm", "flash_attn", "xformers"} <= {p.name for p in peers}
    for peer in peers:
        row, call = prepare(peer, VALUE, operands(case, torch.float32, CPU), None)
        assert call is None
        assert row["status"] == "unsupported"
        assert row["reason"]


def test_what_is_wrong_is_not_timed():
    case = tiny("adaln")
    given = operands(case, torch.float32, CPU)
    truth = truth_of(case, given)

    def off(**inputs: torch.Tensor) -> torch.Tensor:
        return case.function(**inputs) * 1.001

    def one_off(**inputs: torch.Tensor) -> torch.Tensor:
        y = case.function(**inputs).clone()
        y[0, -1, -1] += 1
        return y

    def narrow(**inputs: torch.Tensor) -> torch.Tensor:
        return case.function(**inputs).half().float()

    def nan(**inputs: torch.Tensor) -> torch.Tensor:
        return case.function(**inputs) * torch.nan

    def cut(**inputs: torch.Tensor) -> torch.Tensor:
        return case.function(**inputs)[:, :1]

    def unable(**inputs: torch.Tensor) -> torch.Tensor:
        raise Unsupported("not today")

    named = {"off": off, "one": one_off, "half": narrow, "nan": nan, "cut": cut, "no": unable}
    found = {n: prepare(Provider(n, f), VALUE, given, truth) for n, f in named.items()}
    assert all(call is None for _, call in found.values())
    assert {n: row["status"] for n, (row, _) in found.items()} == {
        **dict.fromkeys(named, "wrong"),
        "no": "unsupported",
    }
    assert found["no"][0]["reason"] == "not today"


def test_wrong_tangents_and_gradients_are_found():
    case = tiny("swiglu")
    given = operands(case, torch.float32, CPU)
    truth = truth_of(case, given)

    def frozen(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return case.function(gate, up.detach() + 0 * up)

    for mode, kind in ((JVP, "tangent"), (BACKWARD, "gradient")):
        row, _ = prepare(Provider("frozen", frozen), mode, given, truth)
        assert kind in row["reason"]


def test_the_compiled_call_is_verified_too():
    case = tiny("swiglu")
    given = operands(case, torch.float32, CPU)
    truth = truth_of(case, given)
    compiled = Provider("compile", case.reference, compiled=True)
    row, call = prepare(compiled, JVP, given, truth)
    assert call is not None
    assert row["status"] == "ok"


def test_operands_are_the_same_for_a_seed():
    case = tiny("joint_attention")
    first, second = (operands(case, torch.float32, CPU, seed) for seed in (1, 1))
    other = operands(case, torch.float32, CPU, 2)
    for name, x in first.inputs.items():
        assert torch.equal(x, second.inputs[name])
        assert not torch.equal(x, other.inputs[name])
    assert all(mode in MODES for mode in case.modes)
    assert first.to(torch.float64, CPU).bytes == 2 * first.bytes
