"""Published networks in their own layouts: MMAudio's, MeanAudio's and FoleyDash's, and back.

All name and shape parameters as our network does, but for the rows of the projection to q, k and v,
which are interleaved. What else differs is in `ModelConfig`, or in the weights, which are changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mfmjt.checkpoints import PublishedFile, about, read_content, weights_in
from mfmjt.checkpoints.weights import Weights
from mfmjt.errors import InputError
from mfmjt.memory import release
from mfmjt.model.checkpoint import build
from mfmjt.model.conditioning import r_embedding, time_frequencies
from mfmjt.model.config import CONFIGS, ModelConfig, config_for
from mfmjt.model.transformer import MFMJT

__all__ = [
    "MARK",
    "MEANAUDIO_FILES",
    "NETWORK_FILES",
    "family_of",
    "layout_of",
    "load_foleydash",
    "load_meanaudio",
    "load_mmaudio",
    "load_network",
    "to_meanaudio_state_dict",
    "to_mmaudio_state_dict",
]

_MMAUDIO = "https://huggingface.co/hkchengrex/MMAudio/tree/main/weights"
NETWORK_FILES = {
    name: PublishedFile(f"mmaudio_{name}.pth", _MMAUDIO, size, md5)
    for name, size, md5 in (
        ("small_16k", "601M", "af93cde404179f58e3919ac085b8033b"),
        ("small_44k", "601M", "babd74c884783d13701ea2820a5f5b6d"),
        ("medium_44k", "2.4G", "5a56b6665e45a1e65ada534defa903d0"),
        ("large_44k", "3.9G", "fed96c325a6785b85ce75ae1aafd2673"),
        ("large_44k_v2", "3.9G", "01ad4464f049b2d7efdaa4c1a59b8dfe"),
    )
}
"""MMAudio's networks by the name of their configuration."""
MEANAUDIO_FILES = {
    name.rpartition(".")[0]: PublishedFile(name, f"https://huggingface.co/{publisher}")
    for publisher, names in {
        "AndreasXi/MeanAudio": (
            "meanaudio_s_full.pth",
            "meanaudio_s_ac.pth",
            "meanaudio_l_full.pth",
            "fluxaudio_s_full.pth",
        ),
        "kph68/FdAudio": ("fdaudio.pth",),
        "xingyuchen-8/DriftAudio": (
            "driftaudio_from_meanaudio_s_full_step4400.pth",
            "driftaudio_from_fdaudio_step1800.pth",
        ),
        "AndreasXi/Resonate": ("Resonate_GRPO.pth", "Resonate_PT.pth"),
    }.items()
    for name in names
}
"""Networks of MeanAudio's family, by the stem of their file."""
_WANTED = {
    "MMAudio": NETWORK_FILES["small_16k"],
    "MeanAudio": MEANAUDIO_FILES["meanaudio_s_full"],
    "FoleyDash": PublishedFile("a checkpoint", "https://github.com/dct-cell/FoleyDash"),
}
"""A file of each family, for messages."""

MARK = "audio_input_proj.0.weight"
"""A parameter that networks have and no other part of a model or of a training."""
_FAMILIES = {
    # By a name that only this family has; the first that fits.
    "s_embed.mlp.0.weight": "FoleyDash",
    "clip_input_proj.0.weight": "MMAudio",
    "text_cond_proj.0.weight": "MeanAudio",
}
_DROPPED = re.compile(r"[trs]_embed\.freqs|(latent|clip|text)_rot|(.*[._])?_extra_state")
"""Tables that older checkpoints carry and any network computes, and states of averaging."""

Source = str | os.PathLike[str] | Mapping[str, Tensor]


