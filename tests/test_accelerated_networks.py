"""Networks from PyPI, unchanged: diffusers' DiT, timm's ViTs, transformers' text encoders."""

from __future__ import annotations

import pytest
import torch

from mfmjt.kernels import accelerate_jvp
from tests import oracle
from tests.kernels.accelerated import by_pytorch, by_us, kept_bytes, math_attention, products
from tests.oracle import randn
from tests.support.peers import load_torchvision

LAYERS = 2


def dit():
    load_torchvision()  # which diffusers and timm import
    pytest.importorskip("diffusers")
    from diffusers import DiTTransformer2DModel

    options = {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}
    options |= {"in_channels": 3, "out_channels": 3, "num_embeds_ada_norm": 4}
    net = DiTTransformer2DModel(num_layers=LAYERS, patch_size=2, **options).eval()
    labels = torch.tensor([1, 2])

    def call(net, z, t):
        return net(z, timestep=t, class_labels=labels, return_dict=False)[0]

    return net, call, {"z": randn(2, 3, 8, 8), "t": torch.rand(2).double()}


def vit():
    load_torchvision()
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    options = {"img_size": 8, "embed_dim": 16, "depth": LAYERS, "num_heads": 2, "num_classes": 5}
    net = VisionTransformer(patch_size=2, qk_norm=True, init_values=1.0, **options)
    return net, lambda net, z: net(z), {"z": randn(2, 3, 8, 8)}


def naflexvit():
    load_torchvision()
    pytest.importorskip("timm")
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    options = {"embed_dim": 16, "depth": LAYERS, "num_heads": 2, "pos_embed_grid_size": (4, 4)}
    net = NaFlexVit(NaFlexVitCfg(patch_size=2, **options), num_classes=5)
    return net, lambda net, z: net(z), {"z": randn(2, 3, 8, 8)}


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS}
SMALL |= {"num_attention_heads": 4, "vocab_size": 7}


def text_encoder(model, config, **options):
    """One of transformers' encoders, of embeddings, the last of one sample's tokens padding."""

    def make():
        load_torchvision()
        transformers = pytest.importorskip("transformers")
        net = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
        if hasattr(net, "pooler"):  # of a result that is not asked for
            net.pooler = None
        padding = torch.ones(2, 5, dtype=torch.int64)
        padding[1, 3:] = 0

        def call(net, z):
            return net(inputs_embeds=z, attention_mask=padding, return_dict=False)[0]

        return net, call, {"z": randn(2, 5, 16)}

    return make


def clip_text():
    """Causal and padded; its embeddings are of numbers, to which what moves is added."""
    load_torchvision()
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(**SMALL, eos_token_id=6, bos_token_id=0, pad_token_id=1)
    net = transformers.CLIPTextModel(config).eval()
    words, padding = torch.tensor([[0, 2, 3, 4, 6], [0, 2, 6, 1, 1]]), torch.ones(2, 5)
    padding[1, 3:] = 0
    table = next(m for m in net.modules() if getattr(m, "num_embeddings", 0) == 7)

    def call(net, z):
        hook = table.register_forward_hook(lambda module, given, found: found + z)
        try:
            return net(input_ids=words, attention_mask=padding, return_dict=False)[0]
        finally:
            hook.remove()

    return net, call, {"z": randn(2, 5, 16)}


NETWORKS = {
    "DiT": dit,
    "ViT": vit,
    "NaFlexViT": naflexvit,
    "BERT": text_encoder("BertModel", "BertConfig", **SMALL),
    "Llama": text_encoder(
        "LlamaModel", "LlamaConfig", **SMALL, num_key_value_heads=2, use_cache=False
    ),
    "T5": text_encoder(
        "T5EncoderModel",
        "T5Config",
        **{"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": LAYERS, "num_heads": 4},
        vocab_size=7,
    ),
    "CLIP text": clip_text,
}
everywhere = pytest.mark.parametrize("name", NETWORKS)
in_pictures = pytest.mark.parametrize("name", ["DiT", "ViT", "NaFlexViT"])

