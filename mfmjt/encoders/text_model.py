"""Models of Hugging Face's transformers from the folders in which they are kept.

The libraries are imported where a model is opened, and no sooner: that takes seconds. Tokenizers
are read as their publishers made them, from `tokenizer.json`; transformers makes its own of parts
of that file, in another way in each of its major releases.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfmjt.checkpoints import hub
from mfmjt.errors import InputError, reason

__all__ = ["TextModel", "Tokens", "folders_of", "import_transformers", "open_config"]

_CONFIG, _TOKENIZER = "config.json", "tokenizer.json"
_UNKNOWN = "<unk>"


class TextModel(NamedTuple):
    """A model of text in the layout of transformers.

    Attributes:
        kind: Its `model_type`.
        config: Name of the class of its sizes.
        name: As its publisher calls it on Hugging Face's hub.
        files: What of its repository is needed, as patterns.
    """

    kind: str
    config: str
    name: str
    files: Sequence[str]

    @property
    def publisher(self) -> str:
        """Where to get it: an address."""
        return f"https://huggingface.co/{self.name}"


class Tokens:
    """A published tokenizer, for texts of a fixed number of tokens.

    Args:
        tokenizer: A `Tokenizer` of the library tokenizers.
        padding: The id that fills up a short text.
        length: Tokens of a text, those that begin and end it included.

    Attributes:
        length: The same.
        room: Tokens that a text itself may have.
    """

    def __init__(self, tokenizer: Any, padding: int, length: int = 77) -> None:
        tokenizer.no_padding()
        tokenizer.enable_truncation(length)
        self.length = length
        self.room: int = length - tokenizer.num_special_tokens_to_add(False)
        self._tokenizer, self._padding = tokenizer, padding
        self._unknown = tokenizer.token_to_id(_UNKNOWN)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask, int64 `(B, length)`; longer texts are cut, and still end."""
        ids = torch.full((len(texts), self.length), self._padding)
        mask = torch.zeros_like(ids)
        for i, text in enumerate(texts):
            found = self._tokenizer.encode(_sound(text)).ids
            ids[i, : len(found)] = torch.tensor(found)
            mask[i, : len(found)] = 1
        return ids, mask

    def vocabulary(self) -> list[str]:
        """Return the tokens as text, in alphabetical order."""
        return sorted(self._tokenizer.get_vocab())

    def of_word(self, word: str) -> list[int]:
        """Return the tokens of a word, `length` at most."""
        return self._tokenizer.encode(_sound(word), add_special_tokens=False).ids

    def knows(self, word: str) -> bool:
        """Return whether no part of a word is the token for what is unknown."""
        return self._unknown not in self.of_word(word)


def import_transformers() -> Any:
    """Return the library.

    Raises:
        InputError: It is not installed, or cannot be imported.
    """
    try:
        import transformers

        # Its parts are imported when they are asked for, and say only then what they lack.
        _ = transformers.T5EncoderModel, transformers.RobertaModel
    except (ImportError, RuntimeError) as error:
        raise InputError(
            "Published text encoders need transformers, which cannot be imported: "
            f"{reason(error.__cause__ or error)}. Install it with pip install 'mfmjt[text]'."
        ) from error
    return transformers


def folders_of(model: TextModel, folder: str | os.PathLike[str], **sizes: int) -> list[Path]:
    """Return the folders with a model of this kind, those with the given sizes first.

    They are looked for in a folder and up to two levels inside it; one in the hub's cache comes
    after those.
    """
    found = [
        path.parent
        for pattern in ("", "*/", "*/*/")
        for path in sorted(Path(folder).glob(f"{pattern}{_CONFIG}"))
    ]
    if (there := hub.cached(model.name)) is not None:
        found.append(there)
    said = {path: _config(path) for path in found}
    of_the_kind = [path for path in found if said[path].get("model_type") == model.kind]
    return sorted(of_the_kind, key=lambda path: not sizes.items() <= said[path].items())


def open_config(model: TextModel, source: str | os.PathLike[str]) -> tuple[Path, Any, Tokens]:
    """Return the folder, the sizes and the tokenizer of a model.

    Args:
        model: What it should be.
        source: Its folder, or the name of a repository of Hugging Face's hub, as owner/name.

    Raises:
        InputError: There is no such folder, it is another model's, or it has no tokenizer.
    """
    folder = Path(source)
    if not folder.is_dir() and hub.is_repository(source):
        folder = hub.download(str(source), model.files)
    wanted = f"Give the folder of {model.name} ({model.publisher})."
    if not folder.is_dir():
        raise InputError(f"There is no folder {source}. {wanted}")
    if (kind := _config(folder).get("model_type")) != model.kind:
        what = f"is of the kind {kind!r}" if kind else f"has no {_CONFIG} that says so"
        raise InputError(f"{folder} is no model of the kind {model.kind!r}: it {what}. {wanted}")
    if not (folder / _TOKENIZER).is_file():
        raise InputError(
            f"{folder} has no tokenizer: {_TOKENIZER} is missing. Get it from {model.publisher}."
        )
    transformers = import_transformers()
    from tokenizers import Tokenizer  # which comes with transformers

    try:
        config = getattr(transformers, model.config).from_pretrained(folder)
        tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
        return folder, config, Tokens(tokenizer, config.pad_token_id)
    except Exception as error:  # what is in the files decides what a parser raises
        raise InputError(f"{folder} cannot be read: {reason(error)}. {wanted}") from error


def _config(folder: Path) -> dict[str, Any]:
    """Return what a folder's configuration says; nothing where it is none."""
    try:
        said = json.loads((folder / _CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _sound(text: str) -> str:
    """Return a text that is UTF-8: half a surrogate pair becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")
