"""CLIP's byte-pair tokenizer, for the published list of merges.

Sennrich et al., 2016, arXiv:1508.07909, over UTF-8 bytes. The list is not ours to ship: it comes
with open_clip_torch (`bpe_simple_vocab_16e6.txt.gz`) and with CLIP models (`merges.txt`).
"""

from __future__ import annotations

import functools
import gzip
import html
import importlib.util
import os
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from mfmjt.errors import InputError, reason

__all__ = ["MERGES_FILES", "Tokenizer"]

MERGES_FILES = ("bpe_simple_vocab_16e6.txt.gz", "merges.txt")
"""File names under which the list of merges is published."""

_MERGES = 49152 - 256 - 2
_END = "</w>"
_SPECIAL = ("<start_of_text>", "<end_of_text>")
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_STRAIGHT_QUOTES = {ord(c): "'" for c in "\u2018\u2019\u201a\u201b\u02bc"} | {
    ord(c): '"' for c in "\u201c\u201d\u201e\u201f"
}

_SPELLED_OUT = frozenset("ĲĳŉǄǅǆǇǈǉǊǋǌǱǲǳ\u3000").union(
    map(chr, range(0xFB00, 0xFB07)), map(chr, range(0xFF01, 0xFFF0))
)


class Tokenizer:
    """Text to the token ids that CLIP's text tower was trained on.

    Args:
        merges: Path of the list of merges, plain or gzipped; None takes the one of an installed
            open_clip_torch.
        context: Tokens of a text, start and end included; longer texts are cut.

    Raises:
        InputError: There is no such file, or it is no list of merges.
    """

    def __init__(self, merges: str | os.PathLike[str] | None = None, context: int = 77) -> None:
        self.context = context
        pairs = _read(_installed() if merges is None else Path(merges))
        # Bytes that are printable stand for themselves, others for characters from 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self._characters = {byte: chr(byte) for byte in printable} | {
            byte: chr(256 + i) for i, byte in enumerate(others)
        }
        letters = [self._characters[byte] for byte in printable + others]
        words = [*letters, *(c + _END for c in letters), *map("".join, pairs), *_SPECIAL]
        self._ids = {word: i for i, word in enumerate(words)}
        self._ranks = {pair: i for i, pair in enumerate(pairs)}
        self._split = functools.lru_cache(2**16)(self._merged)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids `(B, context)` int64: start, text, end, then zeros."""
        start, end = (self._ids[special] for special in _SPECIAL)
        rows = torch.zeros(len(texts), self.context, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = [start, *self.encode(text), end][: self.context]
            ids[-1] = end
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def encode(self, text: str) -> list[int]:
        """Token ids of a text of any length, without start and end."""
        return [i for word in _words(_clean(text)) for i in self._split(word)]

    def _merged(self, word: str) -> tuple[int, ...]:
        """Ids of one word: merge the pair that comes first in the list until none is left."""
        if word in _SPECIAL:
            return (self._ids[word],)
        parts = [self._characters[byte] for byte in word.encode()]
        parts[-1] += _END
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self._ranks.get(pair, _MERGES))
            if best not in self._ranks:
                break
            joined: list[str] = []
            for part in parts:
                # A part that was just joined is longer than best[0], so it is not joined twice.
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined
        return tuple(self._ids[part] for part in parts)


def _installed() -> Path:
    package = importlib.util.find_spec("open_clip")
    for folder in (package.submodule_search_locations or []) if package else []:
        path = Path(folder) / MERGES_FILES[0]
        if path.is_file():
            return path
    raise InputError(
        f"No list of merges for CLIP's tokenizer: open_clip_torch is not installed. Install it, or "
        f"give the path of a {' or a '.join(MERGES_FILES)}."
    )


def _read(path: Path) -> list[tuple[str, str]]:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        # The first line states a version; what follows the last merge is not used.
        lines = data.decode().split("\n")[1 : 1 + _MERGES]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(
            f"Cannot read the list of merges {path}: {reason(error)}. Give the published file."
        ) from error
    pairs = [tuple(line.split()) for line in lines]
    if len(pairs) != _MERGES or any(len(pair) != 2 for pair in pairs):
        raise InputError(
            f"{path} is no list of merges: a first line and then {_MERGES} pairs are expected. "
            f"Give the published {' or '.join(MERGES_FILES)}."
        )
    return [(first, second) for first, second in pairs]


def _clean(text: str) -> str:
    """Lower case, single spaces, HTML entities resolved, typography made plain.

    CLIP repairs text that was decoded wrongly, too (`ftfy`); such repairs are left to the user.
    """
    # Halves of surrogate pairs become whole characters, or one that stands for what is broken.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = html.unescape(html.unescape(text))
    text = "".join(_plain(c) for c in unicodedata.normalize("NFC", text))
    return " ".join(text.translate(_STRAIGHT_QUOTES).split()).lower()


def _plain(character: str) -> str:
    """Latin ligatures and full-width forms spelled out, controls and byte-order marks dropped."""
    if character in _SPELLED_OUT:
        return unicodedata.normalize("NFKC", character)
    control = unicodedata.category(character) == "Cc" and not character.isspace()
    if control or character == "\ufeff":
        return ""
    return character


def _words(text: str) -> Iterator[str]:
    """Runs of letters, single digits, runs of other signs, and English contractions."""
    position = 0
    while position < len(text):
        kind = _kind(text[position])
        whole = next((w for w in _SPECIAL + _CONTRACTIONS if text.startswith(w, position)), "")
        end = position + max(1, len(whole))
        if not whole and kind in "LS":
            while end < len(text) and _kind(text[end]) == kind:
                end += 1
        if kind != " ":
            yield text[position:end]
        position = end


def _kind(character: str) -> str:
    """L letter, N number, " " space, S any other sign."""
    if character.isspace():
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "S"
