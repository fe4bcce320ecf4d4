"""Hooks of MkDocs that make the documents a site, without a change to the documents themselves.

Notebooks become Markdown. What a document links to outside of `docs/` gets a page too, below
`repository/`. Formulas become MathML, which browsers show without a script. Every module of the
navigation below `reference/` is described by its docstrings.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
AS_THEY_ARE = {".md", ".svg", ".png", ".mp4"}  # other files are shown in a block of code
BY_FILE = {"mfmjt.evaluate", "mfmjt.features", "mfmjt.kernels", "mfmjt.train"}
"""Packages that are described file by file, since they export files."""
LINK = re.compile(r"(?<=\]\()([^)\s#]+)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def address(path: Path) -> str:
    """Where a file of the repository is on the site."""
    if path.is_relative_to(DOCS):
        name = path.relative_to(DOCS).as_posix()
        return name.replace(".ipynb", ".md")
    name = "repository/" + path.relative_to(ROOT).as_posix()
    return name if path.suffix in AS_THEY_ARE else name + ".md"


def links(path: Path, text: str) -> Iterator[tuple[str, Path]]:
    """Links of a document to files of the repository: as written, and the file."""
    for target in LINK.findall(text):
        found = (path.parent / target).resolve()
        if not re.match(r"\w+:", target) and found.is_file():
            yield target, found


def relinked(path: Path, text: str) -> str:
    """The document with its links as they are on the site."""
    here = os.path.dirname(address(path))
    there = {
        target: os.path.relpath(address(file), here or ".") for target, file in links(path, text)
    }
    return LINK.sub(lambda match: there.get(match[0], match[0]), text)


def markdown(path: Path) -> str:
    """A file of the repository as a document."""
    text = path.read_text()
    if path.suffix == ".md":
        return text
    if path.suffix == ".ipynb":
        return "\n\n".join(part for cell in json.loads(text)["cells"] for part in _cell(cell))
    language = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".json": "json"}.get(path.suffix, "")
    hidden = "---\nsearch:\n  exclude: true\n---\n"
    return f"{hidden}# `{path.relative_to(ROOT)}`\n\n```{language}\n{text}\n```\n"


def _cell(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    yield f"```python\n{source}\n```" if cell["cell_type"] == "code" else source
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        shown = "".join(output.get("text", data.get("text/plain", "")))
        if "image/png" in data:
            picture = "".join(data["image/png"].split())
            yield f"![](data:image/png;base64,{picture})"
        elif shown:
            yield f"```text\n{shown.rstrip()}\n```"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no Markdown file of `docs/`."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
    waiting = [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb"), *map(ROOT.joinpath, _listed(config))]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        name = address(path)
        if not name.endswith(".md"):
            files.append(File.generated(config, name, abs_src_path=str(path)))
            continue
        text = markdown(path)
        new = {file for _, file in links(path, text)} - seen
        new = {file for file in new if not file.is_relative_to(DOCS)}
        waiting += sorted(new)
        seen |= new
        if path.suffix != ".md" or not path.is_relative_to(DOCS):
            files.append(File.generated(config, name, content=relinked(path, text)))
    for name in _named(config, "reference/"):
        module = name.removeprefix("reference/").removesuffix(".md")
        content = f"# `{module}`\n\n::: {module}\n"
        if module in BY_FILE:
            content += "    options:\n      show_submodules: true\n"
        files.append(File.generated(config, name, content=content))
    return files


def _named(config: MkDocsConfig, prefix: str) -> list[str]:
    """Pages of the navigation below a folder."""
    return re.findall(rf"'({prefix}[^']*)'", str(config.nav))


def _listed(config: MkDocsConfig) -> list[str]:
    return [name.removeprefix("repository/") for name in _named(config, "repository/")]


def on_page_markdown(text: str, page: Page, **_: Any) -> str:
    """Turn the links of a Markdown file of `docs/` to where their files are on the site."""
    path = DOCS / page.file.src_uri
    return relinked(path, text) if path.exists() else text


def on_page_content(content: str, **_: Any) -> str:
    """Write formulas as MathML."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]), display=display)

    return FORMULA.sub(formula, content)
