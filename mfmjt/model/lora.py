"""Low-rank adapters (LoRA, arXiv 2106.09685): put into a network, merged, kept in a file.

A layer W x becomes W x + (α / rank)·B A x, with W frozen, A random and B zero, so that the network
starts as it was. `peft` puts the adapters in; they then run on our ops, whose tangents take two
products where PyTorch's take three, and leave no tape. Nothing else needs `peft`: merged, a network
is one like any other. A convolution of K steps has an A of K steps and a B of one.

The second embedding is trained whole: it is small, and it is zero in a network of flow matching.
So is the video of a network that was given it (`MFMJT.with_video`), which is all new.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mfmjt.errors import InputError, reason
from mfmjt.files import atomic_path
from mfmjt.model.blocks import Conv1d, Linear
from mfmjt.model.transformer import MFMJT

__all__ = ["LoRA", "add_lora", "merge_adapter", "merged_state", "save_adapter"]

FORMAT = "mfmjt-adapter-1"
_WHOLE = re.compile(r"r_embed\.")
_WHOLE_GATED = re.compile(
    r"r_embed\.|(clip|sync|empty_clip|empty_sync)_|joint_blocks\.\d+\.(clip_block|video_gate)"
)


def _whole(names: Iterable[str]) -> set[str]:
    """Return which of these parameters are trained beside the adapters, and kept with them."""
    names = list(names)
    kept = _WHOLE_GATED if any(name.endswith(".video_gate") for name in names) else _WHOLE
    return {name for name in names if kept.match(name)}


@dataclass(frozen=True)
class LoRA:
    """Adapters of a network.

    Attributes:
        rank: Rows of A, columns of B.
        alpha: α; what an adapter adds is scaled by α / rank.
        targets: Which layers get one: ends of their names.
    """

    rank: int = 16
    alpha: int = 16
    targets: tuple[str, ...] = ("qkv", "linear1", "w1", "w2", "w3", "adaLN_modulation.1")

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise InputError(
                f"lora has rank {self.rank}, alpha {self.alpha} and {len(self.targets)} targets: "
                "all must be positive. Give lora.rank=16, or leave lora out to train all weights."
            )


def add_lora(net: MFMJT, lora: LoRA) -> None:
    """Put adapters into a network, in place, and freeze all but them and what is trained whole.

    Raises:
        InputError: `peft` is not installed, or no layer has such a name.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError(
            f"lora needs the package peft, which cannot be imported: {reason(error)}. Install it "
            "with pip install 'mfmjt[lora]', or leave lora out to train all weights."
        ) from error
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    whole = _whole(trained)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        # The perceptrons of embeddings are not called as modules.
        exclude_modules=["t_embed.mlp.0", "t_embed.mlp.2", *{n.rpartition(".")[0] for n in whole}],
    )
    # It makes an adapter's layers of the wrapped layer's type or of PyTorch's own, and calls both
    # constructors alike. So it is shown PyTorch's, and ours differ from them in `forward` alone.
    _retype(net, {Linear: nn.Linear, Conv1d: nn.Conv1d})
    try:
        peft.inject_adapter_in_model(config, net)
    except ValueError as error:
        raise InputError(
            f"lora.targets={list(lora.targets)} cannot be adapted: {reason(error)}. "
            "Give ends of names of linear layers or convolutions."
        ) from error
    finally:
        _retype(net, {nn.Linear: Linear, nn.Conv1d: Conv1d})
    for name in whole:
        trained[name].requires_grad_(True)


def _retype(net: nn.Module, types: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    for module in net.modules():
        if type(module) in types:
            module.__class__ = types[type(module)]


def merged_state(state: Mapping[str, Tensor], lora: LoRA) -> dict[str, Tensor]:
    """Return the parameters of the plain network that does what one with adapters does.

    Args:
        state: State dict of a network with adapters.
        lora: What they are.
    """
    plain = {}
    for key, value in state.items():
        if ".lora_" in key:
            continue
        if key.endswith(".base_layer.weight"):
            layer = key.removesuffix(".base_layer.weight")
            a, b = (state[f"{layer}.lora_{part}.default.weight"] for part in "AB")
            value = _adapted(value, a, b, lora)
        plain[key.replace(".base_layer.", ".")] = value
    return plain


def save_adapter(state: Mapping[str, Tensor], lora: LoRA, path: str | os.PathLike[str]) -> None:
    """Write the adapters in a state dict, and what is trained whole, to a safetensors file.

    Raises:
        RunError: The file cannot be written.
    """
    whole = _whole(state)
    kept = {
        key.replace(".default.", "."): value.detach().contiguous()
        for key, value in state.items()
        if ".lora_" in key or key in whole
    }
    metadata = {"format": FORMAT, "lora": json.dumps(dataclasses.asdict(lora))}
    with atomic_path(path) as temporary:
        save_file(kept, temporary, metadata=metadata)


def merge_adapter(net: MFMJT, path: str | os.PathLike[str]) -> None:
    """Add what `save_adapter` wrote to the weights of the network that was adapted, in place.

    Raises:
        InputError: The file is missing, damaged, or of another network.
    """
    if not os.path.isfile(path):
        raise InputError(f"No file {path}: there is no adapter to merge. Check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError("it is of another format")
            fields = json.loads(about["lora"])
            lora = LoRA(**fields | {"targets": tuple(fields["targets"])})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # what is in the file decides
        raise InputError(
            f"{path} is no adapter: {reason(error)}. Give the adapter.safetensors of a training "
            "with lora."
        ) from error
    weights = net.state_dict()
    changed = {}
    for key, value in tensors.items():
        if ".lora_B." in key:
            continue
        name = key.replace(".lora_A.", ".")
        try:
            weight = weights[name]
            if name != key:
                b = tensors[key.replace(".lora_A.", ".lora_B.")]
                value = _adapted(weight, value, b, lora)
            fits = value.shape == weight.shape
        except (KeyError, IndexError, RuntimeError):  # no such weight, or no product of its shape
            fits = False
        if not fits:
            raise InputError(
                f"{path} is for another network: {name} does not fit. Give the network that was "
                "trained with it."
            )
        changed[name] = value
    with torch.no_grad():
        for key, value in changed.items():
            weights[key].copy_(value)


def _adapted(weight: Tensor, a: Tensor, b: Tensor, lora: LoRA) -> Tensor:
    """W + (α / rank)·B A, whatever the axes of a convolution."""
    work = torch.promote_types(a.dtype, torch.float32)
    product = b.flatten(1).to(work) @ a.flatten(1).to(work)
    return weight + (lora.alpha / lora.rank) * product.view_as(weight)
