"""The state dict of one module, wherever in a file it is and under whatever prefix."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfmjt.checkpoints.published import PublishedFile
from mfmjt.errors import InputError, short, some
from mfmjt.memory import release

__all__ = ["Weights", "about", "load_published", "weights_in"]

_DEPTH = 4  # of dictionaries in each other
_SMALL = 2**14  # numbers, of which a copy costs nothing
_HALF = (torch.float16, torch.bfloat16)
_PART = re.compile(r"-\d{5}-of-\d{5}\.")
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What compiling, sharding and recomputing put into names, between any two modules."""
_AVERAGED = re.compile(r"(?<![a-z])(ema|avg|averaged?|swa|shadow)(?![a-z])", re.IGNORECASE)
_KINDS = {
    "vfeat_extractor.": "Synchformer",
    "conv_block1.": "a network of the PANNs",
    "time_new_pos_embed": "PaSST",
    "modality_trunks.": "ImageBind",
    "audio_branch.": "a CLAP",
    "text_model.": "CLIP in the layout of Hugging Face's transformers",
    "vision_model.": "CLIP in the layout of Hugging Face's transformers",
    "visual.trunk.": "a CLIP of open_clip with another vision tower",
    "visual.conv1.weight": "a CLIP of open_clip",
    "sync_input_proj.": "a network of MMAudio's",
    "audio_input_proj.": "a network of MeanAudio's",
    "decoder.learnable_gain": "the mel autoencoder of MMAudio",
    "resblocks.0.convs1.": "a BigVGAN vocoder",
    "lora_A": "an adapter (LoRA)",
    "discriminator": "the discriminators of a vocoder's training",
    "model.diffusion_model.": "a diffusion model of pictures",
}
"""What a state dict is of, by a part of the names in it; the first that fits."""


class Weights(NamedTuple):
    """A state dict that was found in a file.

    Attributes:
        tensors: By their names in the module.
        notes: One line on which of several was taken, where there are several.
    """

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def weights_in(content: Mapping[Any, Any], mark: str, what: str) -> Weights:
    """Find the state dict that has `mark`, in dictionaries in each other and behind any prefix.

    So DDP's `module.`, the `_orig_mod.` of a compiled network, Lightning's `state_dict` and a
    training's `{"model": ..., "optimizer": ...}` are all read. Of several, the averaged (EMA)
    weights are taken, as they are meant for use, with the raw ones of what has no average; the note
    says so.

    Args:
        content: What a file holds.
        mark: Name of a parameter that this module has and no other part of a checkpoint.
        what: Whose state this should be, for the message.

    Raises:
        InputError: No such weights, or several of which none is averaged.
    """
    found = dict(_sets(content, mark))
    averaged = [place for place in found if _AVERAGED.search(place) and "online" not in place]
    if not found:
        names = [str(k) for _, d in _dicts(content) for k, v in d.items() if isinstance(v, Tensor)]
        kind = f"; it looks like {kind}" if (kind := _looks_like(names)) else ""
        raise InputError(
            f"This is no state dict of {what}: missing {mark}{kind}. It holds "
            f"{some(names, most=3) or 'no tensors'}. Give the file as its publisher keeps it."
        )
    if len(found) == 1:
        return Weights(next(iter(found.values())))
    places = some(place.rstrip(".") or "no prefix" for place in found)
    if not averaged:
        raise InputError(
            f"This holds {len(found)} sets of weights of {what}, under {places}. Save the one "
            "that is wanted alone."
        )
    taken = found[averaged[0]]
    told = f"{short(averaged[0].rstrip('.'), 100)} was taken"
    raw = [state for place, state in found.items() if place not in averaged]
    if len(raw) == 1 and taken.keys() < raw[0].keys():  # what is not trained has no average
        told += f", with {len(raw[0]) - len(taken):,} tensors of the others that it lacks"
        taken = raw[0] | taken
    note = f"There are {len(found)} sets of weights of {what}, under {places}: {told}."
    return Weights(taken, (note,))


def _looks_like(names: Iterable[str]) -> str:
    """Return what a state dict with these names is of; empty where it is not known."""
    listed = list(names)
    for part, kind in _KINDS.items():
        if any(part in name for name in listed):
            return kind
    return ""


@contextlib.contextmanager
def about(path: str | os.PathLike[str], wanted: PublishedFile) -> Iterator[None]:
    """Begin what is said about a file's content with its name; end with which file is wanted."""
    try:
        yield
    except InputError as error:
        begin = "" if str(path) in str(error) else f"{short(path, 200)}: "
        end = f"Wanted is what {wanted.name} of {wanted.publisher} holds."
        if _PART.search(str(path)):
            end = "It is one part of several: give the .index.json beside it."
        raise InputError(f"{begin}{error} {end}") from error


