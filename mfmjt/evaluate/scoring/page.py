"""A report to read and to listen to: one Markdown file and one page that holds all it shows."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mfmjt.evaluate.scoring.reading import read_clip
from mfmjt.evaluate.scoring.result import Result
from mfmjt.files import atomic_path

__all__ = ["save_report"]

SHOWN = 3
"""Best and worst clips of each figure."""
RATE = 22050
"""Largest sample rate of the sounds in the page, in Hz."""
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem;
  text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
audio { width: 15rem; height: 2rem; vertical-align: middle }
.bar { fill: #0072B2 } .dot { fill: #0072B2; fill-opacity: .5 } .note { color: #555 }
svg text { font: 12px system-ui, sans-serif; fill: currentColor }
@media (prefers-color-scheme: dark) { body { color: #e8e8e8; background: #161616 }
  td, th { border-color: #444 } .note { color: #aaa } .bar, .dot { fill: #56B4E9 } }
"""


def save_report(result: Result, folder: str | os.PathLike[str]) -> None:
    """Write `report.md` and `index.html`, which needs no other file: its sounds are in it.

    Args:
        result: Of `score`.
        folder: Made if missing.

    Raises:
        RunError: The folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "report.md") as temporary:
        temporary.write_text(_markdown(result, folder))
    with atomic_path(folder / "index.html") as temporary:
        temporary.write_text(_page(result))


def _figures(result: Result) -> list[tuple[str, str, bool]]:
    """Return key, title and whether more is better of the figures that each clip has."""
    held = {key for values in result.per_clip.values() for key in values}
    return [
        (figure.key, figure.title, figure.better == "higher")
        for figure in result.columns()
        if figure.better and figure.key in held
    ]


def _ranked(result: Result, key: str, higher: bool) -> list[str]:
    """Return the clips, the best first."""
    names = [name for name, values in result.per_clip.items() if key in values]
    return sorted(names, key=lambda name: (result.per_clip[name][key], name), reverse=higher)


def _ends(names: list[str]) -> list[tuple[str, list[str]]]:
    """Return the worst, and the best of the others."""
    worst = names[::-1][:SHOWN]
    return [("worst", worst), ("best", [n for n in names[:SHOWN] if n not in worst])]


def _markdown(result: Result, folder: Path) -> str:
    lines = ["# Scores", "", *(f"* {line}" for line in result.summary()), "", result.table()]
    for key, title, higher in _figures(result):
        lines += [
            f"## {title}",
            "",
            "| | clip | value | generated | real |",
            "|---|---|---|---|---|",
        ]
        for kind, names in _ends(_ranked(result, key, higher)):
            for name in names:
                links = (_link(path, folder) for path in result.files[name])
                value = f"{result.per_clip[name][key]:.3f}"
                lines.append(f"| {kind} | {_cell(name)} | {value} | {' | '.join(links)} |")
        lines.append("")
    if result.per_class:
        keys = _class_keys(result)
        lines += [
            "## Classes",
            "",
            f"| class | clips | {' | '.join(keys)} |",
            "|---|---|" + "---|" * len(keys),
        ]
        for name, values in result.per_class.items():
            cells = [f"{values[key]:.3f}" if key in values else "" for key in keys]
            lines.append(f"| {_cell(name)} | {values['clips']:.0f} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _link(path: str, folder: Path) -> str:
    if not path:
        return ""
    return f"[{_cell(Path(path).name)}](<{os.path.relpath(path, folder)}>)"


def _class_keys(result: Result) -> list[str]:
    held = (key for values in result.per_class.values() for key in values if key != "clips")
    return list(dict.fromkeys(held))


def _page(result: Result) -> str:
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Scores</title>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<style>{_STYLE}</style><h1>Scores</h1>",
        *(f"<p class=note>{html.escape(line)}</p>" for line in result.summary()),
        _rows(["metric", "generated", "95 % interval", "real", "better"], result.rows()),
    ]
    sounds: dict[str, str] = {}
    for key, title, higher in _figures(result):
        ranked = _ranked(result, key, higher)
        parts.append(f"<h2>{html.escape(title)}</h2>")
        rows = []
        for kind, names in _ends(ranked):
            for name in names:
                players = [_player(path, result.seconds, sounds) for path in result.files[name]]
                value = f"{result.per_clip[name][key]:.3f}"
                cells = [kind, html.escape(name), value, *players]
                rows.append("".join(f"<td>{cell}</td>" for cell in cells))
        head = "".join(f"<th>{c}</th>" for c in ("", "clip", "value", "generated", "real"))
        parts.append(f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
        by_class = {n: v[key] for n, v in result.per_class.items() if key in v}
        if by_class:
            parts += ["<h3>Classes</h3>", _bars(by_class)]
        values = [(result.per_clip[name]["seconds"], result.per_clip[name][key]) for name in ranked]
        if len({seconds for seconds, _ in values}) > 1:
            parts += ["<h3>Against the length of the file</h3>", _dots(values, title)]
    parts.append("<h2>Weights</h2>")
    weights = [
        (name, values["file"], values["sha256"][:16], values["license"], values["note"])
        for name, values in result.weights.items()
    ]
    parts.append(_rows(["network", "file", "SHA-256", "license", "note"], weights))
    return "\n".join([*parts, "</html>\n"])


def _rows(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _player(path: str, seconds: float, sounds: dict[str, str]) -> str:
    """Return an audio element that holds the judged part of a file as 16-bit FLAC."""
    if not path:
        return ""
    if path not in sounds:
        import soundfile

        clip = read_clip(Path(path), seconds, whole=True)
        if clip.wave is None:
            return f"<span class=note>{html.escape(clip.problem)}</span>"
        rate = min(clip.rate, RATE)
        wave = clip.at(rate, seconds, exact=False)[0].clamp(-1, 1).numpy()
        stream = io.BytesIO()
        soundfile.write(stream, wave, rate, format="FLAC", subtype="PCM_16")
        sounds[path] = base64.b64encode(stream.getvalue()).decode()
    return f"<audio controls preload=none src='data:audio/flac;base64,{sounds[path]}'></audio>"


def _bars(values: dict[str, float]) -> str:
    """Draw a bar for each class."""
    largest = max(map(abs, values.values())) or 1.0
    lines = []
    for i, (name, value) in enumerate(sorted(values.items(), key=lambda item: -item[1])):
        y, width = 20 * i, 400 * abs(value) / largest
        lines.append(
            f"<text x=190 y={y + 14} text-anchor=end>{html.escape(name)}</text>"
            f"<rect class=bar x=200 y={y + 3} width={width:.1f} height=14 />"
            f"<text x={205 + width:.1f} y={y + 14}>{value:.3f}</text>"
        )
    return f"<svg width=680 height={20 * len(lines)}>{''.join(lines)}</svg>"


def _dots(values: list[tuple[float, float]], title: str) -> str:
    """Draw values against seconds."""
    points = np.array(values)
    low, high = points.min(axis=0), points.max(axis=0)
    spread = np.where(high > low, high - low, 1.0)
    shares = (points - low) / spread
    dots = "".join(
        f"<circle class=dot cx={50 + 560 * x:.1f} cy={210 - 190 * y:.1f} r=3 />" for x, y in shares
    )
    labels = (
        f"<text x=50 y=232>{low[0]:.1f} s</text>"
        f"<text x=610 y=232 text-anchor=end>{high[0]:.1f} s</text>"
        f"<text x=45 y=210 text-anchor=end>{low[1]:.2f}</text>"
        f"<text x=45 y=25 text-anchor=end>{high[1]:.2f}</text>"
        f"<text x=330 y=12 text-anchor=middle>{html.escape(title)}</text>"
    )
    return f"<svg width=680 height=240>{dots}{labels}</svg>"
