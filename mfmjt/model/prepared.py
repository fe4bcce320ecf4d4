"""The network prepared for one (r, t), which generation in one step evaluates.

In one step all samples share r = 0 and t = 1, and the pass without conditions is the same for all.
So the embedding of time is a constant, null conditions are encoded once per length, both passes are
one batch, layers that read the same input are one matmul, and the modulations of all blocks are one
matmul before the first block. Weights are packed as `mfmjt.kernels.streams` reads them. The blocks
are those of the network: only how weights are applied is replaced. The result equals the network's
up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.errors import InputError
from mfmjt.kernels import streams
from mfmjt.model.blocks import Block, Blocks, FrameCondition, Pending, SwiGLU, normalize, run
from mfmjt.model.conditioning import frame_condition, stream_ropes, tables
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


class _Prepared(Blocks):
    """Blocks whose weights are packed, and whose modulations are parts of given ones.

    Args:
        blocks: The blocks.
        columns: Where in the modulations of all blocks those of each of these are.
    """

    def __init__(self, blocks: Sequence[Block], columns: Sequence[slice]) -> None:
        super().__init__(*blocks)
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

    def out(self, xs: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._out(xs)

    def feed_forward(self, xs: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._down(self._up(xs))


class _Null(NamedTuple):
    """The pass without conditions: tokens (1, N, D), and the modulations of all blocks.

    Attributes:
        position: What the positions in segments add to the output of sync's first layer.
        by_frame: Those of the latent (1, N, ...).
        by_clip: Those of video, text and the final layer (1, 1, ...).
    """

    position: Tensor
    video: Tensor
    text: Tensor
    sync: Tensor
    by_frame: Tensor
    by_clip: Tensor


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
        device = net.sync_pos_emb.device
        begin, span = torch.tensor([t], device=device), torch.tensor([t - r], device=device)
        time = net.t_embed(1 - begin) + net.r_embed(span)  # (1, D)

        # Input layers of latent, video, sync and text.
        inputs = (
            net.audio_input_proj,
            net.clip_input_proj,
            net.sync_input_proj,
            net.text_input_proj,
        )
        self._first = _layers(*(layers[0] for layers in inputs))
        self._acts = ("silu",) * 4 if net.config.v2 else ("selu", "none", "selu", "none")
        last = [layers[-1] for layers in inputs]
        self._up, self._down = _gated(*(layer for layer in last if isinstance(layer, SwiGLU)))
        # A sum of two linear maps of two means is one linear map of both means.
        pools = (net.clip_cond_proj, net.text_cond_proj)
        weight = torch.cat([p.get_parameter("weight") for p in pools], dim=1)
        bias = torch.stack([p.get_parameter("bias") for p in pools]).sum(0)
        self._pool = _Layers([streams.pack(weight)], [bias])
        self._pool_up, pool_down = _gated(net.global_cond_mlp)
        self._pool_down = _Layers(pool_down.weights, [time[0]])  # time is added to the result

        # The latent is modulated frame by frame; video, text and the final layer as a whole.
        by_frame: list[nn.Module] = []
        by_clip: list[nn.Module] = []
        self._blocks = []
        for block in (*net.joint_blocks, *net.fused_blocks):
            together = block.together().blocks
            columns = [
                _append(by_clip if i else by_frame, b.adaLN_modulation[1])
                for i, b in enumerate(together)
            ]
            self._blocks.append(_Prepared(together, columns))
        self._final_columns = _append(by_clip, net.final_layer.adaLN_modulation[1])
        self._modulations = _joined(by_frame, by_clip)
        # The published network predicts the opposite velocity.
        conv = net.final_layer.conv
        self._final = _Layers(
            [streams.pack(-conv.weight)], [None if conv.bias is None else -conv.bias]
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
        *,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        negative_text: Tensor | None = None,
        null: bool = True,
    ) -> Tensor:
        """Average velocities of z.

        Args:
            z: Noisy latent (B, N, C).
            video: Features (B or 1, N_video, video_dim), or None for null ones.
            sync: Features (B or 1, N_sync, sync_dim), or None.
            text: Features (B or 1, N_text, text_dim), or None.
            video_mask: (B,) bool; where False, video and synchronization are null.
            text_mask: (B,) bool; where False, the text is null.
            negative_text: Features (B or 1, N_text, text_dim) in place of the null text in the
                evaluation without conditions, as many tokens as the text has.
            null: Also evaluate without conditions.

        Returns:
            With conditions and then, if `null`, without: (2B, N, C) or (B, N, C), in the dtype of
            the network.

        Raises:
            InputError: A shape does not fit.
        """
        batch, length = z.shape[:2]
        features = self._net.features(video, sync, text, video_mask, text_mask, length)
        uncond = self._null(length, tuple(feature.shape[1] for feature in features))
        # The streams to encode: the latent, and the conditions that are given.
        encoded = [0, *(i for i, x in enumerate((video, sync, text), 1) if x is not None)]
        inputs = [z.to(self.dtype), *features]
        biases = [*self._first.biases[:2], uncond.position, self._first.biases[3]]
        first = _Layers(self._first.weights, biases).only(encoded)
        xs = first([inputs[i] for i in encoded], [self._acts[i] for i in encoded])
        xs = self._down.only(encoded)(self._up.only(encoded)(xs))
        tokens = dict(zip(encoded, xs, strict=True))
        video = tokens.get(1, uncond.video)
        sync = tokens.get(2, uncond.sync)
        text = tokens.get(3, uncond.text)
        by_frame, by_clip = self._modulated(video, sync, text, length)
        if null and negative_text is not None:
            uncond = self._against(uncond, negative_text, length)

        def both(cond: Tensor, uncond: Tensor) -> Tensor:
            cond = cond.expand(batch, -1, -1)
            return torch.cat((cond, uncond.expand(batch, -1, -1))) if null else cond

        frames = FrameCondition(both(by_frame, uncond.by_frame))
        whole = FrameCondition(both(by_clip, uncond.by_clip))
        pairs = ((tokens[0], tokens[0]), (video, uncond.video), (text, uncond.text))
        latent = run(
            self._blocks,
            [Pending(both(*pair)) for pair in pairs],
            (frames, whole, whole),
            (*stream_ropes(length, video.shape[1], self.config.head_dim, z.device), None),
        )
        modulation = whole.rows[..., self._final_columns].chunk(2, dim=-1)
        _, ys = normalize((latent,), (modulation,))
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
        self, video: Tensor, sync: Tensor, text: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Return the modulations of all blocks: the latent's by token, and those of a clip."""
        samples = max(part.shape[0] for part in (video, sync, text))
        means = [x.mean(1, keepdim=True).expand(samples, -1, -1) for x in (video, text)]
        pooled = self._pool([torch.cat(means, dim=-1)])
        (shared,) = self._pool_down(self._pool_up(pooled))
        frames = frame_condition(shared, sync, length)
        by_frame, by_clip = self._modulations([frames.rows, F.silu(shared)])
        return frames.of_tokens(by_frame), by_clip

    def _against(self, null: _Null, text: Tensor, length: int) -> _Null:
        """Return the pass without conditions with another text (B or 1, N_text, text_dim)."""
        *_, text = self._net.features(text=text, latent_length=length)
        if text.shape[1] != null.text.shape[1]:
            raise InputError(
                f"negative_text has {text.shape[1]} tokens, and the text {null.text.shape[1]}. "
                "Encode both alike."
            )
        xs = self._first.only([3])([text], [self._acts[3]])
        (encoded,) = self._down.only([3])(self._up.only([3])(xs))
        modulations = self._modulated(null.video, null.sync, encoded, length)
        return _Null(null.position, null.video, encoded, null.sync, *modulations)

    def _null(self, length: int, lengths: tuple[int, ...]) -> _Null:
        key = (length, *lengths)
        found = self._nulls.get(key)
        if found is None:
            net, device = self._net, self._net.sync_pos_emb.device
            masked = torch.zeros(1, dtype=torch.bool, device=device)
            dims = (net.config.video_dim, net.config.sync_dim, net.config.text_dim)
            video, sync, text = (
                torch.zeros(1, n, d, dtype=self.dtype, device=device)
                for n, d in zip(lengths, dims, strict=True)
            )
            video, sync, text, _ = net.conditions(video, sync, text, masked, masked)
            segments = lengths[1] // SYNC_SEGMENT
            position = net.sync_pos_emb.expand(1, segments, -1, -1).flatten(1, 2)
            placed = self._first.only([2])([position])[0][0]
            found = _Null(placed, video, text, sync, *self._modulated(video, sync, text, length))
            if len(self._nulls) >= _NULLS:
                self._nulls.pop(next(iter(self._nulls)))
            self._nulls[key] = found
        self._last = found
        return found

    def reads(self) -> tuple[object, ...]:
        """Return what the last call read and later calls may drop; a CUDA graph must keep it."""
        return self._last, tables()
