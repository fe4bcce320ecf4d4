"""Measure what `accelerate_jvp` and `meanflow.loss` save in trainers that others wrote.

    unet        py-meanflow's U-Net for CIFAR-10: `torch.func.jvp`
    sit         zhuyu-cs/MeanFlow's SiT-B/4: a forward pass, and a `torch.func.jvp` beside it
    meanaudio   MeanAudio-S: `torch.autograd.functional.jvp(create_graph=True)`, and two passes for
                guidance whose graphs are thrown away
    diffusers   diffusers' DiT (DiT-B/4), t - r in a channel of its own, by the paper's step
    bert        transformers' BERT on embeddings, with a mask of padding, by the paper's step

Networks and steps of the first three have the structure and the size of the originals, and are ours
(bench/networks/stand_ins.py). Dropout and dropped conditions are left out. A step is loss and
gradients without the optimizer:

    plain       flow matching: the network without a tangent, for comparison
    original    the trainer's own step
    with        that inside `mfmjt.kernels.accelerate_jvp()`; in MeanAudio, whose default is not
                forward mode, with its own option for `torch.func.jvp`
    loss        `mfmjt.meanflow.loss` in such a block, with the trainer's weight and guidance

All have the same draws, of which a share, --ratio, has r < t. The originals compute a tangent for
every sample, whatever the ratio. Before anything is timed, gradients must be the original's to 1e-5
in float32, and so must the loss of `with`. Calls take turns; times are medians of this process's
CPU time and of wall time. Saved bytes are the most for backward that live at once until the loss is
known, each buffer once, weights and data apart.

Rows are added to DIR/trainers.jsonl; those that are there already are not made again. The exit
status is 1 if a gradient is wrong. Set OMP_NUM_THREADS, and GOMP_SPINCOUNT=100 so that idle threads
are not taken for work.

Examples:
  python -m bench trainers --out output/trainers --smoke
  python -m bench trainers --out output/trainers --trainer sit --batch 8
  python -m bench trainers --out output/trainers --trainer unet --source ../py-meanflow
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import parser
from bench.clock import MIN_CALLS, on_cpu, take_turns
from bench.machine import environment
from bench.networks.given import CPU
from bench.networks.stand_ins import MeanAudio, SiT, UNet
from bench.rows import Row, Rows
from mfmjt import kernels, meanflow
from mfmjt.errors import InputError
from mfmjt.memory import keep_memory

__all__ = ["KEY", "LIMIT", "TRAINERS", "Given", "Trainer", "apart", "counting_saved", "gradients"]
__all__ += ["losses", "main", "measured", "table"]

LIMIT = 1e-5
"""Most that losses and gradients in float32 may be apart, relative to the original's."""
KEY = ("trainer", "network", "batch", "ratio", "provider")
PLAIN, ORIGINAL, WITH, LOSS = "plain", "original", "with", "loss"


@dataclass(frozen=True)
class Given:
    """A network and a batch to train it on.

    Attributes:
        net: The network, called as its trainer calls it.
        x: Clean data `(B, ...)`.
        noise: Noise, likewise.
        r: Ends of the intervals `(B,)`.
        t: Their beginnings `(B,)`.
        intervals: Number of samples with r < t, which come first.
        cond: What else the network takes, by name.
    """

    net: nn.Module
    x: Tensor
    noise: Tensor
    r: Tensor
    t: Tensor
    intervals: int
    cond: dict[str, Tensor]

    @classmethod
    def draw(cls, trainer: Trainer, net: nn.Module, batch: int, ratio: float, small: bool) -> Given:
        """Draw a batch; times are as a logit-normal sampler has them."""
        cond = trainer.conditions(batch, small)
        x = torch.randn(batch, *(trainer.small if small else trainer.shape))
        intervals = round(ratio * batch)
        sampler = meanflow.logit_normal(-0.4, 1.0)
        r, t = meanflow.time_pairs(batch, intervals, sampler, CPU)
        return cls(net, x, torch.randn_like(x), r, t, intervals, cond)

    def path(self) -> tuple[Tensor, Tensor]:
        """Return the state z at t, and dz/dt."""
        t = self.over(self.t)
        return (1 - t) * self.x + t * self.noise, self.noise - self.x

    def over(self, time: Tensor) -> Tensor:
        """Return a time in the shape that multiplies data."""
        return time.view(-1, *(1 for _ in self.x.shape[1:]))


