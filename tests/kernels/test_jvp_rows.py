from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfmjt import kernels
from mfmjt.kernels import conv1d, jvp_rows, linear, swiglu
from tests.oracle import allowance, error


class Network(nn.Module):
    """A product of every kind: on the tape, frozen, of what does not move, of flattened rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(6, 6) / 2 for _ in range(4))
        self.filters = nn.Parameter(torch.randn(6, 6, 3) / 4)
        self.weights[1].requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, fixed: Tensor, shared: Tensor) -> Tensor:
        condition = linear(fixed, self.weights[0]) + linear(shared, self.weights[2])
        y = conv1d(x, self.filters) + t[:, None, None] * condition[:, None]
        y = linear(swiglu(y, x).flatten(0, 1), self.weights[3]).view_as(x)
        return y * linear(x, self.weights[1])


def given(dtype: torch.dtype = torch.float64, batch: int = 5, rows: int = 2):
    net = Network().to(dtype)
    x, x_dot = torch.randn(batch, 4, 6, dtype=dtype), torch.randn(rows, 4, 6, dtype=dtype)
    t, t_dot = torch.rand(batch, dtype=dtype), torch.ones(rows, dtype=dtype)
    fixed, shared = torch.randn(batch, 6, dtype=dtype), torch.randn(1, 6, dtype=dtype)
    return net, (x, t, fixed, shared), (x_dot, t_dot, None, None)


def separately(net: Network, primals, tangents) -> tuple[Tensor, Tensor]:
    rows = tangents[0].shape[0]
    _, _, fixed, shared = primals
    _, dot = torch.func.jvp(
        lambda x, t: net(x, t, fixed[:rows], shared),
        tuple(p[:rows] for p in primals[:2]),
        tangents[:2],
    )
    return net(*primals), dot.detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_same_as_two_calls(rows: int, dtype: torch.dtype) -> None:
    net, primals, tangents = given(dtype, rows=rows)
    value, dot = jvp_rows(net, primals, tangents)
    truth, true_dot = separately(net, primals, tangents)
    assert not dot.requires_grad
    assert error(value, truth) == 0
    assert error(dot, true_dot) <= allowance(true_dot, dtype, 64)
    wanted = [p for p in net.parameters() if p.requires_grad]
    bar = torch.randn_like(value)
    found, true = (torch.autograd.grad(v, wanted, bar) for v in (value, truth))
    assert all(error(a, b) == 0 for a, b in zip(found, true, strict=True))


def test_products_on_the_tape_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, primals, tangents = given()
    kept = []
    replay = kernels._jvp_rows._replay

    def watched(*args: Any) -> Tensor | None:
        y = replay(*args)
        kept.append(y is not None)
        return y

    monkeypatch.setattr(kernels._jvp_rows, "_replay", watched)
    jvp_rows(net, primals, tangents)
    assert kept == [True, True, True, True, False]  # the frozen one is not on the tape


def test_nothing_stays_behind() -> None:
    net, primals, tangents = given()
    with pytest.raises(ZeroDivisionError):
        jvp_rows(lambda *_: 1 // 0, primals, tangents)
    x, weight = primals[0][:1], net.weights[0]
    assert torch.equal(linear(x, weight), x @ weight.T)
    jvp_rows(net, primals, tangents)
    assert torch.equal(linear(x, weight), x @ weight.T)
    assert kernels._jvp_rows._tape is None


def test_another_thread_multiplies_for_itself() -> None:
    net, primals, tangents = given()
    x, weight = torch.randn(5, 6, dtype=torch.float64), net.weights[0]

    def f(*given: Tensor) -> Tensor:
        found: list[Tensor] = []
        other = threading.Thread(target=lambda: found.append(linear(x, weight)))
        other.start()
        other.join()
        assert torch.equal(found[0], x @ weight.T)
        return net(*given)

    value, dot = jvp_rows(f, primals, tangents)
    truth, true_dot = jvp_rows(net, primals, tangents)
    assert torch.equal(value, truth)
    assert torch.equal(dot, true_dot)


def test_a_function_that_does_not_treat_rows_alike_is_refused() -> None:
    net, primals, tangents = given()
    first, second = net.filters, net.weights[0]

    def other_weights(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        return conv1d(x, first) if len(x) == 5 else linear(x, second)

    def more_products(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        return conv1d(conv1d(x, first), first) if len(x) == 5 else conv1d(x, first)

    def batch_last(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        return linear(x.transpose(0, 1).contiguous(), second).transpose(0, 1)

    for f in (other_weights, more_products, batch_last):
        with pytest.raises(RuntimeError, match="alike and apart"):
            jvp_rows(f, primals, tangents)


@pytest.mark.parametrize("rows", [0, 5, 6])
def test_rows_that_are_not_some_are_refused(rows: int) -> None:
    net, primals, tangents = given(rows=rows)
    with pytest.raises(ValueError, match=r"0 < M < B"):
        jvp_rows(net, primals, tangents)


def test_shapes_that_do_not_fit_are_named() -> None:
    net, primals, tangents = given()
    more, flat = (*tangents, tangents[0]), tuple(torch.tensor(1.0) for _ in primals)
    with pytest.raises(ValueError, match="jvp_rows"):
        jvp_rows(net, flat, tangents)
    for wrong in ((None,) * 4, tangents[:3], more, (tangents[0][:, :3], *tangents[1:])):
        with pytest.raises(ValueError, match="jvp_rows"):
            jvp_rows(net, primals, wrong)
