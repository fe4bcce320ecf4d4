from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from mfmjt.errors import InputError
from mfmjt.train.checkpoint import load_optimizer, load_state, optimizer_tensors, save_state


def test_round_trip_is_exact(tmp_path):
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.arange(3), "c": torch.tensor(2.5).half()}
    state = {"step": 3, "config": {"lr": 0.1, "out": "ä"}, "nested": [1, None, True]}
    save_state(tmp_path / "s.safetensors", tensors, state)
    loaded, again = load_state(tmp_path / "s.safetensors")
    assert again == state
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


@pytest.mark.parametrize("damage", ["foreign", "truncated", "missing"])
def test_what_is_no_state_is_refused(tmp_path, damage):
    path = tmp_path / "s.safetensors"
    if damage == "foreign":
        save_file({"a": torch.ones(1)}, path)
    elif damage == "truncated":
        save_state(path, {"a": torch.ones(100)}, {})
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="Cannot resume"):
        load_state(path)


def test_optimizer_goes_on_exactly():
    def run(steps, optimizer, params):
        for i in steps:
            torch.manual_seed(i)
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()

    def make():
        torch.manual_seed(0)
        params = [torch.randn(4, 3, requires_grad=True), torch.randn(5, requires_grad=True)]
        return torch.optim.AdamW(params, lr=0.1, fused=True), params

    names = ["a.weight", "b"]
    whole, expected = make()
    run(range(6), whole, expected)
    first, params = make()
    run(range(3), first, params)
    tensors = {k: v.clone() for k, v in optimizer_tensors(first, names).items()}
    assert "optimizer.exp_avg.a.weight" in tensors
    second = torch.optim.AdamW(params, lr=0.1, fused=True)
    load_optimizer(second, names, tensors)
    run(range(3, 6), second, params)
    assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))
