"""`score`: from two folders to every number."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mfmjt.devices import choose_device
from mfmjt.errors import InputError, some
from mfmjt.evaluate.examples import silent
from mfmjt.evaluate.listening import LISTENERS, Networks, Unheard
from mfmjt.evaluate.metrics import PUBLISHED, Metric, Score, choose_metrics
from mfmjt.evaluate.metrics.base import by_class
from mfmjt.evaluate.report import environment
from mfmjt.evaluate.scoring.benchmark import benchmark_pairs
from mfmjt.evaluate.scoring.pairing import Listing, Problem, Protocol, pair
from mfmjt.evaluate.scoring.reading import LONGEST, length
from mfmjt.evaluate.scoring.result import Result
from mfmjt.evaluate.scoring.sounds import Files, Given, Side
from mfmjt.evaluate.scoring.work import Done, Job, listen_to_all, processes
from mfmjt.progress import Progress

__all__ = ["CACHE", "PROTOCOLS", "score"]

PROTOCOLS = ("default", "av-benchmark")
CACHE = Path("~/.cache/mfmjt/score")
"""Where features are kept unless another folder is given."""
BENCHMARK_SECONDS = 8.0
WATCHING = {"ib", "desync"}
"""Metrics that need videos."""


def score(
    generated: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None,
    captions: str | os.PathLike[str] | None = None,
    videos: str | os.PathLike[str] | None = None,
    metrics: Sequence[str | Metric] | None = None,
    weights: str | os.PathLike[str] | None = None,
    protocol: Protocol = "default",
    *,
    seconds: float | None = None,
    check: str = "digest",
    cache: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> Result:
    """Score generated sounds against real ones, whatever system made them.

    Features are kept in `cache` under the digests of sounds and weights: a second run, or one that
    goes on after the first was killed, computes only what is not there, and gives the same bits.

    Args:
        generated: Folder of sounds, or a table with the columns `id`, `generated` and, as far as
            they are known, `reference`, `caption`, `class`, `events` and `video`.
        reference: Folder or table of the real sounds, which are paired by their names; None where
            the first table names them.
        captions: Table with the columns `id` (or `name`) and `caption`, `class` or `events`.
        videos: Folder of the videos, by name.
        metrics: Names of metrics, or of families such as `fd`, or metrics of your own; None takes
            all that can be computed.
        weights: Folder with the published weights. A metric whose weights are not there is left
            out, and `Result.left_out` says why.
        protocol: `default`: one set of clips for all metrics, all of one length. `av-benchmark`:
            that tool's choices, and its feature caches.
        seconds: Judged of each clip, from its beginning; a shorter clip is not scored. None takes
            the commonest length of the generated clips, at most 10, and 8 for `av-benchmark`.
        check: `digest` takes published weights alone, `name` any file of that name.
        cache: Folder of the features, made if missing; by default `~/.cache/mfmjt/score`.
        workers: Processes that compute features; None starts one for each CPU, at most 8.
        device: Where the networks compute: `cpu`, `cuda` or `cuda:N`; None takes CUDA where there
            is one.
        progress: Called as (stage, fraction done), with the stages `find`, `listen`, `watch`,
            `measure`.

    Returns:
        The figures, what they are made of, and what was left out.

    Raises:
        InputError: Nothing can be scored, or an argument is none; the message says what to do.
        RunError: A process ended before its work.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"No protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}.")
    if seconds is not None and not 0 < seconds <= 3600:
        raise InputError(f"{seconds:g} s of each clip cannot be judged: give more than 0 s.")
    wanted = _chosen(metrics)
    networks = Networks(weights, check, choose_device(device))
    progress("find", 0.0)
    listing = pair(generated, reference, captions, videos, protocol)
    benchmark = protocol == "av-benchmark"
    seconds = seconds or (BENCHMARK_SECONDS if benchmark else _commonest(listing))
    folders = [
        Path(source) if benchmark else None for source in (generated, reference or generated)
    ]
    made = Side("generated", listing.generated, folders[0])
    real = Side("reference", listing.reference, folders[1])
    if not benchmark:
        made.files = {name: made.files[name] for name, _ in listing.pairs}
        real.files = {name: real.files[name] for _, name in listing.pairs}
    shown = {name: listing.known.get(name, {}).get("video") for name in real.files}
    watched = Side("video", {name: path for name, path in shown.items() if path}, folders[1])
    sides = (made, real, watched)
    own = tuple(metric for metric in wanted if metric not in PUBLISHED)
    result = Result(protocol, 0, seconds, problems=listing.problems, own=own)
    needs = _find(wanted, listing, sides, networks, result)
    wanted = [metric for metric in wanted if metric.name not in result.left_out]
    if wanted:
        job = Job(
            str(Path(cache or CACHE).expanduser()),
            needs["sounds"],
            None if networks.folder is None else str(networks.folder),
            check,
            seconds,
            benchmark,
            str(networks.device),
        )
        _listen(job, (made, real), workers, result, partial(progress, "listen"))
        watching = replace(job, networks=needs["videos"], videos=True)
        if watching.networks:
            _listen(watching, (watched,), workers, result, partial(progress, "watch"))
        _drop(listing, sides, wanted)
        _measure(wanted, listing, sides, networks, result, progress)
    if not result.figures:
        told = some(dict.fromkeys(result.left_out.values()), " ", most=3, each=250)
        raise InputError(f"No metric can be computed. {told}")
    result.environment = environment(networks.device)
    return result


