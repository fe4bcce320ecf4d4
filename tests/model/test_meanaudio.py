"""MeanAudio's family and FoleyDash, against outputs of their own code on weights by rule."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from mfmjt.meanflow import guide, sample
from mfmjt.model import (
    MFMJT,
    load_foleydash,
    load_meanaudio,
    to_meanaudio_state_dict,
)
from tests.oracle import allowance, error
from tests.support.weights import read

FAMILY = ["meanaudio_tiny", "fluxaudio_tiny", "resonate_tiny"]
TINY = {"latent_length": 25, "video_length": 8, "sync_length": 24}


def agrees(result: Tensor, truth: Tensor, net: MFMJT) -> None:
    # The longest sum that feeds an output runs through every block's widest matmul.
    terms = net.config.depth * 3 * net.config.mlp_hidden
    assert error(result, truth) <= allowance(truth, torch.float32, terms)


class Published:
    """A network, and what its publisher's code was given and gave."""

    def __init__(self, name: str) -> None:
        self.state, self.given = read("model", name)
        if name.startswith("foleydash"):
            self.net = load_foleydash(self.state, **TINY)
            names, self.scale = ("clip", "sync", "text"), 4.0
        else:
            self.net = load_meanaudio(self.state)
            names, self.scale = ("text", "pooled"), 4.5
        self.z, self.t = self.given["in.latent"], self.given["in.t"]
        self.r = self.given.get("in.s", self.given.get("in.r", self.t))
        self.cond = {"video" if n == "clip" else n: self.given[f"in.{n}"] for n in names}

    def out(self, name: str) -> Tensor:
        velocity = "v" if "out.v" in self.given else "u"
        return self.given[f"out.{velocity}{name}"]


@pytest.fixture(scope="module", params=[*FAMILY, "foleydash_tiny"])
def published(request):
    return Published(request.param)


@torch.no_grad()
def test_velocities_are_the_published_ones(published):
    net, z = published.net, published.z
    for i, (r, t) in enumerate(zip(published.r, published.t, strict=True)):
        u, empty = net(z, r, t, **published.cond), net(z, r, t)
        agrees(u, published.out("")[i], net)
        agrees(empty, published.out("_empty")[i], net)
        guided = guide(u, empty, published.scale, "cfg")
        agrees(guided, published.out(f"_cfg{published.scale:g}")[i], net)


@torch.no_grad()
def test_each_sample_has_its_own_interval(published):
    net, z = published.net, published.z
    r, t = published.r[: len(z)], published.t[: len(z)]
    mixed = net(z, r, t, **published.cond)
    if "out.u_mixed" in published.given:
        agrees(mixed, published.out("_mixed"), net)
    for i in range(len(z)):
        one = {name: value[i : i + 1] for name, value in published.cond.items()}
        agrees(net(z[i : i + 1], r[i], t[i], **one), mixed[i : i + 1], net)


@torch.no_grad()
def test_embeddings_are_the_published_ones(published):
    net, given = published.net, published.given
    times = given.get("in.times", published.t)
    begin = 1 - times if net.config.towards_data else times
    agrees(net.t_embed(begin), given["out.t_embed"], net)
    for name in ("out.r_embed", "out.s_embed"):
        if name in given:
            agrees(net.r_embed(times), given[name], net)


@torch.no_grad()
def test_samples_are_the_published_ones(published):
    net = published.net
    for name, truth in published.given.items():
        if found := re.fullmatch(r"out\.sample(\d)(_cfg4\.5)?", name):
            scale, mode = (4.5, "cfg") if found[2] else (1.0, "none")
            null = dict.fromkeys(published.cond)
            made = sample(net, published.z, int(found[1]), published.cond, null, scale, mode)
            agrees(made, truth, net)


@pytest.mark.parametrize("name", FAMILY)
def test_import_and_export_are_inverse(name):
    state, _ = read("model", name)
    exported = to_meanaudio_state_dict(load_meanaudio(state))
    assert exported.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(exported[key], value), key
