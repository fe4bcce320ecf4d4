"""`python -m mfmjt.evaluate`: the whole table of a model, where only torch is installed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mfmjt.data import foley
from mfmjt.errors import MfmjtError
from mfmjt.evaluate.experiment import examples, generate, load_parts, suite, table
from mfmjt.evaluate.plots import plot_gallery, plot_steps


def main(arguments: list[str] | None = None) -> int:
    """Run the suite, print the table and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mfmjt.evaluate", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the reports and the table")
    parser.add_argument("--model", default="nano", help="a model that ships, or a folder")
    parser.add_argument("--flow", type=Path, help="flow-matching network of the same size")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 25])
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--mode", default="cfg_scaled", help="cfg_scaled, cfg or none")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", action="store_true", help="also draw steps.svg and gallery.svg")
    given = parser.parse_args(arguments)

    def progress(stage: str, done: float) -> None:
        sys.stderr.write(f"{stage} {done:.0%}\n")

    try:
        parts = load_parts(given.model, device=given.device)
        flow = load_parts(given.model, given.flow, given.device) if given.flow else None
        reports = suite(
            parts,
            flow,
            given.out,
            clips=given.clips,
            seed=given.seed,
            steps=given.steps,
            guidance=given.guidance,
            mode=given.mode,
            batch=given.batch,
            progress=progress,
        )
        if given.plot:
            plot_steps(reports, given.out / "steps.svg")
            shown = examples(parts.encoders, len(foley.CLASSES), given.seed)
            options = {"guidance": given.guidance, "mode": given.mode, "seed": given.seed}
            plot_gallery(shown, generate(parts, shown, **options), given.out / "gallery.svg")
    except MfmjtError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130
    sys.stdout.write(table(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
