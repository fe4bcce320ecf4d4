"""A gradient through the tangent: what it costs, and whether LSD learns by it."""

from __future__ import annotations

import torch

from bench.networks import lsd
from bench.networks.given import Workload


def test_a_step_keeps_less_than_pytorchs():
    work = Workload.make("nano", batch=1, depth=2, fused_depth=1, length=17)
    rows = {row["provider"]: row for row in lsd.steps(work, seconds=0)}
    assert rows.keys() == {"ours", "reference"}
    ours, reference = rows["ours"], rows["reference"]
    assert ours["n"] == reference["n"] > 0
    assert ours["saved_bytes"] < reference["saved_bytes"]
    assert ours["gradients_apart"] < torch.finfo(torch.float32).eps ** 0.5


def test_both_objectives_come_nearer_to_two_moons():
    generator = torch.Generator().manual_seed(0)
    real, noise = lsd.moons(1000, generator), torch.randn(1000, 2, generator=generator)
    untrained = lsd.distance(noise, real)
    for provider in ("ours", "reference"):
        net = lsd.trained(provider, 150)
        made = noise - net(noise, torch.zeros(1000), torch.ones(1000))
        assert lsd.distance(made.detach(), real) < untrained / 2, provider
