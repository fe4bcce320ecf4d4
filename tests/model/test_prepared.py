from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mfmjt import kernels
from mfmjt.errors import InputError
from mfmjt.meanflow import OneStep
from mfmjt.model import MFMJT
from tests.oracle import allowance, error
from tests.support.networks import DIMS, SMALL, TERMS, inputs, network


def steps(net, **options):
    """The step of the network as it is, and of the frozen one."""
    return OneStep(net, compile=False, **options), OneStep(net, **options)


def check(net, z, given, **options):
    plain, frozen = steps(net, **options)
    truth = plain(z, **given)
    found = frozen(z, **given)
    assert found.dtype == z.dtype
    assert error(found, truth) <= allowance(truth, z.dtype, TERMS)


@pytest.mark.parametrize(("guidance", "mode"), [(1.5, "cfg_scaled"), (4.0, "cfg"), (1.0, "cfg")])
@pytest.mark.parametrize("v2", [False, True])
def test_the_step_is_the_same(guidance, mode, v2):
    z, _, _, features = inputs(2)
    check(network(v2=v2), z, features, guidance=guidance, mode=mode)


@pytest.mark.parametrize("names", [["text"], ["video", "sync"], ["sync"], []])
def test_what_is_missing_is_null(names):
    z, _, _, features = inputs(3)
    check(network(), z, {name: features[name] for name in names})


@pytest.mark.parametrize("lengths", [(1, 1, 8, 1), (17, 5, 8, 2), (9, 3, 24, 9), (40, 2, 16, 3)])
def test_any_lengths_after_one_another(lengths):
    net = network()
    plain, frozen = steps(net)
    for given in (lengths, (10, 4, 8, 3), lengths):
        z, _, _, features = inputs(2, *given)
        truth = plain(z, **features)
        assert error(frozen(z, **features), truth) <= allowance(truth, z.dtype, TERMS)


def test_masks_leave_out_conditions_of_samples():
    z, _, _, features = inputs(3)
    masks = {
        "video_mask": torch.tensor([True, False, False]),
        "text_mask": torch.tensor([True, True, False]),
    }
    check(network(), z, features | masks)


def test_one_clip_serves_several_sounds():
    net = network()
    z, _, _, features = inputs(3)
    one = {name: value[:1] for name, value in features.items()}
    all_of_them = {name: value.expand(3, -1, -1) for name, value in one.items()}
    plain, frozen = steps(net)
    truth = plain(z, **all_of_them)
    assert error(frozen(z, **one), truth) <= allowance(truth, z.dtype, TERMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_errs_no_more_than_plain_pytorch(dtype):
    net = network(torch.float32).to(dtype)
    exact = copy.deepcopy(net).double()
    z, _, _, features = inputs(2, dtype=torch.float32)
    rounded = {name: value.to(dtype) for name, value in features.items()}
    truth = OneStep(exact, compile=False)(
        z.double(), **{name: value.double() for name, value in rounded.items()}
    )
    plain, frozen = steps(net)
    with kernels.reference():
        reference = error(plain(z, **rounded), truth)
    limit = 2 * reference + allowance(truth, dtype, TERMS)
    assert error(frozen(z, **rounded), truth) <= limit


def test_nothing_is_read_on_the_host():
    """On tensors without memory a read raises; in a CUDA graph it would end the capture."""
    with FakeTensorMode():
        z, _, _, features = inputs(2, dtype=torch.float32)
        net = MFMJT.from_config("nano", **SMALL, **DIMS)
        assert OneStep(net)(z, **features).shape == z.shape
        scale = torch.full((1,), 1.5, dtype=torch.double)  # as a graph has it
        for step in (net.frozen().step, OneStep(net, compile=False)._sample):
            assert step(z, **features, guidance=scale, mode="cfg_scaled").shape == z.shape


def test_other_weights_need_another_step():
    net = network()
    z, _, _, features = inputs(2)
    frozen = OneStep(net)
    before = frozen(z, **features)
    with torch.no_grad():
        net.fused_blocks[0].linear1.weight.mul_(2)
    assert torch.equal(frozen(z, **features), before)
    assert not torch.equal(OneStep(net)(z, **features), before)


def test_wrong_shapes_and_intervals_are_named():
    net = network()
    z, _, _, features = inputs(2)
    with pytest.raises(InputError, match="video has shape"):
        OneStep(net)(z, **features | {"video": features["text"]})
    with pytest.raises(InputError, match="0 <= r <= t <= 1"):
        net.frozen(1.0, 0.5)


@pytest.mark.parametrize("mode", ["cfg", "cfg_scaled"])
@pytest.mark.parametrize("compile", [True, False])
def test_the_scale_may_be_a_tensor(mode, compile):
    """As a graph has it, which reads the scale anew each time."""
    net = network()
    z, _, _, features = inputs(2)
    step = net.frozen().step if compile else OneStep(net, compile=False)._sample
    for w in (1.5, 4.3):
        truth = step(z, **features, guidance=w, mode=mode)
        found = step(z, **features, guidance=torch.tensor([w], dtype=torch.double), mode=mode)
        assert error(found, truth) <= allowance(truth, z.dtype, 4)


def test_what_a_graph_reads_can_be_kept():
    """Graphs know addresses: null conditions and tables must outlive their caches' entries."""
    frozen = network().frozen()
    z, _, _, features = inputs(2)
    frozen.step(z, **features)
    (null, tables), known = frozen.reads(), dict(frozen._nulls)
    assert any(null is one for one in known.values())
    assert any(table.shape[0] == z.shape[1] for table in tables)
    for length in range(20, 30):
        other, _, _, features = inputs(2, length)
        frozen.step(other, **features)
    assert not any(null is one for one in frozen._nulls.values())
    assert frozen.reads()[0] is not null


@pytest.mark.gpu
def test_a_graph_gives_what_the_function_gives():
    net = network(torch.float32).cuda()
    plain, frozen = steps(net)
    for length in (10, *range(17, 24), 10):  # more than there are null conditions kept
        z, _, _, features = inputs(2, length, dtype=torch.float32)
        given = {name: value.cuda() for name, value in features.items()}
        truth = plain(z.cuda(), **given)
        found = frozen(z.cuda(), **given)
        assert error(found.cpu(), truth.cpu()) <= allowance(truth.cpu(), z.dtype, TERMS)