@dataclass(frozen=True)
class Trainer:
    """A trainer: its network, its step as its authors wrote it, and how ours has its gradient.

    Attributes:
        network: Makes the network with random weights, small or at its size.
        shape: Of one sample.
        small: Likewise, for the small network.
        conditions: Draws what else the network takes, of (batch, small).
        velocity: u(z, r, t) by the network, of (net, z, r, t, **cond).
        original: The loss as the trainer computes it, of (given, inside the block or not).
        scale: The original's gradient over that of `meanflow.loss`, of a sample's elements.
        options: Of `meanflow.loss`, likewise of a sample's elements.
        source: Folder, module and class of the network in a clone of the original, and arguments.
    """

    network: Callable[[bool], nn.Module]
    shape: tuple[int, ...]
    small: tuple[int, ...]
    conditions: Callable[[int, bool], dict[str, Tensor]]
    velocity: Callable[..., Tensor]
    original: Callable[[Given, bool], Tensor]
    scale: Callable[[int], float] = lambda elements: 1.0
    options: Callable[[int], dict[str, Any]] = lambda elements: {}
    source: tuple[str, str, str, dict[str, Any]] | None = None

    def ours(self, given: Given) -> Tensor:
        """Return `meanflow.loss` of the same, with the original's gradient."""
        elements = given.x[0].numel()
        loss = meanflow.loss(
            functools.partial(self.velocity, given.net),
            *(given.x, given.cond),
            noise=given.noise,
            r=given.r,
            t=given.t,
            intervals=given.intervals,
            **self.options(elements),
        )
        return self.scale(elements) * loss

    def plain(self, given: Given) -> Tensor:
        """Return the loss of flow matching."""
        z, v = given.path()
        return (self.velocity(given.net, z, given.t, given.t, **given.cond) - v).square().mean()

    def original_network(self, clone: Path) -> nn.Module:
        """Return the network of a clone of the original, which is code that runs here.

        Raises:
            InputError: The clone has no such network, or none is known.
        """
        if self.source is None:
            raise InputError("--source: this trainer's own network is not called. Leave it out.")
        folder, module, name, options = self.source
        path = clone.joinpath(folder, *module.split(".")).with_suffix(".py")
        if not path.exists():
            raise InputError(f"There is no {path}. Give --source a clone of the original.")
        sys.path.insert(0, str(clone / folder))
        try:
            net: nn.Module = getattr(importlib.import_module(module), name)(**options)
        finally:
            sys.path.pop(0)
        for parameter in net.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return net


# py-meanflow: a weight of (sum of squares + c)^-p, p = 3/4, for which ours takes a mean.


def _unet(small: bool) -> nn.Module:
    return UNet(8, width=16, blocks=1, levels=2) if small else UNet()


def _unet_velocity(net: nn.Module, z: Tensor, r: Tensor, t: Tensor, augmentation: Tensor) -> Tensor:
    return net(z, (t, t - r), augmentation)


