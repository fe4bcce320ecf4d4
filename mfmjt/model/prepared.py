"""The network prepared for one (r, t), which generation in one step evaluates.

In one step all samples share r = 0 and t = 1, and the pass without conditions is the same for all.
So the embedding of time is a constant, null conditions are encoded once per length, both passes are
one batch, layers that read the same input are one matmul, and the modulations of all blocks are one
matmul before the first block. Weights are packed as `mfmjt.kernels.streams` reads them. The blocks
are those of the network: only how weights are applied is replaced. The result equals the network's
up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.errors import InputError
from mfmjt.kernels import streams
from mfmjt.model.blocks import (
    NORM_EPS,
    Blocks,
    FrameCondition,
    Linear,
    Pending,
    SwiGLU,
    normalize,
    run,
)
from mfmjt.model.conditioning import Features, resampled, stream_ropes, tables
from mfmjt.model.config import SYNC_SEGMENT

if TYPE_CHECKING:
    from mfmjt.model.transformer import MFMJT

__all__ = ["PreparedStep"]

_NULLS = 4
"""Combinations of lengths whose null conditions are kept: 17 MB of small_16k in bfloat16 each."""


class _Layers(NamedTuple):
    """One layer of several streams."""

    weights: list[streams.Packed]
    biases: list[Tensor | None]

    def __call__(self, xs: Sequence[Tensor], act: str | Sequence[str] = "none") -> list[Tensor]:
        return streams.project(list(xs), self.weights, self.biases, act)

    def later(self, xs: Sequence[Tensor]) -> list[_Later]:
        """Leave them to the norm that follows."""
        return list(map(_Later, xs, self.weights, self.biases))

    def only(self, indices: Sequence[int]) -> _Layers:
        """Select the layers of some of the streams."""
        return _Layers([self.weights[i] for i in indices], [self.biases[i] for i in indices])


def _layers(*modules: nn.Module) -> _Layers:
    return _Layers(
        [streams.pack(m.get_parameter("weight")) for m in modules],
        [getattr(m, "bias", None) for m in modules],
    )


def _gated(*modules: SwiGLU) -> tuple[_Layers, _Layers]:
    """Return both layers of SwiGLUs: the gated pair of matmuls, and the matmul back."""
    pairs = [
        streams.pack(m.w1.get_parameter("weight"), m.w3.get_parameter("weight")) for m in modules
    ]
    return _Layers(pairs, [None] * len(modules)), _layers(*(m.w2 for m in modules))


def _joined(*groups: Sequence[nn.Module]) -> _Layers:
    """Make one layer of each group of linear layers, which gives all their outputs side by side."""
    weights, biases = (
        [torch.cat([layer.get_parameter(name) for layer in group]) for group in groups]
        for name in ("weight", "bias")
    )
    return _Layers([streams.pack(weight) for weight in weights], list(biases))


def _append(layers: list[nn.Module], layer: nn.Module) -> slice:
    """Append a layer to those to be joined; return where its outputs will be."""
    start, end = (
        sum(len(m.get_parameter("bias")) for m in ms) for ms in (layers, [*layers, layer])
    )
    layers.append(layer)
    return slice(start, end)


class _Later(NamedTuple):
    """A layer's result that is not yet computed: the norm that reads it may share the work."""

    x: Tensor
    weight: streams.Packed
    bias: Tensor | None