def load_mmaudio(
    source: Source, config: str | None = None, *, as_stored: bool = False, **overrides: Any
) -> MFMJT:
    """Import a published MMAudio network; u(z, t, t) is then minus its velocity at time 1 − t.

    The configuration is inferred from names and shapes, unless it is named. The embedding of t − r
    starts at zero, so u does not depend on r until it is trained.

    Args:
        source: A `.pth` or `.safetensors` file, the index of several, or the state dict itself;
            both may keep it inside, behind a prefix, and beside other things, as checkpoints of
            trainings do. Averaged (EMA) weights are taken where there are such. Nothing is
            unpickled.
        config: Name of the configuration that every shape must agree with, such as "small_16k";
            None infers it.
        as_stored: Leave float16 and bfloat16 as they are, for who converts them.
        **overrides: Fields of `ModelConfig` that shapes do not tell, such as `latent_length`.

    Returns:
        The network, with float32 parameters on the CPU; its `notes` say which of several weights
        were taken.

    Raises:
        InputError: Unreadable file, no such configuration, or a parameter is missing, unexpected
            or of another shape.
    """
    return _load(source, "MMAudio", config, overrides, as_stored)


def load_meanaudio(
    source: Source, config: str | None = None, *, as_stored: bool = False, **overrides: Any
) -> MFMJT:
    """Import a published network of MeanAudio's family: MeanAudio, FluxAudio or Resonate.

    Those with an embedding of r give u as published. FluxAudio and Resonate give their velocity for
    every r, until the embedding of t − r that is added to them is trained.

    Args:
        source: As for `load_mmaudio`.
        config: Name of the configuration that every shape must agree with, such as "meanaudio_s";
            None infers it.
        as_stored: As for `load_mmaudio`.
        **overrides: Fields of `ModelConfig`. `video="gated"` makes a network of video of it, which
            gives what it gave without until it is trained; see `mfmjt.model.blocks.JointBlock`.

    Returns:
        As `load_mmaudio`.

    Raises:
        InputError: As `load_mmaudio`.
    """
    return _load(source, "MeanAudio", config, overrides, as_stored)


def load_foleydash(
    source: Source, config: str | None = None, *, as_stored: bool = False, **overrides: Any
) -> MFMJT:
    """Import a published FoleyDash network as one of MMAudio's with an embedding of t − r.

    FoleyDash counts time towards noise and embeds s − t, the negative span of the interval. Both
    are changes of weights, exact up to rounding: cos and sin of w t are linear in those of
    w (1 − t), cos is even, and sin is odd.

    Args:
        source: As for `load_mmaudio`.
        config: As for `load_mmaudio`.
        as_stored: As for `load_mmaudio`.
        **overrides: As for `load_mmaudio`.

    Returns:
        As `load_mmaudio`.

    Raises:
        InputError: As `load_mmaudio`.
    """
    return _load(source, "FoleyDash", config, overrides, as_stored)


def load_network(
    source: Source, config: str | None = None, *, as_stored: bool = False, **overrides: Any
) -> MFMJT:
    """Import a published network of any of these families, told apart by the names of parameters.

    Arguments, result and errors are those of `load_mmaudio`.
    """
    return _load(source, None, config, overrides, as_stored)


def to_mmaudio_state_dict(net: MFMJT) -> dict[str, Tensor]:
    """Return `net`'s parameters in MMAudio's layout: `load_mmaudio` reversed, bit for bit.

    The published network has no second time, so the embedding of t − r is left out: the result
    equals `net` only where that embedding is zero.

    Raises:
        InputError: The network is none of MMAudio's.
    """
    return _to_layout(net, "MMAudio")


def to_meanaudio_state_dict(net: MFMJT) -> dict[str, Tensor]:
    """Return `net`'s parameters in MeanAudio's layout: `load_meanaudio` reversed, bit for bit.

    FluxAudio and Resonate have no second time, so an embedding of t − r is left out: the result
    equals `net` only where that embedding is zero.

    Raises:
        InputError: The network is none of MeanAudio's family.
    """
    return _to_layout(net, "MeanAudio")