def _chosen(names: Sequence[str | Metric] | None) -> list[Metric]:
    """Return the metrics that are named; all where there are no names."""
    if names is None:
        return list(PUBLISHED)
    found = choose_metrics(names, PUBLISHED)
    if not found:
        raise InputError("No metric was chosen. Name one, or leave the choice out for all.")
    return found


def _commonest(listing: Listing) -> float:
    """Return the length that most generated clips have, in steps of 0.1 s, at most 10 s."""
    lengths = [length(path) for path in listing.generated.values() if path is not None]
    # A frame of a codec may lack: 7.98 s are meant to be 8.
    steps = Counter(round(min(told, LONGEST) * 10) for told in lengths if told > 0)
    if not steps or not (most := max(steps, key=lambda step: (steps[step], step))):
        raise InputError(
            f"None of the {len(listing.generated):,} generated sounds can be read, or all are "
            "shorter than 0.1 s. Give files that play."
        )
    return most / 10


def _find(
    wanted: Sequence[Metric],
    listing: Listing,
    sides: Sequence[Side],
    networks: Networks,
    result: Result,
) -> dict[str, dict[str, str]]:
    """Return the networks for `sounds` and for `videos`, with the digests of their weights.

    Metrics that cannot be computed go to `result.left_out`.
    """
    given = Given.of([listing.known.get(name, {}) for _, name in listing.pairs])
    *sounds, videos = sides
    needed: dict[str, dict[str, str]] = {"sounds": {}, "videos": {}}
    for metric in wanted:
        digests: dict[str, dict[str, str]] = {"sounds": {}, "videos": {}}
        try:
            if why := _unknown(metric, given, videos):
                raise Unheard(why)
            for name in metric.needs:
                # av-benchmark keeps no such features of real sounds, and they are not essential.
                essential = sounds[:1] if metric.name in {*WATCHING, "clap"} else sounds
                wanting = set() if all(side.has_cache(name) for side in essential) else {"sounds"}
                if metric.name in WATCHING and not videos.has_cache(name, "video"):
                    wanting.add("videos")
                if metric.name == "clap" and not videos.has_cache(name, "text"):
                    wanting.add("captions")
                if not wanting and metric.name != "desync":  # which compares what caches hold
                    continue
                shortest = LISTENERS[name].shortest
                if result.seconds < shortest:
                    raise Unheard(
                        f"{name} needs clips of at least {shortest:g} s, and {result.seconds:g} s "
                        "are judged. Give longer clips."
                    )
                found = networks.find(name)
                if "captions" in wanting:
                    networks.text_folder(name)
                for kind in wanting & needed.keys():
                    digests[kind][name] = found.digest
                if found.path is not None:
                    result.weights[name] = {
                        "file": found.path.name,
                        "sha256": found.digest,
                        "license": file.license if (file := LISTENERS[name].file) else "",
                        "note": found.note,
                    }
        except Unheard as error:
            result.left_out[metric.name] = str(error)
        else:
            for kind, own in digests.items():
                needed[kind] |= own
    for name, weights in result.weights.items():
        if weights["note"]:
            result.notes.append(f"The weights of {name}: {weights['note']}.")
    return needed


def _unknown(metric: Metric, given: Given, videos: Side) -> str:
    """Return what is not known of the clips that a metric of ours needs; empty where all is."""
    if metric.name == "onsets" and given.events is None:
        return "No times of events are given: a table has them in its column events."
    if metric.name == "classes" and given.labels is None:
        return "No classes of mfmjt's classifier are given: a table has them in its column class."
    if metric.name == "clap" and not any(given.captions) and not videos.has_cache("clap", "text"):
        return "No captions are given (--captions)."
    seen = videos.files or any(videos.has_cache(name, "video") for name in metric.needs)
    if metric.name in WATCHING and not seen:
        return "No videos are given (--videos)."
    return ""


def _listen(
    job: Job,
    sides: Sequence[Side],
    workers: int | None,
    result: Result,
    tell: Callable[[float], None],
) -> None:
    """Compute all features that are not kept yet, and say what cannot be scored and why."""
    files = [(side, name, path) for side in sides for name, path in side.files.items() if path]
    count = processes(workers, len(files), job.device)
    paths = [path for _, _, path in files]
    tell(0.0)
    told = listen_to_all(job, paths, count, lambda done: tell(done / len(files))) if files else []
    for (side, name, _), done in zip(files, told, strict=True):
        if done.problem:
            del side.files[name]
            result.problems.append(Problem(side.name, name, done.problem))
        elif done.unheard:
            why = f"it is {done.seconds:.2f} s long, too short for {', '.join(done.unheard)}"
            result.problems.append(Problem(side.name, name, why))
        side.done[name] = done
    for side in sides:
        side.open(job)
        if not job.videos:
            result.notes += _described(side, [side.done[n] for n in side.files if n in side.done])


