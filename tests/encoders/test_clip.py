from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from mfmjt.encoders.clip import CLIP, CLIPConfig
from mfmjt.errors import InputError
from tests.oracle import allowance, error
from tests.support.weights import draw_all

TINY = CLIPConfig(
    embed_dim=10,
    image_size=42,
    patch=14,
    image_dim=12,
    image_depth=2,
    image_heads=3,
    text_dim=8,
    text_depth=2,
    text_heads=2,
    context=7,
    vocabulary=50,
)
TERMS = 3 * 14 * 14  # a patch embedding's inputs, the longest sum


def published_shapes(c: CLIPConfig) -> dict[str, list[int]]:
    """Names and shapes of open_clip's state dict, written down without our modules."""
    shapes = {
        "positional_embedding": [c.context, c.text_dim],
        "text_projection": [c.text_dim, c.embed_dim],
        "logit_scale": [],
        "token_embedding.weight": [c.vocabulary, c.text_dim],
        "ln_final.weight": [c.text_dim],
        "ln_final.bias": [c.text_dim],
        "visual.class_embedding": [c.image_dim],
        "visual.positional_embedding": [(c.image_size // c.patch) ** 2 + 1, c.image_dim],
        "visual.proj": [c.image_dim, c.embed_dim],
        "visual.conv1.weight": [c.image_dim, 3, c.patch, c.patch],
    }
    for name in ("visual.ln_pre", "visual.ln_post"):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = [c.image_dim]
    for tower, depth, d in (
        ("", c.text_depth, c.text_dim),
        ("visual.", c.image_depth, c.image_dim),
    ):
        for i in range(depth):
            block = f"{tower}transformer.resblocks.{i}"
            for name in ("ln_1", "ln_2"):
                shapes[f"{block}.{name}.weight"] = shapes[f"{block}.{name}.bias"] = [d]
            shapes[f"{block}.attn.in_proj_weight"] = [3 * d, d]
            shapes[f"{block}.attn.in_proj_bias"] = [3 * d]
            for name, outer, inner in (
                ("attn.out_proj", d, d),
                ("mlp.c_fc", 4 * d, d),
                ("mlp.c_proj", d, 4 * d),
            ):
                shapes[f"{block}.{name}.weight"] = [outer, inner]
                shapes[f"{block}.{name}.bias"] = [outer]
    return shapes


class Plain:
    """Both towers in float64, one sample at a time, attention written out."""

    def __init__(self, state: dict[str, Tensor], config: CLIPConfig) -> None:
        self.s = {name: value.double() for name, value in state.items()}
        self.c = config

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.s[f"{name}.weight"].T + self.s[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * self.s[f"{name}.weight"] + self.s[f"{name}.bias"]

    def tower(self, name: str, x: Tensor, depth: int, heads: int, causal: bool) -> Tensor:
        count, dim = x.shape
        width = dim // heads
        seen = torch.ones(count, count, dtype=torch.bool)
        seen = seen.tril() if causal else seen
        for i in range(depth):
            b = f"{name}transformer.resblocks.{i}"
            y = self.norm(f"{b}.ln_1", x)
            qkv = y @ self.s[f"{b}.attn.in_proj_weight"].T + self.s[f"{b}.attn.in_proj_bias"]
            found = []
            for h in range(heads):
                q, k, v = (qkv[:, j * dim + h * width :][:, :width] for j in range(3))
                scores = (q @ k.T / width**0.5).masked_fill(~seen, -torch.inf)
                found.append(scores.softmax(-1) @ v)
            x = x + self.linear(f"{b}.attn.out_proj", torch.cat(found, dim=-1))
            y = self.linear(f"{b}.mlp.c_fc", self.norm(f"{b}.ln_2", x))
            x = x + self.linear(f"{b}.mlp.c_proj", y / (1 + torch.exp(-1.702 * y)))
        return x

    def image(self, frame: Tensor) -> Tensor:
        c, s = self.c, self.s
        g, p = c.image_size // c.patch, c.patch
        kernel = s["visual.conv1.weight"].flatten(1)
        patches = [
            kernel @ frame[:, p * row : p * row + p, p * column : p * column + p].double().flatten()
            for row in range(g)
            for column in range(g)
        ]
        x = torch.stack([s["visual.class_embedding"], *patches]) + s["visual.positional_embedding"]
        x = self.norm("visual.ln_pre", x)
        x = self.tower("visual.", x, c.image_depth, c.image_heads, causal=False)
        y = self.norm("visual.ln_post", x[0]) @ s["visual.proj"]
        return y / y.norm()

    def text(self, tokens: Tensor) -> Tensor:
        x = self.s["token_embedding.weight"][tokens] + self.s["positional_embedding"]
        x = self.tower("", x, self.c.text_depth, self.c.text_heads, causal=True)
        x = self.norm("ln_final", x)
        return x / x.norm(dim=-1, keepdim=True)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return draw_all(published_shapes(TINY), seed=4)


@pytest.mark.parametrize("size", [(42, 42), (44, 48)])
def test_image_embeddings_are_what_the_formulas_say(state, size):
    frames = torch.randn(3, 3, *size)
    with torch.inference_mode():
        result = CLIP.from_state_dict(state, TINY).encode_image(frames)
    truth = torch.stack([Plain(state, TINY).image(frame) for frame in frames])
    assert error(result, truth) <= allowance(truth, torch.float32, TERMS)


def test_text_states_are_what_the_formulas_say(state):
    tokens = torch.randint(0, TINY.vocabulary, (3, TINY.context))
    with torch.inference_mode():
        result = CLIP.from_state_dict(state, TINY).encode_text(tokens)
    truth = torch.stack([Plain(state, TINY).text(row) for row in tokens])
    assert error(result, truth) <= allowance(truth, torch.float32, TERMS)


def test_every_wrong_entry_is_named(state):
    wrong = dict(state)
    del wrong["visual.proj"]
    wrong["ln_final.bias"] = torch.zeros(3)
    wrong["visual.head.weight"] = torch.zeros(1)
    with pytest.raises(InputError) as caught:
        CLIP.from_state_dict(wrong, TINY)
    for part in (
        "missing visual.proj",
        "ln_final.bias has shape (3,), not (8,)",
        "unexpected visual.head.weight",
    ):
        assert part in str(caught.value)


def test_published_names_and_shapes_are_all_known():
    with torch.device("meta"):
        ours = {name: list(p.shape) for name, p in CLIP().state_dict().items()}
    published = published_shapes(CLIPConfig())
    assert ours == {
        k: v for k, v in published.items() if k not in ("text_projection", "logit_scale")
    }


def test_other_shapes_are_refused():
    clip = CLIP(TINY)
    for shape in ((1, 3, 41, 42), (1, 3, 56, 42), (3, 42, 42), (1, 1, 42, 42)):
        with pytest.raises(InputError, match=re.escape(str(shape))):
            clip.encode_image(torch.zeros(shape))
    with pytest.raises(InputError, match=re.escape("(2, 8)")):
        clip.encode_text(torch.zeros(2, 8, dtype=torch.long))
