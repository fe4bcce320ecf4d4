"""The networks that judge sound: where their weights are, and what they make of a clip.

Published weights are not ours to ship. They are found in a folder by name, size and digest, and
what is not there is said with where its publisher keeps it.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfmjt.checkpoints import (
    PublishedFile,
    about,
    find_all,
    fingerprint,
    read_content,
    there,
)
from mfmjt.encoders.clap import CLAP_FILE, ROBERTA, CLAPText
from mfmjt.encoders.text_model import TextModel, folders_of, open_config
from mfmjt.errors import InputError, short
from mfmjt.evaluate import networks as published
from mfmjt.evaluate.classifier import load_classifier
from mfmjt.evaluate.onsets import detect_onsets
from mfmjt.evaluate.watching import watch_imagebind, watch_synchformer

__all__ = ["CHECKS", "LISTENERS", "Found", "Listener", "Networks", "Unheard", "file_digest"]

CHECKS = ("digest", "name")
"""How closely a weight file must resemble the published one: in every byte, or in its name."""


class Unheard(InputError):
    """What a metric needs is not there: weights of a network, videos or captions."""


@dataclass(frozen=True)
class Listener:
    """A network, or a detector, that features of a clip are taken from.

    Attributes:
        name: Short name.
        rate: Of the sound that it takes, in Hz.
        shortest: Length of the shortest clip that it takes, in seconds.
        load: Makes it, of what the weight file holds; of a `.tflite` file, of its path.
        listen: Takes it and sound (1, S) at `rate`, and gives arrays by name.
        file: Its weights, as published; None where they ship with mfmjt.
        text: Sizes and tokenizer of its half for captions; None where it reads none.
        watch: Takes it, a video's path and the seconds that are judged, and gives arrays by name;
            None where it watches none.
    """

    name: str
    rate: int
    shortest: float
    load: Callable[[Any], Any]
    listen: Callable[[Any, Tensor], dict[str, np.ndarray]]
    file: PublishedFile | None = None
    text: TextModel | None = None
    watch: Callable[[Any, Path, float], dict[str, np.ndarray]] | None = None


def _array(value: Tensor) -> np.ndarray:
    return value[0].float().cpu().numpy()


def _embedding(network: Any, wave: Tensor) -> dict[str, np.ndarray]:
    return {"embedding": _array(network(wave))}


def _tagged(network: Any, wave: Tensor) -> dict[str, np.ndarray]:
    embedding, logits = network(wave[:, : 10 * network.sample_rate])
    return {"embedding": _array(embedding), "logits": _array(logits)}


def _encoded(network: Any, wave: Tensor) -> dict[str, np.ndarray]:
    return {"embedding": _array(network.encode_audio(wave))}


def _synchformer(network: Any, wave: Tensor) -> dict[str, np.ndarray]:
    return {"audio": _array(network.encode_audio(wave))}


def _judged(classifier: Any, wave: Tensor) -> dict[str, np.ndarray]:
    embedding = classifier.embedding(wave)
    logits = classifier.logits(embedding)
    return {"embedding": _array(embedding), "class": logits.argmax(dim=1).cpu().numpy()}


def _onsets(_: object, wave: Tensor) -> dict[str, np.ndarray]:
    return {"times": detect_onsets(wave[0], 16000)}


LISTENERS = {
    listener.name: listener
    for listener in (
        Listener(
            "vggish",
            16000,
            0.975,
            published.VGGish.from_state_dict,
            _embedding,
            published.VGGISH_FILES[0],
        ),
        Listener(
            "panns",
            16000,
            0.32,
            published.Cnn14.from_state_dict,
            _tagged,
            published.CNN14_FILES[0],
        ),
        Listener(
            "passt",
            32000,
            0.1,
            published.PaSST.from_state_dict,
            _tagged,
            published.PASST_FILES[0],
        ),
        Listener(
            "yamnet",
            16000,
            0.975,
            published.YAMNet.from_tflite,
            _embedding,
            published.YAMNET_FILES[0],
        ),
        Listener(
            "imagebind",
            16000,
            2.0,
            published.ImageBind.from_state_dict,
            _encoded,
            published.IMAGEBIND_FILES[0],
            watch=watch_imagebind,
        ),
        Listener(
            "synchformer",
            16000,
            4.8,
            published.Synchformer.from_state_dict,
            _synchformer,
            published.SYNCHFORMER_FILES[0],
            watch=watch_synchformer,
        ),
        Listener(
            "clap",
            48000,
            0.1,
            published.CLAP.from_state_dict,
            _encoded,
            published.CLAP_FILES[0],
            text=ROBERTA,
        ),
        Listener("classifier", 16000, 0.1, lambda _: load_classifier(), _judged),
        Listener("onsets", 16000, 0.1, lambda _: None, _onsets),
    )
}
"""The networks that features are taken from, by name."""


@dataclass(frozen=True)
class Found:
    """Weights of a network.

    Attributes:
        path: Their file; None where they ship with mfmjt.
        digest: SHA-256 of the file, or a fingerprint of the weights.
        note: In what it differs from the published file; mostly empty.
    """

    path: Path | None
    digest: str
    note: str = ""


class Networks:
    """The networks whose weights are in a folder, each loaded when it is first asked for.

    Args:
        folder: Where the weight files are, at most two folders deep; None for no such folder.
        check: `digest` takes files whose digest is the published one, `name` any so called.
        device: Where they compute.

    Raises:
        InputError: No such folder or check.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        check: str = "digest",
        device: torch.device | str = "cpu",
    ) -> None:
        if check not in CHECKS:
            raise InputError(f"No check {check!r}: choose one of {', '.join(CHECKS)}.")
        if folder is not None and not Path(folder).is_dir():
            raise InputError(f"There is no folder {folder} of weights. Make it, or give another.")
        self.folder = None if folder is None else Path(folder)
        self.check, self.device = check, torch.device(device)
        self._found: dict[str, Found] = {}
        self._loaded: dict[str, Any] = {}
        self._readers: dict[str, CLAPText] = {}

    def find(self, name: str) -> Found:
        """Return the weights of a network.

        Raises:
            Unheard: They are not there, or of another version; the message says where to get them.
        """
        if name not in self._found:
            self._found[name] = self._find(LISTENERS[name])
        return self._found[name]

    def _find(self, listener: Listener) -> Found:
        file = listener.file
        if file is None:
            weights = listener.load(None)
            return Found(None, "1" if weights is None else fingerprint(weights))
        path = self._path(listener)
        if self.check != "name":
            try:  # the other digest is needed anyway
                find_all(path.parent, [file], "size" if file.sha256 else "md5")
            except InputError as error:
                raise Unheard(str(error)) from error
        digest = file_digest(path)
        note = ""
        if path.name == file.name and not digest.startswith(file.sha256):
            note = f"SHA-256 {digest[:16]}…, not {file.sha256[:16]}… as published"
            if self.check != "name":
                raise Unheard(
                    f"{short(path, 120)} is another version: {note}; get it from {file.source}, "
                    "or take it as it is with check='name' (--check name)."
                )
        elif path.name != file.name:
            note = f"converted from {file.name}, whose digest cannot be checked"
        return Found(path, digest, note)

    def _path(self, listener: Listener) -> Path:
        """Return the weight file of a network that has one."""
        file = listener.file
        assert file is not None
        path = None if self.folder is None else there(self.folder, file)
        if path is None:
            where = f"not in {self.folder}" if self.folder else "no folder of weights is given"
            raise Unheard(f"{file.name} is missing ({where}): get it from {file.source}.")
        return path

    def load(self, name: str) -> Any:
        """Return a network, on the device.

        Raises:
            Unheard: The weights are not there.
            InputError: The file is not what its name says.
        """
        if name not in self._loaded:
            listener = LISTENERS[name]
            if listener.file is None:
                network = listener.load(None)
            else:
                path = self._path(listener)
                with about(path, listener.file):
                    is_content = path.suffix != ".tflite"
                    network = listener.load(read_content(path) if is_content else path)
            if isinstance(network, torch.nn.Module):
                network.to(self.device)
            self._loaded[name] = network
        return self._loaded[name]

    @torch.inference_mode()
    def listen(self, name: str, wave: Tensor) -> dict[str, np.ndarray]:
        """Return the features of a clip (1, S) at the network's rate, as arrays by name."""
        return LISTENERS[name].listen(self.load(name), wave.to(self.device))

    @torch.inference_mode()
    def watch(self, name: str, video: Path, seconds: float) -> dict[str, np.ndarray]:
        """Return the features of a video, as arrays by name.

        Raises:
            InputError: It cannot be read, or is shorter.
        """
        watch, network = LISTENERS[name].watch, self.load(name)
        if watch is None:
            raise InputError(f"{name} watches no videos.")
        return watch(network, video, seconds)

    def text_folder(self, name: str) -> Path:
        """Return the folder with sizes and tokenizer of a network's half for captions.

        Raises:
            Unheard: There is none.
        """
        text = LISTENERS[name].text
        if text is None:
            raise Unheard(f"{name} takes no captions.")
        found = [] if self.folder is None else folders_of(text, self.folder)
        if not found:
            raise Unheard(
                f"Captions need config.json and tokenizer.json of {text.name}, and neither "
                f"{self.folder} nor the hub's cache has them: get them from {text.publisher}."
            )
        return found[0]

    @torch.inference_mode()
    def read(self, name: str, captions: list[str]) -> list[np.ndarray]:
        """Return the embedding (d,) of each caption.

        Raises:
            Unheard: The weights, or what `text_folder` returns, are not there.
            InputError: These are not what their names say, or transformers is not installed.
        """
        if name not in self._readers:
            path = self._path(LISTENERS[name])
            _, config, tokens = open_config(ROBERTA, self.text_folder(name))
            with about(path, CLAP_FILE):
                reader = CLAPText.from_state_dict(read_content(path), config, tokens)
            self._readers[name] = reader.to(self.device)
        return [_array(self._readers[name]([caption])) for caption in captions]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(functools.partial(stream.read, 2**22), b""):
            digest.update(block)
    return digest.hexdigest()