# Of each layer's calls: two norms (four with qk-norm), qkv in one product or three, out, two of the
# MLP. DiT adds a time embedding to every layer, and modulates the last norm.
TAKEN = {
    "DiT": {
        "conv2d": 1,
        "einsum": 1,
        "gelu": LAYERS,
        "layer_norm": 2 * LAYERS + 1,
        "linear": 9 * LAYERS + 4,
        "scaled_dot_product_attention": LAYERS,
        "silu": 2 * LAYERS + 2,
    },
    "ViT": {
        "conv2d": 1,
        "gelu": LAYERS,
        "layer_norm": 4 * LAYERS + 1,
        "linear": 4 * LAYERS + 1,
        "scaled_dot_product_attention": LAYERS,
    },
    "NaFlexViT": {
        "gelu": LAYERS + 1,
        "layer_norm": 2 * LAYERS + 2,
        "linear": 4 * LAYERS + 6,
        "scaled_dot_product_attention": LAYERS + 1,
    },
    "BERT": {
        "gelu": LAYERS,
        "layer_norm": 2 * LAYERS + 1,
        "linear": 6 * LAYERS,
        "scaled_dot_product_attention": LAYERS,
    },
    "Llama": {"linear": 7 * LAYERS, "scaled_dot_product_attention": LAYERS, "silu": LAYERS},
    "T5": {"linear": 6 * LAYERS, "scaled_dot_product_attention": LAYERS},
    "CLIP text": {
        "layer_norm": 2 * LAYERS + 1,
        "linear": 6 * LAYERS,
        "scaled_dot_product_attention": LAYERS,
    },
}


def network(name):
    """A network with weights that let everything through, its call, and its moving inputs."""
    torch.manual_seed(0)
    net, call, inputs = NETWORKS[name]()
    for parameter in net.parameters():  # what starts at zero would hide what comes before it
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return net, call, inputs


def as_function(name):
    """The network as a function of tensors by name, those that its output depends on."""
    net, call, moving = network(name)
    y = call(net, **{n: x.float() for n, x in moving.items()})
    named = dict(net.named_parameters())
    found = torch.autograd.grad(y.sum(), list(named.values()), allow_unused=True)
    used = {
        n: p.detach().double()
        for (n, p), g in zip(named.items(), found, strict=True)
        if g is not None
    }

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, *inputs):
            return call(self.net, *inputs)

    whole = Call()

    def function(**given):
        inputs = tuple(given.pop(n) for n in moving)
        parameters = {f"net.{n}": p for n, p in given.items()}
        return torch.func.functional_call(whole, parameters, inputs)

    return function, {**moving, **used}, tuple(moving)


@everywhere
def test_value_tangent_and_gradients(name):
    function, inputs, moving = as_function(name)
    op = by_us(function, TAKEN[name])
    oracle.check_op(op, by_pytorch(function), inputs, moving, torch.float32, terms=2500)


@pytest.mark.slow
@in_pictures
def test_compiled(name):
    function, inputs, moving = as_function(name)
    oracle.check_compiled(by_us(function), inputs, moving, terms=2500, backend="aot_eager")


@in_pictures
def test_costs(name):
    """Two products for each of a plain forward; of tapes, nothing that plain training has not."""
    net, call, moving = network(name)
    inputs = tuple(x.float() for x in moving.values())

    def plain():
        return (call(net, *inputs),), net

    def pytorchs():
        with math_attention():
            return torch.func.jvp(lambda *x: call(net, *x), inputs, inputs), net

    def ours():
        with accelerate_jvp():
            return torch.func.jvp(lambda *x: call(net, *x), inputs, inputs), net

    forward = products(plain)
    assert forward < products(ours) <= 2 * forward < products(pytorchs)
    assert kept_bytes(ours) <= kept_bytes(plain)
    assert kept_bytes(pytorchs) > kept_bytes(plain)
