"""The network prepared for one (r, t), which generation in one step evaluates.

In one step all samples share r = 0 and t = 1, and the pass without conditions is the same for all.
So the embedding of time is a constant, null conditions are encoded once per length, both passes are
one batch, layers that read the same input are one matmul, and the modulations of all blocks are one
matmul before the first block. All streams go through a layer in one launch. The result equals the
network's up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mfmjt.errors import InputError
from mfmjt.kernels import joint_attention, streams
from mfmjt.model.blocks import NORM_EPS, Block, JointBlock, SwiGLU
from mfmjt.model.conditioning import nearest_rows, stream_ropes, tables
from mfmjt.model.config import SYNC_SEGMENT
from mfmjt.model.transformer import MFMJT

__all__ = ["PreparedStep"]

_NULLS = 4
"""Combinations of lengths whose null conditions are kept: 13 MB of small_16k in bfloat16 each."""


class _Layers(NamedTuple):
    """One layer of several streams."""

    weights: list[streams.Packed]
    biases: list[Tensor | None]

    def __call__(self, xs: Sequence[Tensor], act: str | Sequence[str] = "none") -> list[Tensor]:
        return list(streams.project(list(xs), self.weights, self.biases, act))

    def only(self, indices: Sequence[int]) -> _Layers:
        """Select the layers of some of the streams."""
        return _Layers([self.weights[i] for i in indices], [self.biases[i] for i in indices])


def _layers(*modules: nn.Module) -> _Layers:
    return _Layers(
        [streams.pack(m.get_parameter("weight")) for m in modules],
        [getattr(m, "bias", None) for m in modules],
    )


def _gated(*modules: SwiGLU) -> tuple[_Layers, _Layers]:
    """Both layers of SwiGLUs: the gated pair of matmuls, and the matmul back."""
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


class _PreparedBlock:
    """Latent, video and text of a joint block, or the latent of a later one."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.qkv = _layers(*(b.attn.qkv for b in blocks))
        self.q_norms = [b.attn.q_norm.get_parameter("weight") for b in blocks]
        self.k_norms = [b.attn.k_norm.get_parameter("weight") for b in blocks]
        self.heads = blocks[0].attn.num_heads
        # In the last joint block, video and text end once the latent has attended to them.
        ongoing = [b for b in blocks if b.parts == 6]
        self.ongoing = len(ongoing)
        self.out = _layers(*(b.linear1 for b in ongoing))
        self.up, self.down = _gated(*(b.ffn for b in ongoing))


