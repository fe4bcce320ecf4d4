from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.encoders.synchformer import Synchformer, SynchformerConfig
from mfmjt.errors import InputError
from tests.oracle import allowance, error
from tests.support.weights import draw_all, normal, read

TINY = SynchformerConfig(dim=12, depth=2, heads=3, frames=8, size=48, patch=16)
TERMS = 3 * 2 * 16 * 16  # a patch embedding's inputs, the longest sum
PREFIX = "vfeat_extractor."


def published_shapes(c: SynchformerConfig) -> dict[str, list[int]]:
    """Names and shapes of the published file, written down without our modules."""
    d = c.dim
    shapes = {
        "cls_token": [1, 1, d],
        "pos_embed": [1, 1 + (c.size // c.patch) ** 2, d],
        "temp_embed": [1, c.frames // 2, d],
        "patch_embed.proj.weight": [d, 3, c.patch, c.patch],
        "patch_embed.proj.bias": [d],
        "patch_embed_3d.proj.weight": [d, 3, 2, c.patch, c.patch],
        "patch_embed_3d.proj.bias": [d],
        "spatial_attn_agg.cls_token": [1, 1, d],
        "spatial_attn_agg.self_attn.in_proj_weight": [3 * d, d],
        "spatial_attn_agg.self_attn.in_proj_bias": [3 * d],
    }

    def linear(name: str, outer: int, inner: int) -> None:
        shapes[f"{name}.weight"] = [outer, inner]
        shapes[f"{name}.bias"] = [outer]

    norms = ["norm", "spatial_attn_agg.norm1", "spatial_attn_agg.norm2"]
    for i in range(c.depth):
        for attention in ("attn", "timeattn"):
            linear(f"blocks.{i}.{attention}.qkv", 3 * d, d)
            linear(f"blocks.{i}.{attention}.proj", d, d)
        linear(f"blocks.{i}.mlp.fc1", 4 * d, d)
        linear(f"blocks.{i}.mlp.fc2", d, 4 * d)
        norms += [f"blocks.{i}.norm{j}" for j in (1, 2, 3)]
    linear("spatial_attn_agg.self_attn.out_proj", d, d)
    linear("spatial_attn_agg.linear1", 4 * d, d)
    linear("spatial_attn_agg.linear2", d, 4 * d)
    for name in norms:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = [d]
    return {f"{PREFIX}{name}": shape for name, shape in shapes.items()}


def plain(state: dict[str, Tensor], c: SynchformerConfig, frames: Tensor) -> Tensor:
    """One segment in float64; divided attention as full attention under a mask."""
    s = {name.removeprefix(PREFIX): value.double() for name, value in state.items()}
    steps, positions = c.frames // 2, (c.size // c.patch) ** 2

    def norm(name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * s[f"{name}.weight"] + s[f"{name}.bias"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def attend(qkv: Tensor, mask: Tensor) -> Tensor:
        width = c.dim // c.heads
        heads = []
        for h in range(c.heads):
            q, k, v = (qkv[:, i * c.dim + h * width :][:, :width] for i in range(3))
            scores = (q @ k.T / width**0.5).masked_fill(~mask, -torch.inf)
            heads.append(scores.softmax(-1) @ v)
        return torch.cat(heads, dim=-1)

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    tokens = torch.arange(steps * positions)
    time, place = tokens // positions, tokens % positions
    masks = []
    for group in (place, time):
        mask = torch.ones(1 + len(tokens), 1 + len(tokens), dtype=torch.bool)
        mask[1:, 1:] = group[:, None] == group
        masks.append(mask)

    x = F.conv3d(
        frames.double().transpose(0, 1)[None],
        s["patch_embed_3d.proj.weight"],
        s["patch_embed_3d.proj.bias"],
        stride=(2, c.patch, c.patch),
    )
    x = x[0].flatten(1).T  # time by time, row by row
    x = x + s["pos_embed"][0, 1 + place] + s["temp_embed"][0, time]
    x = torch.cat([s["cls_token"][0] + s["pos_embed"][0, :1], x])
    for i in range(c.depth):
        b = f"blocks.{i}"
        for attention, own_norm, mask in zip(
            ("timeattn", "attn"), ("norm3", "norm1"), masks, strict=True
        ):
            y = attend(linear(f"{b}.{attention}.qkv", norm(f"{b}.{own_norm}", x)), mask)
            x = x + linear(f"{b}.{attention}.proj", y)
        x = x + linear(f"{b}.mlp.fc2", gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", x))))
    x = norm("norm", x)[1:].unflatten(0, (steps, positions))
    a = "spatial_attn_agg"
    found = []
    for step in x:
        y = torch.cat([s[f"{a}.cls_token"][0], step])
        qkv = norm(f"{a}.norm1", y) @ s[f"{a}.self_attn.in_proj_weight"].T
        qkv = qkv + s[f"{a}.self_attn.in_proj_bias"]
        everything = torch.ones(len(y), len(y), dtype=torch.bool)
        y = y + linear(f"{a}.self_attn.out_proj", attend(qkv, everything))
        y = y + linear(f"{a}.linear2", gelu(linear(f"{a}.linear1", norm(f"{a}.norm2", y))))
        found.append(y[0])
    return torch.stack(found)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return draw_all(published_shapes(TINY), seed=5)


def test_sees_as_the_formulas_say(state):
    frames = torch.rand(2, 3, TINY.frames, 3, TINY.size, TINY.size) * 2 - 1
    with torch.inference_mode():
        features = Synchformer.from_state_dict(state, TINY)(frames)
    assert features.shape == (2, 3, TINY.frames // 2, TINY.dim)
    for sample, result in zip(frames, features, strict=True):
        for segment, found in zip(sample, result, strict=True):
            truth = plain(state, TINY, segment)
            assert error(found, truth) <= allowance(truth, torch.float32, TERMS)


def test_what_is_published_beside_the_encoder_is_left_aside(state):
    beside = state | {"afeat_extractor.weight": torch.zeros(3), "transformer.bias": torch.zeros(2)}
    frames = torch.randn(1, 1, TINY.frames, 3, TINY.size, TINY.size).clamp(-1, 1)
    without = {name: value for name, value in state.items() if "patch_embed.proj" not in name}
    results = [Synchformer.from_state_dict(s, TINY)(frames) for s in (state, beside, without)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_every_wrong_entry_is_named(state):
    wrong = dict(state)
    del wrong[f"{PREFIX}norm.weight"]
    wrong[f"{PREFIX}temp_embed"] = torch.zeros(1, 5, 12)
    wrong[f"{PREFIX}blocks.2.norm1.weight"] = torch.zeros(12)
    with pytest.raises(InputError) as caught:
        Synchformer.from_state_dict(wrong, TINY)
    for part in (
        "missing norm.weight",
        "temp_embed has shape (1, 5, 12), not (1, 4, 12)",
        "unexpected blocks.2.norm1.weight",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "shape", [(1, 8, 3, 48, 48), (1, 1, 16, 3, 48, 48), (1, 1, 8, 3, 64, 48), (0, 1, 8, 3, 48, 48)]
)
def test_other_shapes_are_refused(shape):
    with pytest.raises(InputError, match=re.escape(str(shape))):
        Synchformer(TINY)(torch.zeros(shape))


def test_published_names_and_shapes_are_all_known():
    with torch.device("meta"):
        ours = {PREFIX + name: list(p.shape) for name, p in Synchformer().state_dict().items()}
    published = published_shapes(SynchformerConfig())
    assert ours == {k: shape for k, shape in published.items() if ".patch_embed." not in k}


@pytest.mark.slow
def test_agrees_with_the_published_implementation():
    state, given = read("encoders", "synchformer")
    frames = normal("input.frames", (1, 1, 16, 3, 224, 224), 0).clamp(-1, 1).half().float()
    with torch.inference_mode():
        features = Synchformer.from_state_dict(state)(frames)
    truth = given["out.features"]
    assert error(features, truth) <= allowance(truth, torch.float32, TERMS)
