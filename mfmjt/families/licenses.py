"""What publishers say of the use of their networks, as far as it could be looked up.

docs/licenses.md shows the same table, and `mfmjt info MODEL` the line of a model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, NamedTuple

from mfmjt.families.open import PRETRAINED
from mfmjt.model.published import NETWORK_FILES

__all__ = ["TERMS", "Terms", "table", "terms_of"]

LOOKED_AT = "2026-11"
"""When the publishers' pages were looked at, in the state that each line names."""


class Terms(NamedTuple):
    """The terms of the networks of one publisher.

    Attributes:
        networks: Which, in words.
        files: Names of their files.
        publisher: Where these are; "" for those that ship.
        code: License of the publisher's own code.
        weights: License of the files.
        commercial: Whether they may be used commercially.
        why: What the answer depends on.
        state: Date of the publisher's repository or card that was looked at.
    """

    networks: str
    files: tuple[str, ...]
    publisher: str
    code: str
    weights: str
    commercial: Literal["yes", "no", "conditional"]
    why: str
    state: str

    def __str__(self) -> str:
        return (
            f"{self.networks}: code {self.code}; weights {self.weights}; commercial use: "
            f"{self.commercial}. {self.why} Looked at: {LOOKED_AT}, state of {self.state}."
        )


_HUB = "https://huggingface.co/"
_MMAUDIO = tuple(file.name for file in NETWORK_FILES.values())
_NO_LICENSE = "Without a license nothing is allowed beyond what the law allows."
TERMS = (
    Terms(
        "nano",
        (),
        "",
        "Apache-2.0",
        "Apache-2.0",
        "yes",
        "It ships with this package, and the data that it was trained on is drawn by it.",
        "this version",
    ),
    Terms(
        "foley",
        (),
        "",
        "Apache-2.0",
        "Apache-2.0, with the credits of CREDITS.md",
        "yes",
        "It ships with this package, and was trained on recordings under CC0, CC-BY, OGA-BY or in "
        "the public domain; its judge holds YAMNet's weights, Apache-2.0.",
        "this version",
    ),
    Terms(
        "MMAudio small_16k, small_44k, medium_44k, large_44k, large_44k_v2",
        _MMAUDIO,
        f"{_HUB}hkchengrex/MMAudio",
        "MIT",
        "CC BY-NC 4.0",
        "no",
        "The publisher allows non-commercial use only.",
        "2026-02-23",
    ),
    Terms(
        "ComfyUI's copies of MMAudio (fp16, bf16, fp32)",
        tuple(
            f"{Path(name).stem}{precision}.safetensors"
            for name in _MMAUDIO
            for precision in ("_fp16", "_bf16", "_fp32", "")
        ),
        f"{_HUB}Kijai/MMAudio_safetensors",
        "MIT",
        "CC BY-NC 4.0, as MMAudio's; the card of the copies was not looked up",
        "no",
        "They hold MMAudio's weights.",
        "2026-02-01",
    ),
    Terms(
        "MeanAudio S-Full, S-AC, L-Full and FluxAudio S-Full",
        (
            "meanaudio_s_full.pth",
            "meanaudio_s_ac.pth",
            "meanaudio_l_full.pth",
            "fluxaudio_s_full.pth",
        ),
        f"{_HUB}AndreasXi/MeanAudio",
        "MIT",
        "MIT, by the card",
        "conditional",
        "The label is the publisher's word: part of the training data (WavCaps) is for academic "
        "use, and the codec that they need is MMAudio's.",
        "2025-09-02",
    ),
    Terms(
        "FdAudio",
        ("fdaudio.pth",),
        f"{_HUB}kph68/FdAudio",
        "MIT",
        "CC BY-NC-SA 4.0",
        "no",
        "The publisher allows non-commercial use only.",
        "2026-07-13",
    ),
    Terms(
        "DriftAudio from MeanAudio and from FdAudio",
        (
            "driftaudio_from_meanaudio_s_full_step4400.pth",
            "driftaudio_from_fdaudio_step1800.pth",
        ),
        f"{_HUB}xingyuchen-8/DriftAudio",
        "not found",
        "research, non-commercial, by the card",
        "no",
        "The publisher allows non-commercial use only.",
        "2026-11",
    ),
    Terms(
        "Resonate GRPO and PT",
        (
            "Resonate_GRPO.pth",
            "Resonate_PT.pth",
        ),
        f"{_HUB}AndreasXi/Resonate",
        "MIT",
        "MIT, by the card",
        "conditional",
        "The label is the publisher's word: the terms of the training data were not looked up, and "
        "the codec that they need has parts of MMAudio's.",
        "2026-03-13",
    ),
    Terms(
        "SelVA",
        ("generator_small_16k_sup_5.pth",),
        f"{_HUB}jnwnlee/SelVA",
        "none",
        "none stated; the card was not looked up",
        "no",
        _NO_LICENSE,
        "2025-12-21",
    ),
    Terms(
        "FoleyDash",
        (),
        "https://github.com/dct-cell/FoleyDash",
        "none",
        "not published",
        "no",
        _NO_LICENSE,
        "2026-06-18",
    ),
)
"""Of every network that can be opened by name, file or folder."""


def terms_of(model: str | os.PathLike[str]) -> list[Terms]:
    """Return the terms of a model, or of all networks in a folder; none where they are not known.

    Args:
        model: A name such as "nano", "small_16k" or "fdaudio", a file, a folder, or a repository
            of Hugging Face's hub. A file is known by its name alone.
    """
    path, name = Path(model), str(model)
    shipped = {terms.networks: terms for terms in TERMS if not terms.publisher}
    for own, terms in shipped.items():
        if name == own or (path.is_dir() and path.resolve() == (PRETRAINED / own).resolve()):
            return [terms]
    published = [terms for terms in TERMS if terms.publisher]
    if path.is_dir():
        names = {file.name for depth in ("*", "*/*", "*/*/*") for file in path.glob(depth)}
    elif name in NETWORK_FILES:
        names = {NETWORK_FILES[name].name}
    else:
        names = {path.name, f"{path.name}.pth"}
    return [t for t in published if t.publisher == f"{_HUB}{name}" or not names.isdisjoint(t.files)]


def table() -> str:
    """Return the terms as a Markdown table."""
    rows = [
        "| networks | code | weights | commercial use | why | state looked at |",
        "|---|---|---|---|---|---|",
    ]
    for terms in TERMS:
        networks = f"[{terms.networks}]({terms.publisher})" if terms.publisher else terms.networks
        rows.append(
            f"| {networks} | {terms.code} | {terms.weights} | {terms.commercial} | {terms.why} "
            f"| {terms.state} |"
        )
    return "\n".join(rows)
