"""A listening test as one HTML page that needs no server: blind, in random order, also on a phone.

The page knows sounds by numbers. Which system made which stands in a second file, the key, which
listeners do not get and the analysis needs.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import mimetypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mfmjt.errors import InputError, reason, some
from mfmjt.extract.tables import MEDIA, records
from mfmjt.files import atomic_path

__all__ = ["FORMAT", "KINDS", "QUESTIONS", "Built", "build", "key_of"]

FORMAT = 1
KINDS = ("preference", "rating", "abx")
QUESTIONS = {
    "preference": "Which sound fits better?",
    "rating": "How good is each sound? 0 is bad, 100 is perfect.",
    "abx": "Is X the same recording as A or as B?",
}
PICTURES = {".mp4", ".webm"}  # files that browsers show as they are
LARGEST = 200  # MB of a page that phones still open
_TEMPLATE = Path(__file__).with_name("page.html")


class Built:
    """What `build` wrote.

    Attributes:
        page: The HTML file.
        key: The JSON file that says which system made what.
        trials: Questions on the page.
        clips: Names of the clips in it.
        missing: For each system, the names that others have and it lacks.
    """

    def __init__(
        self, page: Path, key: Path, trials: int, clips: list[str], missing: dict[str, list[str]]
    ) -> None:
        self.page, self.key, self.trials = page, key, trials
        self.clips, self.missing = clips, missing


def key_of(page: Path) -> Path:
    """Return where the key of a page is."""
    return page.with_suffix(".key.json")


def build(
    systems: Mapping[str, str | os.PathLike[str]],
    out: str | os.PathLike[str],
    kind: str = "preference",
    *,
    clips: int = 20,
    most: int = 40,
    captions: str | os.PathLike[str] | None = None,
    reference: str | None = None,
    question: str | None = None,
    seed: int = 0,
) -> Built:
    """Write the page of a listening test, and its key.

    Args:
        systems: Name of each system and its folder of sounds or videos; files are paired by their
            names without the suffix. Files that a browser shows (.mp4, .webm) go in as they are,
            all others as 16-bit FLAC.
        out: The page, `.html`; the key is beside it, `.key.json`.
        kind: `preference`: two sounds, which is better, or neither. `rating`: all sounds of a clip,
            each from 0 to 100 (after ITU-R BS.1534). `abx`: whether two can be told apart at all.
        clips: Clips in the test, drawn with the seed.
        most: Questions that one listener gets, drawn anew for each.
        captions: Table with the columns `id` (or `name`) and `caption`, shown above the sounds.
        reference: The system whose sound is also shown as what the others should be like
            (`rating`): among the others, unnamed, it is judged as well.
        question: What to ask, in place of the usual words.
        seed: Decides the clips, the order and the numbers of the sounds.

    Raises:
        InputError: Fewer than two systems, an unknown kind or reference, a folder without sounds,
            no name that all have, a file that cannot be read, or a page too large for a phone.
        RunError: The page cannot be written.
    """
    page = Path(out)
    _check(systems, page, kind, reference, clips, most)
    files = {name: _sounds(name, Path(folder)) for name, folder in systems.items()}
    every = sorted(set().union(*files.values()))
    common = [name for name in every if all(name in own for own in files.values())]
    if not common:
        raise InputError(
            "No clip is in every folder: files are paired by their names without the suffix, and "
            + "; ".join(f"{name} has {some(own, most=2, each=40)}" for name, own in files.items())
            + ". Rename them."
        )
    rng = np.random.default_rng(seed)
    chosen = sorted(common[i] for i in rng.permutation(len(common))[:clips])
    told = _captions(Path(captions)) if captions is not None else {}
    numbers = itertools.count(1)
    order = [(clip, name) for clip in chosen for name in systems]
    number_of = {order[i]: f"s{next(numbers)}" for i in rng.permutation(len(order))}
    media = {number_of[c, n]: _medium(files[n][c]) for c, n in order}
    trials: list[dict[str, Any]] = []
    key: dict[str, Any] = {}
    for clip, names in _questions(kind, chosen, list(systems)):
        shown = [names[i] for i in rng.permutation(len(names))]
        trial: dict[str, Any] = {
            "id": f"q{len(trials) + 1}",
            "sounds": [number_of[clip, name] for name in shown],
            "caption": told.get(clip, ""),
        }
        if reference is not None:
            trial["reference"] = number_of[clip, reference]
        trials.append(trial)
        key[trial["id"]] = {"clip": clip, "systems": shown, "sounds": trial["sounds"]}
    test = {
        "format": FORMAT,
        "kind": kind,
        "question": question or QUESTIONS[kind],
        "most": most,
        "trials": trials,
    }
    # What is asked and heard, and nothing else, is what makes a page another page.
    content = json.dumps([test, media], sort_keys=True).encode()
    test["id"] = hashlib.sha256(content).hexdigest()[:16]
    html = (
        _TEMPLATE.read_text("utf-8")
        .replace("/*TEST*/null", _script(test))
        .replace("/*MEDIA*/null", _script(media))
    )
    if len(html) > LARGEST * 1e6:
        raise InputError(
            f"The page would have {len(html) / 1e6:.0f} MB, and phones open at most {LARGEST}. "
            "Lower --clips, or give shorter or compressed files."
        )
    answers = {"format": FORMAT, "id": test["id"], "kind": kind, "systems": list(systems)}
    answers |= {"reference": reference, "trials": key}
    for path, text in ((key_of(page), json.dumps(answers, indent=1) + "\n"), (page, html)):
        with atomic_path(path) as part:
            part.write_text(text, "utf-8")
    missing = {name: [clip for clip in every if clip not in own] for name, own in files.items()}
    return Built(page, key_of(page), len(trials), chosen, {k: v for k, v in missing.items() if v})


def _check(
    systems: Mapping[str, Any], page: Path, kind: str, reference: str | None, clips: int, most: int
) -> None:
    if kind not in KINDS:
        raise InputError(f"Unknown kind {kind!r} of test: there are {', '.join(KINDS)}. Give one.")
    if len(systems) < 2:
        raise InputError(
            f"{len(systems)} system given: a test compares at least two. Give NAME=FOLDER for each."
        )
    if reference is not None and (reference not in systems or kind != "rating"):
        raise InputError(
            f"The reference {reference!r} must be one of the systems, {some(systems)}, in a test "
            "of kind rating. Name one, or leave it out."
        )
    if page.suffix != ".html":
        raise InputError(f"The page {page} must end in .html. Give such a name.")
    if clips < 1 or most < 1:
        raise InputError(
            f"{clips} clips and {most} questions: there must be at least one. Give larger numbers."
        )


def _sounds(name: str, folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder} of {name}. Give one with its sounds.")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in MEDIA and p.is_file())
    if not found:
        raise InputError(f"{folder} of {name} holds no sounds. Give a folder with some.")
    named: dict[str, Path] = {}
    for path in found:
        if path.stem in named:
            raise InputError(
                f"{folder} has two files called {path.stem}: {named[path.stem].name} and "
                f"{path.name}. Keep one."
            )
        named[path.stem] = path
    return named


def _captions(table: Path) -> dict[str, str]:
    rows = [{key: str(value or "") for key, value in row.items()} for row in records(table)]
    named = {r.get("id") or r.get("name") or "": r.get("caption", "") for r in rows}
    if not any(named.values()):
        raise InputError(f"{table} has no column caption with text in it. Give one, or no table.")
    return named


def _questions(
    kind: str, clips: Sequence[str], systems: Sequence[str]
) -> list[tuple[str, tuple[str, ...]]]:
    if kind == "rating":
        return [(clip, tuple(systems)) for clip in clips]
    return [(clip, pair) for clip in clips for pair in itertools.combinations(systems, 2)]


def _medium(path: Path) -> str:
    """Return a file as a data URI."""
    if path.suffix.lower() in PICTURES:
        data, mime = path.read_bytes(), mimetypes.guess_type(path.name)[0] or "video/mp4"
    else:
        data, mime = _flac(path), "audio/flac"
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _flac(path: Path) -> bytes:
    import soundfile

    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise InputError(
            f"{path} cannot be read: {reason(error)}. Give WAV, FLAC, Ogg or MP3, or .mp4 and "
            ".webm with pictures."
        ) from error
    if samples.size == 0 or not np.isfinite(samples).all():
        raise InputError(f"{path} holds no samples, or some that are not finite. Replace the file.")
    stream = io.BytesIO()
    soundfile.write(stream, samples.clip(-1, 1), rate, format="FLAC", subtype="PCM_16")
    return stream.getvalue()


def _script(value: Any) -> str:
    """Return JSON that cannot end the script element it stands in."""
    return json.dumps(value).replace("<", "\\u003c")