def _unet_step(given: Given, inside: bool) -> Tensor:
    z, v = given.path()
    r, t = given.over(given.r), given.over(given.t)

    def u(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return given.net(z, (t.view(-1), (t - r).view(-1)), given.cond["augmentation"])

    tangents = v, torch.ones_like(t), torch.zeros_like(r)
    predicted, du_dt, *_ = torch.func.jvp(u, (z, t, r), tangents)
    errors = (predicted - (v - (t - r) * du_dt).detach()).square().sum((1, 2, 3))
    return (errors / (errors.detach() + 1e-3) ** 0.75).mean()


# zhuyu-cs/MeanFlow: the square of a sum of squares, over its own value.


def _sit(small: bool) -> nn.Module:
    return SiT(8, 2, width=32, depth=2, heads=2) if small else SiT()


def _sit_velocity(net: nn.Module, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return net(z, r, t, y=y)


def _sit_step(given: Given, inside: bool) -> Tensor:
    z, v = given.path()
    net = functools.partial(given.net, **given.cond)
    u = net(z, given.r, given.t)
    tangents = v, torch.zeros_like(given.r), torch.ones_like(given.t)
    _, du_dt, *_ = torch.func.jvp(net, (z, given.r, given.t), tangents)
    errors = (u - (v - given.over(given.t - given.r) * du_dt).detach()).square().flatten(1).sum(1)
    return (errors**2 / (errors.detach() ** 2 + 1e-3)).mean()


# MeanAudio: guidance in the target, and a weight of 1 / (mean of squares + c).


def _meanaudio(small: bool) -> nn.Module:
    return MeanAudio(12, 5, width=32, heads=2, joint=2, fused=1) if small else MeanAudio()


def _of_text(batch: int, small: bool) -> dict[str, Tensor]:
    return {"text": torch.randn(batch, 5 if small else 77, 1024), "pooled": torch.randn(batch, 512)}


def _without_text(cond: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value[:1]).expand_as(value) for name, value in cond.items()}


def _meanaudio_velocity(net: nn.Module, z: Tensor, r: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
    return net(latent=z, r=r, t=t, **cond)


def _meanaudio_step(given: Given, inside: bool) -> Tensor:
    z, v = given.path()
    net, r, t = given.net, given.r, given.t
    without = net(latent=z, r=t, t=t, **_without_text(given.cond)).detach()
    guided = 0.3 * v + 0.9 * net(latent=z, r=t, t=t, **given.cond).detach() - 0.2 * without

    def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return net(latent=z, r=r, t=t, **given.cond)

    along = (z, r, t), (guided, torch.zeros_like(r), torch.ones_like(t))
    if inside:
        predicted, du_dt, *_ = torch.func.jvp(u, *along)
    else:
        predicted, du_dt = torch.autograd.functional.jvp(u, *along, create_graph=True)
    errors = (predicted - (guided - given.over(t - r) * du_dt).detach()).square().mean((1, 2))
    return (errors / (errors.detach() + 1e-3)).mean()


# Networks of other libraries, which are called as they are installed, and the paper's own step.


def _installed(package: str) -> Any:
    try:
        from tests.support.peers import load_torchvision

        load_torchvision()  # which diffusers imports
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise InputError(
            f"There is no {error.name}: pip install {package}, or take another."
        ) from None


def _diffusers(small: bool) -> nn.Module:
    options = {"attention_head_dim": 8 if small else 64, "num_attention_heads": 2 if small else 12}
    options |= {"num_layers": 2 if small else 12, "sample_size": 8 if small else 32}
    options |= {"in_channels": 5, "out_channels": 4, "patch_size": 4}
    net: nn.Module = _installed("diffusers").DiTTransformer2DModel(**options).eval()
    return net


def _diffusers_velocity(net: nn.Module, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
    span = (t - r).view(-1, 1, 1, 1).expand_as(z[:, :1])
    return net(torch.cat((z, span), 1), timestep=t, class_labels=y, return_dict=False)[0]


class _Bert(nn.Module):
    """A velocity of embeddings."""

    def __init__(self, small: bool) -> None:
        super().__init__()
        transformers = _installed("transformers")
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        sizes |= {"num_hidden_layers": 2}
        config = transformers.BertConfig(**(sizes if small else {}))
        self.encoder = transformers.BertModel(config, add_pooling_layer=False).eval()
        self.encoder.get_input_embeddings().requires_grad_(False)  # not called
        self.times, self.leave = (nn.Linear(n, config.hidden_size) for n in (2, config.hidden_size))

    def forward(self, z: Tensor, r: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        z = z + self.times(torch.stack((r, t), -1))[:, None]
        found = self.encoder(inputs_embeds=z, attention_mask=mask, return_dict=False)[0]
        return self.leave(found)


def _bert_velocity(net: nn.Module, z: Tensor, r: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    return net(z, r, t, mask)


def _padding(batch: int, small: bool) -> dict[str, Tensor]:
    """Draw lengths, half of all words at least."""
    words = 6 if small else 128
    lengths = torch.randint(words // 2, words + 1, (batch, 1))
    return {"mask": (torch.arange(words) < lengths).long()}


def _paper_step(velocity: Callable[..., Tensor]) -> Callable[[Given, bool], Tensor]:
    """Return the step of arXiv 2505.13447, its algorithm 1, with PyTorch's math attention."""

    def step(given: Given, inside: bool) -> Tensor:
        z, v = given.path()

        def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
            return velocity(given.net, z, r, t, **given.cond)

        tangents = v, torch.zeros_like(given.r), torch.ones_like(given.t)
        with contextlib.nullcontext() if inside else sdpa_kernel(SDPBackend.MATH):
            predicted, du_dt, *_ = torch.func.jvp(u, (z, given.r, given.t), tangents)
        target = (v - given.over(given.t - given.r) * du_dt).detach()
        return (predicted - target).square().mean()

    return step


def _labels(batch: int, small: bool) -> dict[str, Tensor]:
    return {"y": torch.randint(1000, (batch,))}


TRAINERS = {
    "unet": Trainer(
        *(_unet, (3, 32, 32), (3, 8, 8)),
        lambda batch, small: {"augmentation": torch.randn(batch, 6)},
        *(_unet_velocity, _unet_step),
        scale=lambda elements: elements**0.25,
        options=lambda elements: {"p": 0.75, "c": 1e-3 / elements},
        source=(
            *("meanflow", "models.unet", "SongUNet"),
            {
                **{"img_resolution": 32, "in_channels": 3, "out_channels": 3, "augment_dim": 6},
                **{"channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]},
                **{"channel_mult": [2, 2, 2], "dropout": 0.0},
            },
        ),
    ),
    "sit": Trainer(
        *(_sit, (4, 32, 32), (4, 8, 8)),
        _labels,
        *(_sit_velocity, _sit_step),
        scale=lambda elements: 2.0,
        options=lambda elements: {"p": 1.0, "c": 0.0},
        source=("", "sit", "SiT_B_4", {"use_cfg": True, "fused_attn": False, "qk_norm": False}),
    ),
    "meanaudio": Trainer(
        *(_meanaudio, (312, 20), (12, 20), _of_text),
        *(_meanaudio_velocity, _meanaudio_step),
        options=lambda elements: {
            **{"p": 1.0, "c": 1e-3},
            "velocity": meanflow.guided_velocity(0.3, 0.9, _without_text),
        },
    ),
    "diffusers": Trainer(
        *(_diffusers, (4, 32, 32), (4, 8, 8), _labels),
        *(_diffusers_velocity, _paper_step(_diffusers_velocity)),
    ),
    "bert": Trainer(
        *(_Bert, (128, 768), (6, 16), _padding),
        *(_bert_velocity, _paper_step(_bert_velocity)),
    ),
}
BATCH = {"unet": 4, "sit": 16, "meanaudio": 4, "diffusers": 16, "bert": 4}
"""What two cores bear."""
OURS = ("unet", "sit", "meanaudio")
"""Those that need no other package."""


def losses(trainer: Trainer, given: Given) -> dict[str, Callable[[], Tensor]]:
    """Return how to compute the loss, by the name of the provider."""

    def in_block() -> Tensor:
        with kernels.accelerate_jvp():
            return trainer.original(given, True)

    def ours() -> Tensor:
        with kernels.accelerate_jvp():
            return trainer.ours(given)

    return {
        PLAIN: functools.partial(trainer.plain, given),
        ORIGINAL: lambda: trainer.original(given, False),
        WITH: in_block,
        LOSS: ours,
    }


def gradients(given: Given, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Return a loss, and the gradients of all weights in one vector."""
    value = loss()
    weights = [p for p in given.net.parameters() if p.requires_grad]
    return value.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)])


def apart(found: Tensor, right: Tensor) -> float:
    """Return the distance of two tensors over the norm of the second."""
    return float((found - right).norm() / right.norm())


@contextlib.contextmanager
def counting_saved(given: Given) -> Iterator[Callable[[], int]]:
    """Give how to read the most bytes for backward that lived at once inside the block so far.

    Each buffer counts once; weights and data do not.
    """
    data = [*given.net.parameters(), *given.net.buffers(), *given.cond.values(), given.x]
    data += [given.noise, given.r, given.t]
    known = {tensor.untyped_storage()._cdata for tensor in data}
    holders: Counter[int] = Counter()
    now = most = 0

    class Box:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal now, most
            self.tensor = tensor.detach()  # a graph would keep the node that keeps the box
            self.storage = tensor.untyped_storage()
            self.counts = not tensor._is_zerotensor() and self.storage._cdata not in known
            if self.counts:
                now += 0 if holders[self.storage._cdata] else self.storage.nbytes()
                most = max(most, now)
                holders[self.storage._cdata] += 1

        def __del__(self) -> None:
            nonlocal now
            if self.counts:
                holders[self.storage._cdata] -= 1
                now -= 0 if holders[self.storage._cdata] else self.storage.nbytes()

    with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
        yield lambda: most


def measured(trainer: Trainer, given: Given, seconds: float, least: int) -> Iterator[Row]:
    """Yield a row of each provider: how far from the original, saved bytes, times taken in turns.

    A gradient that is wrong gets a row that says so, and nothing is timed.
    """
    ways = losses(trainer, given)
    rows: dict[str, Row] = {name: {"provider": name} for name in ways}
    results = {}
    for name, way in ways.items():
        with counting_saved(given) as most:
            results[name] = gradients(given, way)
        rows[name]["saved_bytes"] = most()
    value, right = results[ORIGINAL]
    rows[WITH]["loss_apart"] = apart(results[WITH][0], value)
    for name in (WITH, LOSS):
        row = rows[name]
        row["gradients_apart"] = apart(results[name][1], right)
        if not max(row["gradients_apart"], row.get("loss_apart", 0.0)) <= LIMIT:
            yield {**row, "status": "wrong"}
            return
    del value, right, results  # of as many numbers as weights
    turns = take_turns(
        {n: on_cpu(functools.partial(gradients, given, way)) for n, way in ways.items()},
        *(seconds, least),
    )
    first = turns[ORIGINAL]
    for name, row in rows.items():
        timing = turns[name]
        yield {
            **row,
            "status": "ok",
            "saved_over_plain": row["saved_bytes"] / rows[PLAIN]["saved_bytes"],
            "faster": first.ms_p50 / timing.ms_p50,
            "cpu_faster": first.cpu_ms_p50 / timing.cpu_ms_p50,
            **vars(timing),
        }


def table(rows: Sequence[Row]) -> str:
    """Return rows as Markdown: times over the original's, CPU and wall, and saved bytes."""
    head = "trainer", "batch", "step", "CPU s", "faster", "by wall time", "saved MB", "over plain"
    lines = [[*head], ["---"] * len(head)]
    for row in rows:
        if row.get("status") != "ok":
            continue
        of_clone = ", its own network" if row["network"] == "source" else ""
        lines.append(
            [
                f"{row['trainer']}{of_clone}",
                str(row["batch"]),
                row["provider"],
                f"{row['cpu_ms_p50'] / 1e3:.3g}",
                f"{row['cpu_faster']:.2f}x",
                f"{row['faster']:.2f}x",
                f"{row['saved_bytes'] / 1e6:.0f}",
                f"{row['saved_over_plain']:.2f}",
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, verify and time; return the exit status."""
    usage = parser("trainers", __doc__, out="", smoke=True)
    known = ", ".join(TRAINERS)
    usage.add_argument(
        "--trainer", action="append", choices=TRAINERS, help=f"{known} [the first three]"
    )
    usage.add_argument("--batch", type=int, help="samples [16 of sit and diffusers, else 4]")
    usage.add_argument("--ratio", type=float, default=0.25, help="share with r < t [0.25]")
    usage.add_argument("--source", type=Path, help="a clone of the original, whose network runs")
    usage.add_argument("--seconds", type=float, default=120.0, help="for each one's times [120]")
    usage.add_argument("--least", type=int, default=MIN_CALLS, help="calls timed [%(default)s]")
    options = usage.parse_args(argv)
    chosen = options.trainer or OURS
    if options.source and (options.smoke or len(chosen) > 1):
        usage.error("--source is of one --trainer at its size, without --smoke")
    keep_memory()  # as training does
    options.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.out / "trainers.jsonl", KEY)
    rows.add({"what": "environment", **environment(CPU)})
    for name in chosen:
        trainer, batch = TRAINERS[name], options.batch or BATCH[name]
        kind = "source" if options.source else "small" if options.smoke else "stand-in"
        about = {"trainer": name, "network": kind, "batch": batch, "ratio": options.ratio}
        if rows.has(**about, provider=LOSS):
            continue
        torch.manual_seed(0)
        source = options.source
        net = trainer.original_network(source) if source else trainer.network(options.smoke)
        given = Given.draw(trainer, net, batch, options.ratio, options.smoke)
        print(f"{name}: batch {batch}, {given.intervals} samples with r < t", flush=True)
        seconds = 0.0 if options.smoke else options.seconds
        for row in measured(trainer, given, seconds, options.least):
            rows.add({**about, **row})
    print(table(rows.rows))
    return int(any(row.get("status") == "wrong" for row in rows.rows))