def layout_of(config: ModelConfig) -> str:
    """Return in whose layout a network can be published, "MMAudio" or "MeanAudio"; "" in none."""
    kind = (config.video, config.pooled_dim is not None, config.text_rope, config.towards_data)
    layouts = {
        ("joint", False, False, True): "MMAudio",
        ("none", True, True, False): "MeanAudio",
    }
    return layouts.get(kind, "")


def _to_layout(net: MFMJT, family: str) -> dict[str, Tensor]:
    config = net.config
    if layout_of(config) != family:
        other = layout_of(config)
        raise InputError(
            f"This {config.name} has no place in {family}'s layout"
            + (f": it is a network of {other}'s. Take that layout." if other else ". Keep it.")
        )
    state = {}
    for key, value in net.state_dict().items():
        if key.startswith("r_embed.") and config.second_time == "t - r":
            continue
        if ".attn.qkv." in key:
            parts = value.unflatten(0, (3, config.num_heads, config.head_dim))
            value = parts.movedim(0, 2).flatten(0, 2)
        state[key] = value.detach().clone()
    return state


def family_of(state: Mapping[str, Tensor]) -> str:
    """Return whose network a state dict is: "FoleyDash", "MMAudio" or "MeanAudio".

    Raises:
        InputError: None of theirs.
    """
    for name, family in _FAMILIES.items():
        if name in state:
            return family
    raise InputError(
        f"This is a network of no known family: it has {MARK}, and none of "
        f"{', '.join(_FAMILIES)}. Networks of {', '.join(_FAMILIES.values())} "
        "can be read."
    )


def _load(
    source: Source,
    family: str | None,
    config: str | None,
    overrides: Mapping[str, Any],
    as_stored: bool,
) -> MFMJT:
    if not isinstance(source, Mapping):
        content = read_content(source)
        with about(source, _WANTED["MMAudio"]):
            family = family or family_of(_weights(content, None).tensors)
        wanted = NETWORK_FILES.get(config or "", _WANTED[family])
        with about(source, wanted):
            return _load(content, family, config, overrides, as_stored)
    given, notes = _weights(source, family)
    found = family_of(given)
    if family not in (None, found):
        raise InputError(
            f"This is a network of {found}'s, not of {family}'s. Read it with load_{found.lower()}."
        )
    state = {key: value for key, value in given.items() if not _DROPPED.fullmatch(key)}
    has_r = any(key.startswith("r_embed.") for key in state)
    gated = found == "MeanAudio" and overrides.get("video") == "gated"
    if gated:
        overrides = {name: value for name, value in overrides.items() if name != "video"}
    sizes = _infer_config(state, found, has_r) if config is None else config_for(config)
    if overrides:
        sizes = dataclasses.replace(sizes, **overrides)
    if has_r and sizes.second_time != "r":
        raise InputError(
            f"This has r_embed, an embedding of r, and the {sizes.name} network has none. Leave "
            "out the configuration, or give the one of this file."
        )
    qkv = (3 * sizes.hidden_dim, sizes.hidden_dim)
    for key, value in state.items():
        if ".attn.qkv." in key and tuple(value.shape) in (qkv, qkv[:1]):
            # (heads, head_dim, 3, ...) to (3, heads, head_dim, ...)
            parts = value.unflatten(0, (sizes.num_heads, sizes.head_dim, 3))
            state[key] = parts.movedim(2, 0).flatten(0, 2)
            release(value)
    if found == "FoleyDash":
        state = _turned_around(state)
    elif sizes.second_time == "t - r" or "second_time" in overrides:
        state = _second_embedding(sizes.hidden_dim) | state
    null = state.get("empty_string_feat")
    if found == "MeanAudio" and null is not None and null.shape[1:] == (sizes.pooled_dim,):
        state.setdefault("empty_string_feat_c", null.mean(0))
    net = build(sizes, state, as_stored)
    net.notes = notes
    if not gated:
        return net
    with _same_draws():
        return net.with_video()


def _weights(content: Mapping[Any, Any], family: str | None) -> Weights:
    return weights_in(content, MARK, f"a network of {family}'s" if family else "a network")