def load_published(
    module: nn.Module,
    state: Mapping[str, Tensor],
    what: str,
    unused: Callable[[str], bool] = lambda name: False,
    also: Iterable[tuple[str, tuple[int, ...]]] = (),
    as_stored: bool = False,
) -> dict[str, Tensor]:
    """Check `state` against `module` name by name, then move it in, as float32 on the CPU.

    Args:
        module: Built on the meta device; its parameters become those of `state`.
        state: Names as in `module.state_dict()`.
        what: Whose state this should be, for the message.
        unused: Says of a name whether the publisher's file carries it and nothing needs it.
        also: Names and shapes that the file must hold beside those of the module.
        as_stored: Leave float16 and bfloat16 as they are, for who converts them.

    Returns:
        The entries of `also`.

    Raises:
        InputError: Entries are missing, not expected, of another shape or no numbers; the first
            five are named, and the others counted.
    """
    beside = dict(also)
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()} | beside
    unlike = [
        f"{name} has {wrong}"
        for name, shape in expected.items()
        if name in state and (wrong := _wrong_with(state[name], shape))
    ]
    missing = [f"missing {name}" for name in expected if name not in state]
    unexpected = [
        f"unexpected {short(name, 80)}"
        for name in state
        if name not in expected and not unused(name)
    ]
    # Some of each kind among the first that are told.
    if problems := [p for row in zip_longest(unlike, missing, unexpected) for p in row if p]:
        raise InputError(
            f"This is no state dict of {what}: {some(problems, '; ')}. "
            "Give the file as its publisher keeps it."
        )
    kept = _HALF if as_stored else ()
    values = {name: _float32(state[name].detach(), kept) for name in expected}
    # A part that computes its large weights from those of a mapped file then lets the file go.
    values = {n: x.clone() if x.numel() < _SMALL else x for n, x in values.items()}
    extra = {name: values.pop(name) for name in beside}
    module.load_state_dict(values, assign=True)
    return extra


def _float32(value: Tensor, kept: tuple[torch.dtype, ...]) -> Tensor:
    """Return a tensor in float32, unless its dtype is one of those that are kept."""
    if value.dtype in (torch.float32, *kept):
        return value
    converted = value.float()
    release(value)
    return converted


def _repeats(value: Tensor) -> bool:
    """Return whether a tensor's shape has more values than are stored: a copy can be huge."""
    if value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() > value.untyped_storage().nbytes()


def _wrong_with(value: Tensor, shape: tuple[int, ...]) -> str:
    if tuple(value.shape) != shape:
        return f"shape {tuple(value.shape)}, not {shape}"
    if not value.is_floating_point():
        return f"values of {value.dtype}, not floating point"
    if value.layout != torch.strided or value.device.type != "cpu":
        return f"no plain values ({value.layout} on {value.device})"
    return ""


def _sets(content: Mapping[Any, Any], mark: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield where each state dict with `mark` is, and the dict itself."""
    for place, inner in _dicts(content):
        tensors = {
            _WRAPPERS.sub("", key): value
            for key, value in inner.items()
            if isinstance(key, str) and isinstance(value, Tensor)
        }
        ends = [name for name in tensors if f".{name}".endswith(f".{mark}")]
        prefixes = dict.fromkeys(name.removesuffix(mark) for name in ends)
        for prefix in prefixes:
            inner_ones = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
            state = {
                key[len(prefix) :]: value
                for key, value in tensors.items()
                if key.startswith(prefix) and not key.startswith(inner_ones)
            }
            for key, value in state.items():
                if _repeats(value):
                    raise InputError(
                        f"{short(key, 80)} is one value repeated to shape {tuple(value.shape)}."
                        " Give the file as its publisher keeps it."
                    )
            yield place + prefix, state


def _dicts(content: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """`content` and the dictionaries in it, each once, after the keys that lead to it."""
    level: list[tuple[str, Mapping[Any, Any]]] = [("", content)]
    seen: set[int] = set()
    for _ in range(_DEPTH):
        deeper: list[tuple[str, Mapping[Any, Any]]] = []
        for place, inner in level:
            if id(inner) not in seen:
                seen.add(id(inner))
                yield place, inner
                deeper += [
                    (f"{place}{short(key, 80)}.", value)
                    for key, value in inner.items()
                    if isinstance(value, Mapping)
                ]
        level = deeper
