"""Networks of the structure of those that others train, for `python -m bench trainers`.

Written here after what the originals compute: which functions of PyTorch a block calls, in which
order, in place or not, and how wide it is. So they show what `accelerate_jvp` meets there: products
written as `x @ w.t()`, norms and attention written by hand, a modulation after every norm. Weights
are random, without the zeros that training starts from. There is no dropout, which draws anew in
each call, so that all ways to a step have one gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MeanAudio", "SiT", "UNet"]


def _frequencies(count: int, steps: int) -> Tensor:
    """Return `count` frequencies from 1 down towards 1/10000, a power of it for each of `steps`."""
    return torch.exp(-math.log(10000) * torch.arange(count) / steps)


class _Product(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.t()
        return y if self.bias is None else y.add_(self.bias)


class _Conv(nn.Conv2d):
    """A convolution of what is resampled by a fixed filter, its bias added in place."""

    taps: Tensor
    bias: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, resample: str = "") -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.resample = resample
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("taps", taps.outer(taps).expand(inputs, 1, 4, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            x = F.conv_transpose2d(x, 4 * self.taps, groups=len(self.taps), stride=2, padding=1)
        elif self.resample == "down":
            x = F.conv2d(x, self.taps, groups=len(self.taps), stride=2, padding=1)
        x = F.conv2d(x, self.weight, padding=self.padding)
        return x.add_(self.bias.view(1, -1, 1, 1))


class _GroupNorm(nn.Module):
    """Group norm of elementary functions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = min(32, channels // 4)
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        of_group = x.unflatten(1, (self.groups, -1))
        axes = tuple(range(2, of_group.ndim))
        mean = of_group.mean(axes, keepdim=True)
        variance = of_group.var(axes, keepdim=True, unbiased=False)
        n = ((of_group - mean) / torch.sqrt(variance + 1e-6)).view(x.shape)
        return n * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class _Residual(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, times: int, resample: str = "", attends: bool = False
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.first_norm, self.first = _GroupNorm(inputs), _Conv(inputs, outputs, 3, resample)
        self.times = _Product(times, outputs)
        self.second_norm, self.second = _GroupNorm(outputs), _Conv(outputs, outputs)
        same = inputs == outputs and not resample
        self.around = None if same else _Conv(inputs, outputs, 1, resample)
        self.attends = attends
        if attends:
            self.norm = _GroupNorm(outputs)
            self.qkv, self.out = _Conv(outputs, 3 * outputs, 1), _Conv(outputs, outputs, 1)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        y = self.first(F.silu(self.first_norm(x)))
        y = F.silu(self.second_norm(y.add_(self.times(times)[:, :, None, None])))
        y = self.second(y).add_(x if self.around is None else self.around(x)) * 0.5**0.5
        if self.attends:
            q, k, v = self.qkv(self.norm(y)).flatten(2).chunk(3, 1)
            scale = q.shape[1] ** -0.25
            weights = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(-1)
            o = torch.einsum("bts,bcs->bct", weights, v)
            y = self.out(o.view(y.shape)).add_(y) * 0.5**0.5
        return y


class UNet(nn.Module):
    """The U-Net of py-meanflow for CIFAR-10 (DDPM++, 55 M weights).

    Called as u(z, (t, t - r), augmentation (B, 6)) of images, as there.
    """

    def __init__(self, size: int = 32, width: int = 256, blocks: int = 4, levels: int = 3) -> None:
        super().__init__()
        attended, times = size // 2, 2 * width
        self.width = width
        self.augmentation = _Product(6, times, bias=False)
        self.enter, self.between = _Product(times, times), _Product(times, times)
        self.down = nn.ModuleList([_Conv(3, width // 2)])
        skips, channels = [width // 2], width // 2
        for level in range(levels):
            if level:
                self.down.append(_Residual(width, width, times, "down"))
                skips.append(width)
            for _ in range(blocks):
                attends = size >> level == attended
                self.down.append(_Residual(channels, width, times, attends=attends))
                skips.append(channels := width)
        self.up = nn.ModuleList([_Residual(width, width, times, attends=True)])
        for level in reversed(range(levels)):
            resample = "up" if level < levels - 1 else ""
            self.up.append(_Residual(width, width, times, resample))
            for last in [False] * blocks + [True]:
                attends = last and size >> level == attended
                self.up.append(_Residual(width + skips.pop(), width, times, attends=attends))
        self.norm, self.leave = _GroupNorm(width), _Conv(width, 3)

    def forward(self, x: Tensor, times: tuple[Tensor, Tensor], augmentation: Tensor) -> Tensor:
        """Return u (B, 3, size, size)."""
        frequencies = _frequencies(self.width // 2, self.width // 2 - 1)
        angles = [time.ger(frequencies.to(time)) for time in times]
        waves = torch.cat([part for a in angles for part in (a.sin(), a.cos())], 1)
        embedded = F.silu(self.enter(waves + self.augmentation(augmentation)))
        embedded = F.silu(self.between(embedded))
        skips = []
        for block in self.down:
            x = block(x, embedded) if isinstance(block, _Residual) else block(x)
            skips.append(x)
        for block in self.up:
            if x.shape[1] != block.inputs:
                x = torch.cat([x, skips.pop()], 1)
            x = block(x, embedded)
        return self.leave(F.silu(self.norm(x)))


class _Times(nn.Module):
    """Waves of a time, and two layers."""

    frequencies: Tensor

    def __init__(self, width: int, waves: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(waves, width), nn.SiLU(), nn.Linear(width, width))
        frequencies = _frequencies(waves // 2, waves // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        return self.layers(torch.cat([angles.cos(), angles.sin()], -1))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def _modulation(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))


class _SiTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = _modulation(width, 6)
        self.first_norm = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.second_norm = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.layers = nn.Sequential(up, nn.GELU("tanh"), down)

    def _attend(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)
        x = x + gate * self._attend(_modulate(self.first_norm(x), shift, scale))
        return x + gate2 * self.layers(_modulate(self.second_norm(x), shift2, scale2))


class SiT(nn.Module):
    """The SiT-B/4 of zhuyu-cs/MeanFlow on latents of ImageNet at 256 pixels (131 M weights).

    Its attention is timm's without the fused kernel, which has no forward mode. Called as
    u(z, r, t, y) of latents and labels (B,), as there.
    """

    def __init__(
        self, size: int = 32, patch: int = 4, width: int = 768, depth: int = 12, heads: int = 12
    ) -> None:
        super().__init__()
        self.patch = patch
        self.enter = nn.Conv2d(4, width, patch, patch)
        self.places = nn.Parameter(torch.randn(1, (size // patch) ** 2, width), requires_grad=False)
        self.t, self.span, self.labels = _Times(width), _Times(width), nn.Embedding(1001, width)
        self.blocks = nn.ModuleList([_SiTBlock(width, heads) for _ in range(depth)])
        self.modulation = _modulation(width, 2)
        self.norm = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.leave = nn.Linear(width, 4 * patch**2)

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return u (B, 4, size, size)."""
        x = self.enter(z).flatten(2).transpose(1, 2) + self.places
        c = self.t(t) + self.span(t - r) + self.labels(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c)[:, None].chunk(2, -1)
        x = self.leave(_modulate(self.norm(x), shift, scale))
        rows = z.shape[-1] // self.patch
        x = x.reshape(-1, rows, rows, self.patch, self.patch, 4)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(z.shape)


class _ChannelsLast(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 1)).permute(0, 2, 1)


def _layer(inputs: int, outputs: int, kernel: int, bias: bool = True) -> nn.Module:
    if kernel == 1:
        return nn.Linear(inputs, outputs, bias)
    return _ChannelsLast(inputs, outputs, kernel, padding=kernel // 2, bias=bias)


class _Gated(nn.Module):
    """A SwiGLU between linear layers or convolutions."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        inner = 256 * math.ceil(8 * width / 3 / 256)
        self.gate, self.linear = (_layer(width, inner, kernel, bias=False) for _ in range(2))
        self.down = _layer(inner, width, kernel, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.linear(x))


class _Stream(nn.Module):
    """What one stream has of its own around an attention."""

    def __init__(self, width: int, heads: int, kernel: int, ends: bool = False) -> None:
        super().__init__()
        self.heads, self.ends = heads, ends
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = _modulation(width, 2 if ends else 6)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads) for _ in range(2))
        if not ends:
            self.out = _layer(width, width, kernel)
            self.second_norm = nn.LayerNorm(width, elementwise_affine=False)
            self.layers = _Gated(width, kernel)

    def before(self, x: Tensor, c: Tensor, turns: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        shift, scale, *rest = self.modulation(c).chunk(2 if self.ends else 6, -1)
        qkv = self.qkv(_modulate(self.norm(x), shift, scale))
        q, k, v = qkv.unflatten(-1, (self.heads, -1, 3)).transpose(1, 2).unbind(-1)
        return [_turned(self.q_norm(q), turns), _turned(self.k_norm(k), turns), v], rest

    def after(self, x: Tensor, o: Tensor, rest: list[Tensor]) -> Tensor:
        if self.ends:
            return x
        gate, shift, scale, gate2 = rest
        x = x + self.out(o) * gate
        return x + self.layers(_modulate(self.second_norm(x), shift, scale)) * gate2


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (-1, 1, 2))
    return (turns[..., 0] * pairs[..., 0] + turns[..., 1] * pairs[..., 1]).flatten(-2)


def _turns(length: int, width: int) -> Tensor:
    """Return the rotations of RoPE (length, width / 2, 2, 2)."""
    angles = torch.arange(length).outer(_frequencies(width // 2, width // 2))
    c, s = angles.cos(), angles.sin()
    return torch.stack([c, -s, s, c], -1).unflatten(-1, (2, 2))


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.contiguous() for x in (q, k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        o = F.scaled_dot_product_attention(q, k, v)
    return o.transpose(1, 2).flatten(2)


class MeanAudio(nn.Module):
    """MeanAudio-S on 10 s of sound (120 M weights).

    Called as u(latent, text (B, words, 1024), pooled (B, 512), r, t), as there.
    """

    def __init__(
        self,
        length: int = 312,
        words: int = 77,
        width: int = 448,
        heads: int = 7,
        joint: int = 4,
        fused: int = 8,
    ) -> None:
        super().__init__()
        self.enter = nn.Sequential(_layer(20, width, 7), nn.SELU(), _Gated(width, 7))
        self.text = nn.Sequential(nn.Linear(1024, width), _Gated(width, 1))
        self.pooled = nn.Sequential(nn.Linear(512, width), _Gated(width, 1))
        self.t, self.r = _Times(width), _Times(width)
        ends = [False] * (joint - 1) + [True]
        self.joint: Any = nn.ModuleList([_Stream(width, heads, 3) for _ in ends])
        self.joint_text: Any = nn.ModuleList([_Stream(width, heads, 1, last) for last in ends])
        self.fused: Any = nn.ModuleList([_Stream(width, heads, 3) for _ in range(fused)])
        self.modulation = _modulation(width, 2)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.leave = _layer(width, 20, 7)
        for name, count in (("latent_turns", length), ("text_turns", words)):
            self.register_buffer(name, _turns(count, width // heads), persistent=False)

    def forward(self, latent: Tensor, text: Tensor, pooled: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """Return u (B, length, 20)."""
        c = (self.t(t) + self.r(r))[:, None] + self.pooled(pooled)[:, None]
        x, text, length = self.enter(latent), self.text(text), latent.shape[1]
        for of_latent, of_text in zip(self.joint, self.joint_text, strict=True):
            own, rest = of_latent.before(x, c, self.latent_turns)
            others, text_rest = of_text.before(text, c, self.text_turns)
            o = _attended(*(torch.cat(pair, 2) for pair in zip(own, others, strict=True)))
            x = of_latent.after(x, o[:, :length], rest)
            text = of_text.after(text, o[:, length:], text_rest)
        for block in self.fused:
            qkv, rest = block.before(x, c, self.latent_turns)
            x = block.after(x, _attended(*qkv), rest)
        shift, scale = self.modulation(c).chunk(2, -1)
        return self.leave(_modulate(self.norm(x), shift, scale))