@contextlib.contextmanager
def _same_draws() -> Iterator[None]:
    """Draw the same at each call, so that a file always gives the same network."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        yield


def _second_embedding(dim: int) -> dict[str, Tensor]:
    with _same_draws():
        fresh = r_embedding(dim).state_dict()
    return {f"r_embed.{key}": value for key, value in fresh.items()}


def _turned_around(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of FoleyDash as those of a network whose time runs towards the data."""
    turned = {}
    for key, value in state.items():
        if key in ("t_embed.mlp.0.weight", "s_embed.mlp.0.weight") and value.shape[1:] == (256,):
            cos, sin = value.double().chunk(2, dim=1)
            w = time_frequencies(256, 10_000.0, torch.float32, value.device).double()
            if key.startswith("t_embed."):  # of t, from those of 1 - t
                cos, sin = cos * w.cos() + sin * w.sin(), cos * w.sin() - sin * w.cos()
            else:  # of s - t, from those of t - s
                sin = -sin
            value = torch.cat((cos, sin), dim=1).float()
        elif key.startswith("final_layer.conv."):
            value = -value
        turned[key.replace("s_embed.", "r_embed.")] = value
    return turned


def _infer_config(state: Mapping[str, Tensor], family: str, has_r: bool) -> ModelConfig:
    def shape(key: str, axes: int) -> torch.Size:
        found = state[key].shape if key in state else ()
        if len(found) != axes or 0 in found:
            wrong = f"{key} has shape {tuple(found)}" if key in state else f"missing {key}"
            raise InputError(
                f"This is no state dict of a network of {family}'s: {wrong}. "
                "Give the file as its publisher keeps it."
            )
        return torch.Size(found)

    def count(stack: str) -> int:
        found = (re.match(rf"{stack}\.(\d+)\.", key) for key in state)
        return len({match[1] for match in found if match})

    hidden = shape(MARK, 3)[0]
    if hidden != shape("t_embed.mlp.2.weight", 2)[1]:
        raise InputError(
            f"This is no state dict of a network of {family}'s: its layers do not fit each other. "
            "Give the file as its publisher keeps it."
        )
    head_dim = shape("fused_blocks.0.attn.q_norm.weight", 1)[0]
    fused_depth = count("fused_blocks")
    latent_dim = shape("latent_mean", 3)[-1]
    wide = latent_dim == CONFIGS["small_44k"].latent_dim
    sizes: dict[str, Any] = {
        "latent_dim": latent_dim,
        "hidden_dim": hidden,
        "num_heads": max(1, hidden // head_dim),
        "depth": count("joint_blocks") + fused_depth,
        "fused_depth": fused_depth,
        "text_length": shape("empty_string_feat", 2)[0],
        "text_dim": shape("empty_string_feat", 2)[-1],
        "second_time": "r" if has_r and family == "MeanAudio" else "t - r",
    }
    if family == "MeanAudio":
        base = CONFIGS["resonate" if wide else "meanaudio_s"]
        sizes["pooled_dim"] = shape("text_cond_proj.0.weight", 2)[1]
    else:
        base = CONFIGS["small_44k" if wide else "small_16k"]
        sizes["video_dim"] = shape("empty_clip_feat", 2)[-1]
        sizes["sync_dim"] = shape("empty_sync_feat", 2)[-1]
        sizes["v2"] = family == "MMAudio" and "clip_input_proj.2.w1.weight" in state
    for config in CONFIGS.values():
        alike = config.takes_video == base.takes_video
        if alike and all(getattr(config, field) == value for field, value in sizes.items()):
            return config
    # Not a published size: lengths and rates of the autoencoder with as many channels.
    config = dataclasses.replace(base, name="custom", **sizes)
    width = shape("fused_blocks.0.ffn.w1.weight", 3)[0]
    if config.mlp_hidden != width:
        config = dataclasses.replace(config, mlp_ratio=1.5 * width / hidden)
    return config