class _Null(NamedTuple):
    """The pass without conditions: tokens (1, N, D), and the modulations of all blocks.

    Attributes:
        position: What the positions in segments add to the output of sync's first layer.
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

        joint = [b for b in net.joint_blocks if isinstance(b, JointBlock)]
        fused = [b for b in net.fused_blocks if isinstance(b, Block)]
        grouped = [(b.latent_block, b.clip_block, b.text_block) for b in joint]
        self._blocks = [_PreparedBlock(blocks) for blocks in (*grouped, *((b,) for b in fused))]
        # The latent is modulated frame by frame; video, text and the final layer as a whole.
        framed = [blocks[0] for blocks in grouped] + fused
        whole = [b for blocks in grouped for b in blocks[1:]] + [net.final_layer]
        self._modulations = _joined(
            [b.adaLN_modulation[1] for b in framed], [b.adaLN_modulation[1] for b in whole]
        )
        self._whole_parts = [getattr(b, "parts", 2) for b in whole]
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
        latent = tokens[0]
        video = tokens.get(1, uncond.video)
        sync = tokens.get(2, uncond.sync)
        text = tokens.get(3, uncond.text)

        samples = max(part.shape[0] for part in (video, sync, text))
        shared = self._shared(*(part.expand(samples, -1, -1) for part in (video, text)))
        picked = self._picked(sync.shape[1], length)
        whole, frames = streams.silu_conditions(shared, sync, picked)
        frames, whole = (part.expand(batch, -1, -1) for part in (frames, whole))
        by_frame, by_clip = self._modulations([frames, whole])

        def both(cond: Tensor, uncond: Tensor) -> Tensor:
            cond = cond.expand(batch, -1, -1)
            return torch.cat((cond, uncond.expand(batch, -1, -1))) if null else cond

        return self._run(
            [both(latent, latent), both(video, uncond.video), both(text, uncond.text)],
            both(by_frame, uncond.by_frame),
            both(by_clip, uncond.by_clip),
            None if picked is not None else nearest_rows(sync.shape[1], length, z.device),
        )

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

    def _picked(self, rows: int, length: int) -> Tensor | None:
        """Return the row of sync for each latent token; None if there are fewer rows."""
        if rows < length:
            return None
        return nearest_rows(rows, length, self._net.sync_pos_emb.device)

    def _shared(self, video: Tensor, text: Tensor) -> Tensor:
        """Add time to the global condition of projected tokens: (B, 1, D)."""
        return self._pool_down(self._pool_up(self._pool([streams.pool([video, text])])))[0]

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
            whole, frames = streams.silu_conditions(
                self._shared(video, text), sync, self._picked(lengths[1], length)
            )
            segments = lengths[1] // SYNC_SEGMENT
            position = net.sync_pos_emb.expand(1, segments, -1, -1).flatten(1, 2)
            placed = self._first.only([2])([position])[0][0]
            found = _Null(placed, video, text, sync, *self._modulations([frames, whole]))
            if len(self._nulls) >= _NULLS:
                self._nulls.pop(next(iter(self._nulls)))
            self._nulls[key] = found
        self._last = found
        return found

    def reads(self) -> tuple[object, ...]:
        """Return what the last call read and later calls may drop; a CUDA graph must keep it."""
        return self._last, tables()

    def _run(
        self,
        xs: list[Tensor],
        by_frame: Tensor,
        by_clip: Tensor,
        rows: Tensor | None,
    ) -> Tensor:
        """Run all blocks and the final layer."""
        dim = self.config.hidden_dim
        lengths = xs[0].shape[1], xs[1].shape[1]
        ropes = [*stream_ropes(*lengths, self.config.head_dim, xs[0].device), None]
        of_frames = iter(by_frame.split(6 * dim, dim=-1))
        of_clips = iter(by_clip.split([parts * dim for parts in self._whole_parts], dim=-1))
        hs: list[Tensor] | None = None
        gates: list[Tensor] | None = None
        for block in self._blocks:
            count = len(block.q_norms)
            xs, index = xs[:count], [rows, None, None][:count]
            if hs is not None and gates is not None:
                hs, gates = hs[:count], gates[:count]
            parts = [next(of_frames).split(dim, dim=-1)]
            parts += [next(of_clips).split(dim, dim=-1) for _ in range(count - 1)]
            xs, ys = _norm(xs, hs, gates, [p[0] for p in parts], [p[1] for p in parts], index)
            q, k, v = streams.project_qkv(
                ys,
                block.qkv.weights,
                block.qkv.biases,
                block.q_norms,
                block.k_norms,
                ropes[:count],
                block.heads,
            )
            on = block.ongoing
            attended = [a.flatten(2) for a in joint_attention(q[:on], k, v)]
            hs = block.out(attended)
            xs, parts, index = xs[:on], parts[:on], index[:on]
            xs, ys = _norm(
                xs, hs, [p[2] for p in parts], [p[3] for p in parts], [p[4] for p in parts], index
            )
            hs, gates = block.down(block.up(ys)), [p[5] for p in parts]
        shift, scale = next(of_clips).chunk(2, dim=-1)
        _, ys = _norm(xs, hs, gates, [shift], [scale], [rows])
        return self._final(ys)[0]


def _norm(
    xs: list[Tensor],
    hs: list[Tensor] | None,
    gates: list[Tensor] | None,
    shifts: list[Tensor],
    scales: list[Tensor],
    rows: list[Tensor | None],
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the residuals xs + gates·hs, and the same normalized and modulated."""
    added, normed = streams.gated_residual_norm(xs, hs, gates, shifts, scales, rows, NORM_EPS)
    return list(added), list(normed)
