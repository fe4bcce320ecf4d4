from __future__ import annotations

import torch

from mfmjt.train.optim import EMA


def test_closed_form():
    """a_K = prod(b) w_0 + sum over k of (1 - b_k) prod(later b) w_k."""
    torch.manual_seed(0)
    updates, decays = 40, (0.5, 0.9, 0.999)
    weight = torch.randn(7, 3)
    ema = EMA([weight], decays)
    history = [weight.double().clone()]
    for _ in range(updates):
        weight.add_(torch.randn_like(weight))
        history.append(weight.double().clone())
        ema.update()
    for decay, average in zip(decays, ema.averages, strict=True):
        factors = [min(decay, (1 + k) / (10 + k)) for k in range(updates)]
        expected = torch.zeros_like(history[0])
        for i, past in enumerate(history):
            share = 1.0 if i == 0 else 1 - factors[i - 1]
            for later in factors[i:]:
                share *= later
            expected += share * past
        scale = max(past.abs().max() for past in history)
        error = (average[0].double() - expected).abs().max()
        assert error <= updates * torch.finfo(torch.float32).eps * scale


def test_a_constant_weight_is_its_own_average():
    weight = torch.randn(5)
    ema = EMA([weight], (0.9,))
    for _ in range(3):
        ema.update()
    assert torch.equal(ema.averages[0][0], weight)


def test_swap_twice_is_nothing():
    weight = torch.randn(5, requires_grad=True)
    ema = EMA([weight], (0.9,))
    with torch.no_grad():
        weight += 1
    ema.update()
    before, average = weight.detach().clone(), ema.averages[0][0].clone()
    ema.swap()
    assert torch.equal(weight, average)
    ema.swap()
    assert torch.equal(weight, before)
    assert torch.equal(ema.averages[0][0], average)
