"""CLIP's byte-pair tokenizer, for the published list of merges.

Sennrich et al., 2016, arXiv:1508.07909, over UTF-8 bytes. Texts are cleaned as open_clip does, and
so give its ids. The list is not ours to ship: it comes with open_clip_torch
(`bpe_simple_vocab_16e6.txt.gz`) and with CLIP models (`merges.txt`).
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import os
import zlib
from collections.abc import Sequence
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
# open_clip's expression for a word; what is left out is spaces.
_WORD = "(?i)" + "|".join(_SPECIAL) + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Text to the token ids that CLIP's text tower was trained on.

    Args:
        merges: Path of the list of merges, plain or gzipped; None takes the one of an installed
            open_clip_torch.
        context: Tokens of a text, start and end included; longer texts are cut.

    Raises:
        InputError: There is no such file, it is no list of merges, or the packages of
            `mfmjt[mmaudio]` are not installed.
    """

    def __init__(self, merges: str | os.PathLike[str] | None = None, context: int = 77) -> None:
        try:
            import ftfy
            import tokenizers
            from tokenizers import Regex, models, pre_tokenizers
        except ImportError as error:
            raise InputError(
                "CLIP's tokenizer needs ftfy and tokenizers, which cannot be imported: "
                f"{reason(error)}. Install them with pip install 'mfmjt[mmaudio]'."
            ) from error
        self.context = context
        pairs = _read(_installed() if merges is None else Path(merges))
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # one for each byte
        words = [*letters, *(c + _END for c in letters), *map("".join, pairs), *_SPECIAL]
        self._ids = {word: i for i, word in enumerate(words)}
        # The library refuses pairs of what is no token, which no text leads to.
        pairs = [(a, b) for a, b in pairs if a in self._ids and b in self._ids]
        self._fix = ftfy.fix_text
        self._words = pre_tokenizers.Split(Regex(_WORD), "removed", invert=True)
        self._bpe = tokenizers.Tokenizer(models.BPE(self._ids, pairs, end_of_word_suffix=_END))
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._bpe.pre_tokenizer = to_bytes
        self._bpe.add_special_tokens(list(_SPECIAL))

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
        text = html.unescape(html.unescape(self._fix(text)))
        text = " ".join(text.split()).lower()
        words = [word for word, _ in self._words.pre_tokenize_str(text)]
        return self._bpe.encode(words, is_pretokenized=True).ids


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