def _normalize(
    given: Sequence[Pending],
    modulations: Sequence[Sequence[Tensor]],
    conditions: Sequence[FrameCondition],
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Do what `normalize` does, also of what is a `_Later` h."""
    if not isinstance(given[0].h, _Later):
        return normalize(given, modulations, conditions)
    xs, hs, gates = zip(*given, strict=True)
    ins, weights, biases = zip(*hs, strict=True)
    shifts, scales = zip(*(parts[:2] for parts in modulations), strict=True)
    rows = [condition.row_of for condition in conditions]
    return streams.project_norm(ins, weights, biases, xs, gates, shifts, scales, rows, eps=NORM_EPS)


class _Prepared(Blocks):
    """Blocks whose weights are packed, and whose modulations are parts of given ones.

    Args:
        together: The blocks.
        columns: Where in the modulations of all blocks those of each of these are.
    """

    def __init__(self, together: Blocks, columns: Sequence[slice]) -> None:
        blocks = together.blocks
        super().__init__(*blocks, gate=together.gate)
        self.columns = columns
        attns = [block.attn for block in blocks]
        self.heads, self._qkv = attns[0].num_heads, _layers(*(attn.qkv for attn in attns))
        self.q_norms = [attn.q_norm.weight for attn in attns]
        self.k_norms = [attn.k_norm.weight for attn in attns]
        self._out = _layers(*(block.linear1 for block in self.ongoing))
        self._up, self._down = _gated(*(block.ffn for block in self.ongoing))

    def modulate(self, rows: Sequence[Tensor]) -> Sequence[Tensor]:
        return [parts[..., at] for parts, at in zip(rows, self.columns, strict=True)]

    def project(
        self, ys: Sequence[Tensor], ropes: Sequence[Tensor | None]
    ) -> Sequence[Sequence[Tensor]]:
        weights, biases = self._qkv
        return streams.project_qkv(
            ys, weights, biases, self.q_norms, self.k_norms, ropes, self.heads
        )

    def normalize(self, *args: Any) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return _normalize(*args)

    def out(self, xs: Sequence[Tensor]) -> Any:
        return self._out.later(xs)

    def feed_forward(self, xs: Sequence[Tensor]) -> Any:
        return self._down.later(self._up(xs))


class _Null(NamedTuple):
    """The pass without conditions: tokens (1, N, D), and the modulations of all blocks.

    Attributes:
        tokens: Of each condition, by its name.
        position: What the positions in segments add to the output of sync's first layer; None
            without video.
        by_frame: Those of the latent (1, S, ...), or `by_clip` where no condition is by frames.
        by_clip: Those of the other streams and the final layer (1, 1, ...).
    """

    tokens: dict[str, Tensor]
    position: Tensor | None
    by_frame: FrameCondition
    by_clip: Tensor


def _expanded(xs: Sequence[Tensor], batch: int) -> list[Tensor]:
    return [x.expand(batch, -1, -1) for x in xs]


def _both(conds: Sequence[Tensor], nulls: Sequence[Tensor], batch: int) -> list[Tensor]:
    """Return both passes of each as one batch, (2 B, N, D), copied in one launch."""
    wholes = [x.new_empty(2 * batch, *x.shape[1:]) for x in conds]
    halves = [half for whole in wholes for half in whole.chunk(2)]
    parts = [x for pair in zip(conds, nulls, strict=True) for x in pair]
    torch._foreach_copy_(halves, _expanded(parts, batch))
    return wholes


class PreparedStep:
    """Velocities of a network at one r and t, with and without conditions at once.

    Most weights are copied into a layout that is faster to read, so later changes of the network
    have no effect here.

    Args:
        net: The network, on its device and in its dtype.
        r: End of the interval.
        t: Begin of the interval.

    Raises:
        InputError: Not 0 ≤ r ≤ t ≤ 1.
    """

    @torch.no_grad()
    def __init__(self, net: MFMJT, r: float = 0.0, t: float = 1.0) -> None:
        if not 0 <= r <= t <= 1:
            raise InputError(f"r is {r} and t is {t}: an interval has 0 <= r <= t <= 1. Swap them.")
        self.config, self.dtype = net.config, net.dtype
        self._net = net
        device = net.latent_mean.device
        time = net.embed(torch.tensor([r], device=device), torch.tensor([t], device=device))

        # Input layers of the latent and of each condition.
        inputs: dict[str, Any] = {"latent": net.audio_input_proj}
        if net.config.takes_video:
            inputs |= {"video": net.clip_input_proj, "sync": net.sync_input_proj}
        inputs["text"] = net.text_input_proj
        self._names = list(inputs)
        self._first = _layers(*(layers[0] for layers in inputs.values()))
        convolved, projected = ("silu", "silu") if net.config.v2 else ("selu", "none")
        self._acts = [
            convolved if name in ("latent", "sync") else projected for name in self._names
        ]
        self._up, self._down = _gated(*(layers[-1] for layers in inputs.values()))

        self._pool_video: _Layers | None = None
        if isinstance(net.text_cond_proj, nn.Sequential):
            first, last = net.text_cond_proj
            self._pool = _layers(first)
            self._pool_up, pool_down = _gated(cast(SwiGLU, last))
            if net.config.takes_video:
                self._pool_video = _layers(net.clip_cond_proj)
        else:
            # A sum of two linear maps of two means is one linear map of both means.
            pools = [net.clip_cond_proj] if net.config.takes_video else []
            pools.append(cast(Linear, net.text_cond_proj))
            weight = torch.cat([p.get_parameter("weight") for p in pools], dim=1)
            bias = torch.stack([p.get_parameter("bias") for p in pools]).sum(0)
            self._pool = _Layers([streams.pack(weight)], [bias])
            self._pool_up, pool_down = _gated(net.global_cond_mlp)
        self._pool_down = _Layers(pool_down.weights, [time[0]])  # time is added to the result

        # Where video is synchronized the latent is modulated frame by frame; all else as a whole.
        by_frame: list[nn.Module] = []
        by_clip: list[nn.Module] = []
        of_latent = by_frame if net.config.takes_video else by_clip
        self._blocks = []
        for block in (*net.joint_blocks, *net.fused_blocks):
            together = block.together()
            columns = [
                _append(by_clip if i else of_latent, b.adaLN_modulation[1])
                for i, b in enumerate(together.blocks)
            ]
            self._blocks.append(_Prepared(together, columns))
        self._final_columns = _append(by_clip, net.final_layer.adaLN_modulation[1])
        self._modulations = _joined(*(group for group in (by_frame, by_clip) if group))
        conv, sign = net.final_layer.conv, -1 if net.config.towards_data else 1
        self._final = _Layers(
            [streams.pack(sign * conv.weight)], [None if conv.bias is None else sign * conv.bias]
        )
        self._nulls: dict[tuple[int, ...], _Null] = {}
        self._last: _Null | None = None

    @torch.no_grad()
    def __call__(
        self,
        z: Tensor,
        video: Tensor | None = None,
        sync: Tensor | None = None,
        text: Tensor | None = None,
        pooled: Tensor | None = None,
        *,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        negative_text: Tensor | None = None,
        negative_pooled: Tensor | None = None,
        null: bool = True,
    ) -> Tensor:
        """Average velocities of z.

        Args:
            z: Noisy latent (B, N, C).
            video: Features (B or 1, N_video, video_dim), or None for null ones.
            sync: Features (B or 1, N_sync, sync_dim), or None.
            text: Features (B or 1, N_text, text_dim), or None.
            pooled: Features of the whole text (B or 1, pooled_dim), or None.
            video_mask: (B,) bool; where False, video and synchronization are null.
            text_mask: (B,) bool; where False, the text is null.
            negative_text: Features (B or 1, N_text, text_dim) in place of the null text in the
                evaluation without conditions, as many tokens as the text has.
            negative_pooled: The same of the whole text (B or 1, pooled_dim).
            null: Also evaluate without conditions.

        Returns:
            With conditions and then, if `null`, without: (2B, N, C) or (B, N, C), in the dtype of
            the network.

        Raises:
            InputError: A shape does not fit.
        """
        batch, length = z.shape[:2]
        features = self._net.features(video, sync, text, video_mask, text_mask, length, pooled)
        uncond = self._null(length, features)
        # The streams to encode: the latent, and the conditions that are given.
        given = {"latent": z, "video": video, "sync": sync, "text": text}
        encoded = [i for i, name in enumerate(self._names) if given[name] is not None]
        inputs = {"latent": z.to(self.dtype), **features._asdict()}
        biases = [
            uncond.position if name == "sync" else bias
            for name, bias in zip(self._names, self._first.biases, strict=True)
        ]
        first = _Layers(self._first.weights, biases).only(encoded)
        xs = first([inputs[self._names[i]] for i in encoded], [self._acts[i] for i in encoded])
        xs = self._down.only(encoded)(self._up.only(encoded)(xs))
        tokens = uncond.tokens | dict(zip([self._names[i] for i in encoded], xs, strict=True))
        latent = tokens.pop("latent")
        by_frame, by_clip = self._modulated(tokens, features.pooled, length)
        if null and negative_text is not None:
            uncond = self._against(uncond, negative_text, negative_pooled, length)

        names = [name for name in ("video", "text") if name in tokens]
        framed = by_frame.rows is not by_clip
        conds = [by_clip, latent, *(tokens[name] for name in names)]
        nulls = [uncond.by_clip, latent, *(uncond.tokens[name] for name in names)]
        if framed:
            conds.append(by_frame.rows)
            nulls.append(uncond.by_frame.rows)
        of_clip, *parts = _both(conds, nulls, batch) if null else _expanded(conds, batch)
        whole = FrameCondition(of_clip)
        frames = FrameCondition(parts.pop(), by_frame.row_of) if framed else whole
        residual = run(
            self._blocks,
            [Pending(part) for part in parts],
            (frames, *[whole] * len(names)),
            stream_ropes(self.config, length, tokens.get("video"), tokens["text"]),
        )
        modulation = whole.rows[..., self._final_columns].chunk(2, dim=-1)
        _, ys = _normalize((residual,), (modulation,), (frames,))
        return self._final(ys)[0]

    @torch.no_grad()
    def step(
        self,
        z: Tensor,
        *,
        guidance: float | Tensor = 1.5,
        mode: Literal["cfg_scaled", "cfg", "none"] = "cfg_scaled",
        **given: Tensor,
    ) -> Tensor:
        """Turn noise z into data z − u with guidance: the whole generation in one step.

        Args:
            z: As for a call.
            guidance: Scale w, a number or a tensor of one element; the number 1 needs no second
                pass.
            mode: See `mfmjt.meanflow.guide`.
            **given: The conditions of a call.

        Returns:
            (B, N, C), in the dtype of z.
        """
        null = mode != "none" and (isinstance(guidance, Tensor) or guidance != 1.0)
        u = self(z, **given, null=null)
        return streams.guide(z, u, guidance, mode if null else "none")

    def _modulated(
        self, tokens: Mapping[str, Tensor], pooled: Tensor | None, length: int
    ) -> tuple[FrameCondition, Tensor]:
        """Return the modulations of all blocks: the latent's by frame, and those of a clip."""
        read = [tokens[name] for name in ("video", "text") if name in tokens]
        if pooled is None:
            pooled = streams.pool(_expanded(read, max(x.shape[0] for x in read)))
        (shared,) = self._pool_down(self._pool_up(self._pool([pooled])))
        if self._pool_video is not None:
            shared = shared + self._pool_video([streams.pool(read[:1])])[0]
        if "sync" not in tokens:
            (by_clip,) = self._modulations([F.silu(shared)])
            return FrameCondition(by_clip), by_clip
        rows, row_of = resampled(tokens["sync"], length)
        shared = shared.expand(max(len(shared), len(rows)), -1, -1)
        whole, frames = streams.silu_conditions(shared, rows)
        by_frame, by_clip = self._modulations([frames, whole])
        return FrameCondition(by_frame, row_of), by_clip

    def _against(self, null: _Null, text: Tensor, pooled: Tensor | None, length: int) -> _Null:
        """Return the pass without conditions with this text in place of the null text."""
        features = self._net.features(text=text, pooled=pooled, latent_length=length)
        if features.text.shape[1] != null.tokens["text"].shape[1]:
            raise InputError(
                f"negative_text has {features.text.shape[1]} tokens, and the text "
                f"{null.tokens['text'].shape[1]}. Encode both alike."
            )
        at = self._names.index("text")
        xs = self._up.only([at])(self._first.only([at])([features.text], [self._acts[at]]))
        tokens = {**null.tokens, "text": self._down.only([at])(xs)[0]}
        return _Null(tokens, null.position, *self._modulated(tokens, features.pooled, length))

    def _null(self, length: int, features: Features) -> _Null:
        net = self._net
        given = {
            name: feature
            for name, feature in features._asdict().items()
            if feature is not None and name != "pooled"
        }
        key = (length, *(feature.shape[1] for feature in given.values()))
        found = self._nulls.get(key)
        if found is None:
            masked = torch.zeros(1, dtype=torch.bool, device=net.latent_mean.device)
            zeros = {name: torch.zeros_like(feature[:1]) for name, feature in given.items()}
            masks = {"video_mask": masked, "text_mask": masked}
            cond = net.conditions(**zeros, **masks, latent_length=length)
            tokens = {name: part for name in given if (part := getattr(cond, name)) is not None}
            pooled, position = net.features().pooled, None
            if "sync" in given:
                segments = given["sync"].shape[1] // SYNC_SEGMENT
                positions = net.sync_pos_emb.expand(1, segments, -1, -1).flatten(1, 2)
                position = self._first.only([self._names.index("sync")])([positions])[0][0]
            found = _Null(tokens, position, *self._modulated(tokens, pooled, length))
            if len(self._nulls) >= _NULLS:
                self._nulls.pop(next(iter(self._nulls)))
            self._nulls[key] = found
        self._last = found
        return found

    def reads(self) -> tuple[object, ...]:
        """Return what the last call read and later calls may drop; a CUDA graph must keep it."""
        return self._last, tables()
