"""Compare what a network learns with our kernels and with plain PyTorch, as curves.

nano is trained from each of some seeds, once with our ops and once inside `kernels.reference()`, on
the same clips, draws and weights. Both errors of every stretch of steps are compared, of rows with
r = t and of those with r < t. At each stretch the references of all seeds span a range; ours is the
same curve if it is no farther from the reference of its own seed than that range is wide.

The procedural clips go through the codec and the encoders that ship, once; --store keeps their
features. DIR/curves.jsonl and DIR/curves.svg are written anew; the exit status is 1 if a curve is
another. Set OMP_NUM_THREADS.

Examples:
  python -m bench curves --out /tmp/curves
  python -m bench curves --out /tmp/curves --smoke
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pandas

from bench import parser
from bench.case import TINY
from bench.networks.given import Target, hold, start
from bench.rows import Row, read
from mfmjt import kernels
from mfmjt.codec import NanoCodec
from mfmjt.encoders import NanoEncoders
from mfmjt.errors import RunError
from mfmjt.features.procedural import write_store
from mfmjt.plotting import COLORS, figure
from mfmjt.train.recipe import NetworkTraining
from mfmjt.train.tasks.network import train_network

__all__ = ["ERRORS", "PROVIDERS", "SEEDS", "TARGETS", "distances", "main"]

PRETRAINED = Path(kernels.__file__).parents[1] / "pretrained" / "nano"
PROVIDERS = ("mfmjt", "reference")
ERRORS = ("flow", "interval")
SEEDS = (0, 1, 2)
CLIPS = 48
TARGETS = tuple(
    Target(
        f"{error} error: distance from the reference over the spread of seeds",
        *("<=", 1.0, "over_spread", {"error": error}),
    )
    for error in ERRORS
)


def recipe(folder: Path, store: Path, seed: int, steps: int, tiny: bool) -> NetworkTraining:
    """Return nano's recipe with a batch for one core."""
    return NetworkTraining(
        out=str(folder),
        store=str(store),
        codec=None,
        encoders=str(PRETRAINED / "encoders.safetensors"),
        overrides=TINY if tiny else {},
        seed=seed,
        steps=steps,
        batch=4,
        window=20,
        full_every=0,
        lr=5e-4,  # at 2e-3 errors leap, and roundings grow until seeds do not matter
        warmup=steps // 3,
        ratio=0.5,
        one_step=0.25,
        time_mean=0.0,
        time_std=1.6,
        log_every=max(1, steps // 15),
        checkpoint_every=steps,
        validate_every=0,
        preview_every=0,
        tensorboard=False,
    )


def curve(config: NetworkTraining, provider: str) -> list[Row]:
    """Train; return the log's records of training.

    Raises:
        RunError: It was stopped.
    """
    with kernels.reference() if provider == "reference" else contextlib.nullcontext():
        if not train_network(config).finished:
            raise RunError("Stopped: a curve that ends early is compared with none.")
    return [row for row in read(Path(config.out) / "log.jsonl") if row.get("kind") == "train"]


def distances(rows: list[Row]) -> list[Row]:
    """Return the largest distance of ours from the reference of its seed, by error.

    `over_spread` is the largest one over the range of the references of all seeds at that step.

    Args:
        rows: Records with `provider`, `seed`, `step` and the errors.
    """
    frame = pandas.DataFrame(rows)
    result = []
    for error in ERRORS:
        curves = frame.pivot(index=["step", "seed"], columns="provider", values=error)
        far = (curves["mfmjt"] - curves["reference"]).abs().groupby("step").max()
        references = curves["reference"].groupby("step")
        over = (far / (references.max() - references.min())).fillna(0.0)  # nothing over no range
        worst = {"over_spread": float(over.max()), "largest_distance": float(far.max())}
        result.append({"what": "distance", "error": error, **worst})
    return result


def plot(rows: list[Row], path: Path) -> None:
    """Plot both errors over steps: the references as bands of light, ours as lines on them."""
    lines = pandas.DataFrame(rows).groupby(["provider", "seed"])
    looks = {"reference": ("PyTorch", 4, 0.3), "mfmjt": ("mfmjt", 1, 1.0)}
    with figure(path, (8, 3)) as drawn:
        axes = drawn.subplots(1, len(ERRORS), sharey=True)
        for axis, error, title in zip(axes, ERRORS, ("r = t", "r < t"), strict=True):
            for seed, color in zip(SEEDS, COLORS, strict=False):
                for provider, (name, width, alpha) in looks.items():
                    line, look = lines.get_group((provider, seed)), {"color": color, "alpha": alpha}
                    label = f"{name}, seed {seed}"
                    axis.plot(line["step"], line[error], linewidth=width, label=label, **look)
            axis.set(title=f"error of rows with {title}", xlabel="step")
            axis.grid(alpha=0.3)
        axes[-1].legend(fontsize=7)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, train, compare; return the exit status."""
    usage = parser("curves", __doc__, out="", smoke=True)
    usage.add_argument("--store", type=Path, help="folder of features to make or use [temporary]")
    usage.add_argument("--steps", type=int, default=300, help="of each training [300]")
    options = usage.parse_args(argv)
    steps, clips = (12, 4) if options.smoke else (options.steps, CLIPS)
    rows = start(options.out / "curves.jsonl", steps=steps, smoke=options.smoke)
    with tempfile.TemporaryDirectory() as scratch:
        store = options.store or Path(scratch) / "store"
        codec = NanoCodec.load(PRETRAINED / "codec.safetensors")
        encoders = NanoEncoders.load(PRETRAINED / "encoders.safetensors")
        write_store(store, {"train": clips}, codec, encoders, workers=0)
        for seed in SEEDS:
            for provider in PROVIDERS:
                began = time.process_time()
                folder = Path(scratch) / f"{provider}-{seed}"
                about = {"what": "curve", "provider": provider, "seed": seed}
                for row in curve(recipe(folder, store, seed, steps, options.smoke), provider):
                    rows.add(about | {key: row[key] for key in ("step", *ERRORS, "grad_norm")})
                spent = time.process_time() - began
                print(f"{provider}, seed {seed}: {spent:.0f} s of CPU time", flush=True)
    curves = rows.rows[1:]
    for row in distances(curves):
        rows.add(row)
    plot(curves, options.out / "curves.svg")
    return hold(rows.rows, TARGETS)
