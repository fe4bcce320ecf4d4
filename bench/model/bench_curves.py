"""Whether a network learns the same with our kernels as with plain PyTorch: curves of both.

nano is trained from each of some seeds, once with our ops and once inside `kernels.reference()`, on
the same clips, draws and weights. Both errors of every stretch of steps are compared, of rows with
r = t and of those with r < t. At each stretch the references of all seeds span a range; ours is the
same curve if it is no farther from the reference of its own seed than that range is wide.

The procedural clips go through the codec and the encoders that ship, once; --store keeps their
features. DIR/curves.jsonl and DIR/curves.svg are written anew; the exit status is 1 if a curve is
another. Set OMP_NUM_THREADS.

    python -m bench.model.bench_curves --out /tmp/curves
    python -m bench.model.bench_curves --out /tmp/curves --smoke
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.machine import environment
from bench.rows import Rows
from mfmjt import kernels
from mfmjt.codec import NanoCodec
from mfmjt.encoders import NanoEncoders
from mfmjt.features.procedural import write_store
from mfmjt.kernels import _native
from mfmjt.train.recipe import NetworkTraining
from mfmjt.train.tasks.network import train_network

__all__ = ["ERRORS", "PROVIDERS", "judged", "main"]

PRETRAINED = Path(kernels.__file__).parents[1] / "pretrained" / "nano"
PROVIDERS = ("mfmjt", "reference")
ERRORS = ("flow", "interval")
SEEDS = (0, 1, 2)
CLIPS = 48
TINY = {"hidden_dim": 32, "num_heads": 1, "depth": 2, "fused_depth": 1}
COLOURS = ("#0072B2", "#D55E00", "#009E73")

Row = dict[str, Any]


def recipe(folder: Path, store: Path, seed: int, steps: int, tiny: bool) -> NetworkTraining:
    """Nano's recipe with a batch for one core."""
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
    """Train; the log's records of training."""
    with kernels.reference() if provider == "reference" else contextlib.nullcontext():
        if not train_network(config).finished:
            raise SystemExit("Stopped: a curve that ends early is compared with none.")
    lines = (Path(config.out) / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record.get("kind") == "train"]


def judged(rows: list[Row]) -> list[Row]:
    """The largest distance of ours from the reference of its seed, over the range of the seeds.

    Args:
        rows: Records with `provider`, `seed`, `step` and the errors.
    """
    at = {(row["provider"], row["seed"], row["step"]): row for row in rows}
    steps = sorted({row["step"] for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    found = []
    for error in ERRORS:
        shares, distances = [], []
        for step in steps:
            reference = [at["reference", seed, step][error] for seed in seeds]
            spread = max(reference) - min(reference)
            far = max(
                abs(at["mfmjt", seed, step][error] - value)
                for seed, value in zip(seeds, reference, strict=True)
            )
            shares.append(far / spread if spread else math.inf if far else 0.0)
            distances.append(far)
        found.append(
            {
                "what": "bar",
                "bar": f"{error} error: distance from the reference over the spread of seeds",
                "limit": "<= 1",
                "value": max(shares),
                "largest_distance": max(distances),
                "met": max(shares) <= 1,
            }
        )
    return found


def plot(rows: list[Row], path: Path) -> None:
    """Both errors over steps: the references as bands of light, ours as lines on them."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8, 3), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, len(ERRORS), sharey=True)
        for axis, error, title in zip(axes, ERRORS, ("r = t", "r < t"), strict=True):
            for seed, colour in zip(sorted({row["seed"] for row in rows}), COLOURS, strict=False):
                for provider in reversed(PROVIDERS):
                    line = [r for r in rows if (r["provider"], r["seed"]) == (provider, seed)]
                    wide = provider == "reference"
                    axis.plot(
                        [r["step"] for r in line],
                        [r[error] for r in line],
                        color=colour,
                        linewidth=4 if wide else 1,
                        alpha=0.3 if wide else 1,
                        label=f"{'PyTorch' if wide else 'mfmjt'}, seed {seed}",
                    )
            axis.set(title=f"error of rows with {title}", xlabel="step")
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        axes[-1].legend(frameon=False, fontsize=7)
        figure.savefig(path, metadata={"Date": None})


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, train, compare; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.model.bench_curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--store", type=Path, help="folder of features to make or use [temporary]")
    parser.add_argument("--steps", type=int, default=300, help="of each training [300]")
    parser.add_argument("--smoke", action="store_true", help="everything tiny, to see it run")
    options = parser.parse_args(argv)
    steps, clips = (12, 4) if options.smoke else (options.steps, CLIPS)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "curves.jsonl"
    path.unlink(missing_ok=True)
    rows = Rows(path)
    stamp = environment(torch.device("cpu")) | {"extension": _native.status(), "steps": steps}
    rows.add({"what": "environment", "smoke": options.smoke, **stamp})
    records: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        store = options.store or Path(scratch) / "store"
        codec = NanoCodec.load(PRETRAINED / "codec.safetensors")
        encoders = NanoEncoders.load(PRETRAINED / "encoders.safetensors")
        write_store(store, {"train": clips}, codec, encoders, workers=0)
        for seed in SEEDS:
            for provider in PROVIDERS:
                began = time.process_time()
                folder = Path(scratch) / f"{provider}-{seed}"
                config = recipe(folder, store, seed, steps, options.smoke)
                about = {"what": "curve", "provider": provider, "seed": seed}
                found = [
                    about | {key: record[key] for key in ("step", *ERRORS, "grad_norm")}
                    for record in curve(config, provider)
                ]
                for row in found:
                    rows.add(row)
                records += found
                spent = time.process_time() - began
                print(f"{provider}, seed {seed}: {spent:.0f} s of CPU time", flush=True)
    bars = judged(records)
    for bar in bars:
        rows.add(bar)
        word = "pass" if bar["met"] else "MISS"
        print(f"{word}  {bar['bar']}: {bar['value']:.3g} ({bar['limit']})")
    plot(records, options.out / "curves.svg")
    return int(not all(bar["met"] for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