def _described(side: Side, files: Sequence[Done]) -> list[str]:
    """Return what is odd about a set of files: rates, channels, equal content, caches."""
    notes = list(side.notes())
    rates = Counter(file.rate for file in files)
    if len(rates) > 1:
        told = ", ".join(f"{rate} Hz ({count:,})" for rate, count in rates.most_common())
        notes.append(f"The {side.name} sounds have several rates, and all are resampled: {told}.")
    mixed = sum(file.channels > 1 for file in files)
    if mixed:
        notes.append(f"{mixed:,} {side.name} sounds have several channels: their mean is judged.")
    equal = len(files) - len({file.digest for file in files})
    if equal:
        notes.append(f"{equal:,} {side.name} files have the same content as others.")
    return notes


def _drop(listing: Listing, sides: Sequence[Side], wanted: Sequence[Metric]) -> None:
    """Leave out pairs of which something cannot be scored: one set of clips for all metrics."""
    made, real, videos = (side.files for side in sides)
    listing.pairs = [(a, b) for a, b in listing.pairs if a in made and b in real]
    if sides[0].source is None:  # av-benchmark takes for each metric what it has
        names = {metric.name for metric in wanted}
        if names & WATCHING:
            listing.pairs = [pair for pair in listing.pairs if pair[1] in videos]
        if "clap" in names:
            listing.pairs = [p for p in listing.pairs if listing.known.get(p[1], {}).get("caption")]
    if not listing.pairs:
        told = some((f"{p.side} {p.name}: {p.why}" for p in listing.problems), "; ", most=3)
        raise InputError(f"No pair of clips can be scored: {told}. Repair or replace the files.")


def _measure(
    wanted: Sequence[Metric],
    listing: Listing,
    sides: Sequence[Side],
    networks: Networks,
    result: Result,
    progress: Progress,
) -> None:
    """Compute every metric."""
    given = Given.of([listing.known.get(name, {}) for _, name in listing.pairs])
    videos = sides[2]

    def ids(number: int, network: str, purpose: str) -> list[str]:
        pairs = listing.pairs
        if result.protocol == "av-benchmark":
            heard = [{n: None for n in side.files if side.hears(n, network)} for side in sides[:2]]
            pairs = [(a, b) for a, b in pairs if a in heard[0] and b in heard[1]]
            if purpose == "video":
                seen = videos.files.keys() | videos.cached_ids(network, "video")
                pairs = [pair for pair in pairs if pair[1] in seen]
            elif purpose == "clap":
                told = videos.cached_ids(network, "text") or {
                    name for name, known in listing.known.items() if known.get("caption")
                }
                pairs = [pair for pair in pairs if pair[1] in told]
            else:
                return benchmark_pairs(network, purpose, heard[0], heard[1], pairs)[number]
        return [names[number] for names in pairs]

    made, real = (
        Files(side, partial(ids, i), networks, videos, partial(ids, 1))
        for i, side in enumerate(sides[:2])
    )
    made_files, real_files = (side.files for side in sides[:2])
    result.clips = len(listing.pairs)
    for a, b in listing.pairs:
        seconds = sides[0].done[a].seconds if a in sides[0].done else result.seconds
        result.per_clip[a] = {"seconds": seconds}
        result.files[a] = (str(made_files[a] or ""), str(real_files[b] or ""))
    if given.classes:
        counts = Counter(given.classes)
        result.per_class = {name: {"clips": float(counts[name])} for name in sorted(counts)}
    for done, metric in enumerate(wanted):
        progress("measure", done / len(wanted))
        try:
            found = metric.score(made, real, given)
        except InputError as error:
            result.left_out[metric.name] = str(error)
            continue
        if found is None:
            result.left_out[metric.name] = "what it needs is not known of these clips."
        else:
            _add(found, [a for a, _ in listing.pairs], given.classes, result)


def _add(found: Score, names: Sequence[str], classes: Sequence[str], result: Result) -> None:
    """Put what a metric says into the result."""
    result.figures |= found.figures
    result.interval |= found.interval
    per_class = dict(found.per_class)
    for key, values in found.per_clip.items():
        if len(values) != len(names):
            continue  # av-benchmark's other sets of clips
        for name, value in zip(names, values.tolist(), strict=True):
            result.per_clip[name][key] = value
        if classes and key not in per_class:
            per_class[key] = by_class(classes, partial(_mean_of, values))
    for key, by_name in per_class.items():
        for name, value in by_name.items():
            result.per_class[name][key] = value


def _mean_of(values: np.ndarray, own: np.ndarray) -> float:
    return float(values[own].mean())
