"""Features of videos on disk, found again by the file's content.

An entry is one safetensors file for each window, named by a digest of the video's content, the
encoders' weights, how pictures are prepared and what was asked for. Files appear whole or not at
all and carry a checksum: what is damaged is noticed and made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mfmjt.errors import InputError, RunError, reason
from mfmjt.files import atomic_path
from mfmjt.media import Pictures, content
from mfmjt.pipeline.windows import Window

__all__ = ["Entry", "entry"]

PREPARATION = "2"
"""Another number whenever pictures are picked, scaled or cut into windows in another way."""
_PATH = "\0"  # stands for the video's name in notes: the same content may have another one
_DAMAGE = (SafetensorError, OSError, KeyError, TypeError, ValueError)


def entry(
    folder: str | os.PathLike[str],
    video: Path | Pictures,
    encoders: str,
    asked: tuple[object, ...],
) -> Entry:
    """Return the entry of a video.

    Args:
        folder: Of the cache; made where it is not there.
        video: The file or pictures, which are read.
        encoders: Result of `Encoders.identity`.
        asked: What else decides on the features, such as the duration.

    Raises:
        InputError: There is no such video.
        RunError: The folder cannot be made.
    """
    folder = Path(folder)
    digest = hashlib.sha256(repr((PREPARATION, encoders, asked)).encode())
    try:
        for block in content(video):
            digest.update(block)
    except OSError as error:
        why = "no file" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(f"Cannot read {video}: {why}. Give a video file.") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"Cannot make the cache {folder}: {error.strerror}. Choose another folder."
        ) from error
    return Entry(folder, digest.hexdigest()[:32], str(video))


class Entry:
    """The windows of one video in a cache.

    Args:
        folder: Of the cache.
        key: What the files' names begin with.
        video: Name of the video, for notes.

    Attributes:
        notes: On the video, as it was read, and on what of the entry is damaged.
    """

    def __init__(self, folder: Path, key: str, video: str) -> None:
        self._folder, self._key, self._video = folder, key, video
        self.notes: tuple[str, ...] = ()

    def windows(self) -> list[Window] | None:
        """Return the windows, if all of them are there and whole."""
        found: list[Window] = []
        while not (found and found[-1].last):
            path = self._path(len(found))
            if not path.is_file():
                return None
            try:
                about, _ = _read(path, torch.device("cpu"))
                found.append(Window(**about["window"]))
                notes = [note.replace(_PATH, self._video) for note in about["notes"]]
            except _DAMAGE:
                self.notes = (f"The cached features {path} are damaged and were made again.",)
                return None
            self.notes = tuple(notes)
        return found

    def load(self, number: int, device: torch.device) -> dict[str, Tensor]:
        """Features of a window that `windows` has seen.

        Raises:
            RunError: The file has changed since.
        """
        path = self._path(number)
        try:
            return _read(path, device)[1]
        except _DAMAGE as error:
            raise RunError(
                f"{path} was changed while it was used. Run the same command again."
            ) from error

    def save(
        self, number: int, window: Window, features: dict[str, Tensor], notes: tuple[str, ...]
    ) -> None:
        """Write the features of a window.

        Raises:
            RunError: The file cannot be written.
        """
        state = {name: value.detach().cpu().contiguous() for name, value in features.items()}
        about = {
            "window": dataclasses.asdict(window),
            "notes": [note.replace(self._video, _PATH) for note in notes],
            "checksum": _checksum(state),
        }
        path = self._path(number)
        try:
            with atomic_path(path) as temporary:
                save_file(state, temporary, {"about": json.dumps(about)})
        except (SafetensorError, OSError) as error:
            raise RunError(f"Cannot write {path}: {reason(error)}. Check the disk.") from error

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._key}-{number:05d}.safetensors"


def _read(path: Path, device: torch.device) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})["about"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if _checksum(state) != about["checksum"]:
        raise ValueError("the checksum differs")
    return about, {name: value.to(device) for name, value in state.items()}


def _checksum(state: dict[str, Tensor]) -> int:
    total = 0
    for name in sorted(state):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(state[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return total
