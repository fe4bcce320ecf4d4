"""The page of an experiment, from the files of its results and from nothing else.

`python -m mfmjt.experiment.page RESULTS PAGES` writes the pages of all experiments whose results
are in folders of RESULTS, with their plots.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mfmjt.errors import InputError, MfmjtError, reason
from mfmjt.experiment.base import Claim, Experiment, Row
from mfmjt.experiment.grid import NAMES, load_experiment
from mfmjt.experiment.measures import MEASURES, cell, compared, describe, value
from mfmjt.files import atomic_path

__all__ = ["ABOUT", "PROBES", "ROWS", "read_rows", "write_page"]

ABOUT, ROWS, PROBES = "experiment.json", "rows.jsonl", "probes.jsonl"
_INTERVALS = (
    "Every figure is a mean over seeds with its 95 % interval. For onset F1, class and cosine both "
    "seeds and clips are resampled; IS, Fréchet and RTF are figures of a whole set, whose interval "
    "is Student's over the seeds alone. Differences are paired by seed and clip. IS, Fréchet and "
    "class are of the classifier that ships with `nano`, and distances of so few clips are "
    "comparable within this page only. `cosine` is the cosine of its embeddings of the sound and "
    "of the clip's own sound, in place of ImageBind's score. RTF is CPU time of one thread, or "
    "time on a GPU, over the sound's duration: network and decoder, features apart."
)


def read_rows(path: Path) -> list[Row]:
    """Read a file of rows; one that is not there has none.

    Raises:
        InputError: It is damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read {path}: {reason(error)}. Run the experiment.") from error


def write_page(results: Path, path: Path) -> Path:
    """Write the page of the results in a folder, and its plots beside it; return the page.

    Raises:
        InputError: There are no results, or of too few seeds.
    """
    try:
        about = json.loads((results / ABOUT).read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"Cannot read {results / ABOUT}: {reason(error)}. Run mfmjt experiment NAME."
        ) from error
    rows, probes = read_rows(results / ROWS), read_rows(results / PROBES)
    experiment = load_experiment(about["experiment"])
    drawn = experiment.draw(rows, probes, path.parent)
    with atomic_path(path) as temporary:
        temporary.write_text(_page(experiment, about, rows, probes, drawn, results, path))
    return path


def _page(
    experiment: Experiment,
    about: dict[str, Any],
    rows: list[Row],
    probes: list[Row],
    drawn: dict[str, str],
    results: Path,
    path: Path,
) -> str:
    size = "the quick grid" if about["quick"] else "the full grid"
    count = f"{len(about['arms'])} networks" if len(about["arms"]) > 1 else "one network"
    network, judged = about["network"], len(rows[0]["clips"]["right"])
    quick = " --quick" if about["quick"] else ""
    recipe = "" if about["recipe"] == "pico" else f" --recipe {about['recipe']}"
    command = f"mfmjt experiment {about['experiment']}{quick}{recipe} --seeds {about['seeds']}"
    parts = [f"# {experiment.title}", experiment.question, "## Method", experiment.method]
    parts.append(
        f"These are results of {size} of `{about['recipe']}`: {count} with "
        f"{about['seeds']} seeds each, {network['steps']} steps of {network['batch']} windows of "
        f"{network['window']} latents from {about['data']['clips']} clips, judged on "
        f"{judged} validation clips of 8 s. {_INTERVALS}"
    )
    parts += ["## Result"]
    if experiment.claims:
        parts.append(_claims(experiment.claims, rows))
    parts += [f"![{caption}]({name})\n\n{caption}" for name, caption in drawn.items()]
    parts.append(_table(rows))
    if told := experiment.told(probes):
        parts.append(told)
    parts += ["## What it does not show", experiment.limits]
    if about["quick"]:
        parts.append(
            "The quick grid trains for seconds, and its networks are far from trained. It shows "
            "that the experiment runs and which large effects are there at once; a difference that "
            "is undecided here may well exist, and one that is not may be of the first steps only."
        )
    folder = Path(os.path.relpath(results, path.parent))
    files = [name for name in (ROWS, PROBES, ABOUT) if (results / name).exists()]
    listed = ", ".join(f"[{name}]({(folder / name).as_posix()})" for name in files)
    parts += [
        "## Again",
        f"```bash\n{command}\n```",
        f"The networks took {about['training_core_minutes']} core-minutes of training on "
        f"{about['cpu']}. On this kind of CPU the rows, less what is timed, have the digest "
        f"`{about['digest']}`.",
        f"Files: {listed}. This page and its plots are made of them.",
    ]
    return "\n\n".join(parts) + "\n"


def _claims(claims: Sequence[Claim], rows: list[Row]) -> str:
    lines = ["| claim | measure | difference | |", "|---|---|---|---|"]
    for claim in claims:
        of = next(m for m in MEASURES if m.key == claim.measure)
        difference = compared(cell(rows, claim.better), cell(rows, claim.worse), of)
        verdict = describe(of, difference)
        text = difference.text(of.digits)
        lines.append(f"| {claim.says} | {of.title} | {text} | {verdict} |")
    lines += [
        "",
        "The difference is of the two cells that the claim names, first less second. A claim "
        "holds, or does not, where its interval leaves 0 out; claims are judged one by one, "
        "without a correction for their number.",
    ]
    return "\n".join(lines)


def _table(rows: list[Row]) -> str:
    """Return a row for each cell, with the keys that tell cells apart."""
    keys = ["arm", "steps", "guidance", "mode", "conditions"]
    told = [k for k in keys if k == "arm" or len({row[k] for row in rows}) > 1]
    cells = dict.fromkeys(tuple(row[k] for k in keys) for row in rows)
    heads = [*("network" if k == "arm" else k for k in told), *(m.title for m in MEASURES)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for values in cells:
        wanted = dict(zip(keys, values, strict=True))
        own = cell(rows, wanted)
        figures = [value(own, of).text(of.digits) for of in MEASURES]
        lines.append(f"| {' | '.join([*(str(wanted[k]) for k in told), *figures])} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Write all pages and return the exit status."""
    if len(arguments) != 2:
        sys.stderr.write(__doc__ or "")
        return 2
    results, pages = (Path(text) for text in arguments)
    try:
        pages.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            if (results / name / ABOUT).exists():
                write_page(results / name, pages / f"{name}.md")
    except MfmjtError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
