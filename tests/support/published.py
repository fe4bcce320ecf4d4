"""What MMAudio published, in its names and layouts and in small sizes."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from torch import Tensor

from mfmjt.codec import BigVGANConfig
from mfmjt.codec.vae import VAEConfig
from mfmjt.encoders import CLIPConfig, SynchformerConfig
from mfmjt.model import MFMJT, config_for
from tests.support.weights import draw_all

VAES = {"16k": VAEConfig(80, 20, 8), "44k": VAEConfig(128, 40, 8)}
VOCODERS = {
    "16k": BigVGANConfig(80, 8, (16, 16), (32, 32), tanh=True, bias=True),
    "44k": BigVGANConfig(128, 8, (32, 16), (64, 32), tanh=False, bias=False),
}
CLIP_CONFIG = CLIPConfig(
    embed_dim=24, image_size=42, patch=14, image_dim=12, image_depth=1, image_heads=3,
    text_dim=16, text_depth=1, text_heads=2,
)  # fmt: skip
SYNC_CONFIG = SynchformerConfig(dim=12, depth=1, heads=3, size=32)
SIZES = {"clip": CLIP_CONFIG, "synchformer": SYNC_CONFIG, "vae": VAES["16k"],
         "vocoder": VOCODERS["16k"]}  # fmt: skip
NETWORK = {
    "hidden_dim": 64, "num_heads": 1, "depth": 2, "fused_depth": 1, "video_dim": 24, "sync_dim": 12,
    "text_dim": 16,
}  # fmt: skip


def network_state(name: str, **changes: object) -> dict[str, Tensor]:
    """Random weights in the published layout."""
    with torch.device("meta"):
        net = MFMJT(config_for(name, **{**NETWORK, **changes}))
    shapes = {k: v.shape for k, v in net.state_dict().items() if not k.startswith("r_embed.")}
    state = draw_all(shapes)
    return state | {k: 0.3 * v for k, v in state.items() if k.startswith("final_layer.conv")}


def vae_shapes(c: VAEConfig) -> dict[str, list[int]]:
    """Names and shapes of a published VAE, written down without our modules."""
    w, widest = c.width, 4 * c.width
    shapes: dict[str, list[int]] = {"data_mean": [1, c.bands, 1], "data_std": [1, c.bands, 1]}

    def block(name: str, inner: int, outer: int) -> None:
        shapes[f"{name}.conv1.weight"] = [outer, inner, 3]
        shapes[f"{name}.conv2.weight"] = [outer, outer, 3]
        if inner != outer:
            shapes[f"{name}.nin_shortcut.weight"] = [outer, inner, 1]

    for side in ("encoder", "decoder"):
        shapes[f"{side}.learnable_gain"] = []
        block(f"{side}.mid.block_1", widest, widest)
        block(f"{side}.mid.block_2", widest, widest)
        shapes[f"{side}.mid.attn_1.qkv.weight"] = [3 * widest, widest, 1]
        shapes[f"{side}.mid.attn_1.proj_out.weight"] = [widest, widest, 1]
    widths = [w, 2 * w, 4 * w]
    for level, outer in enumerate(widths):
        inner = widths[max(level - 1, 0)]
        for i in range(2):
            block(f"encoder.down.{level}.block.{i}", outer if i else inner, outer)
        above = widths[min(level + 1, 2)]
        for i in range(3):
            block(f"decoder.up.{level}.block.{i}", outer if i else above, outer)
    for i in (1, 2):
        shapes[f"encoder.down.0.downsample.conv{i}.weight"] = [w, w, 1]
    shapes["decoder.up.1.upsample.conv.weight"] = [2 * w, 2 * w, 3]
    shapes["encoder.conv_in.weight"] = [w, c.bands, 3]
    shapes["encoder.conv_out.weight"] = [2 * c.latent_dim, widest, 3]
    shapes["decoder.conv_in.weight"] = [widest, c.latent_dim, 3]
    shapes["decoder.conv_out.weight"] = [c.bands, w, 3]
    return shapes


def vocoder_shapes(c: BigVGANConfig) -> dict[str, list[int]]:
    """Names and shapes of a published vocoder, written down without our modules."""
    shapes: dict[str, list[int]] = {}

    def conv(name: str, first: int, second: int, kernel: int, bias: int) -> None:
        shapes[f"{name}.weight_g"] = [first, 1, 1]
        shapes[f"{name}.weight_v"] = [first, second, kernel]
        if bias:
            shapes[f"{name}.bias"] = [bias]

    def activation(name: str, channels: int) -> None:
        shapes[f"{name}.act.alpha"] = shapes[f"{name}.act.beta"] = [channels]
        shapes[f"{name}.upsample.filter"] = shapes[f"{name}.downsample.lowpass.filter"] = [1, 1, 12]

    conv("conv_pre", c.width, c.bands, 7, c.width)
    width = c.width
    for i, kernel in enumerate(c.kernels):
        conv(f"ups.{i}.0", width, width // 2, kernel, width // 2)
        width //= 2
        for j, length in enumerate((3, 7, 11)):
            for k in range(3):
                conv(f"resblocks.{3 * i + j}.convs1.{k}", width, width, length, width)
                conv(f"resblocks.{3 * i + j}.convs2.{k}", width, width, length, width)
            for k in range(6):
                activation(f"resblocks.{3 * i + j}.activations.{k}", width)
    activation("activation_post", width)
    conv("conv_post", 1, width, 7, int(c.bias))
    return shapes


def write_merges(path: Path) -> Path:
    """Write a list of the published length whose further merges no text can need."""
    merges = ["d o", "do g</w>", "b a", "r k", "ba rk", "bark s</w>", "\u00c3 \u00a9</w>"]
    never = [f"\u2168{i} \u2168" for i in range(48894 - len(merges))]
    path.write_bytes(gzip.compress("\n".join(["version", *merges, *never, "rest"]).encode()))
    return path
