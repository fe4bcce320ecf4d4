"""Repositories of Hugging Face's hub as folders, in the cache that others share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mfmjt.errors import InputError, reason

__all__ = ["cached", "download", "is_repository"]

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_repository(name: object) -> bool:
    """Return whether a name has the form of a repository's: owner/name."""
    return bool(_NAME.fullmatch(str(name)))


def cached(repository: str) -> Path | None:
    """Return the folder of a repository as far as it is in the cache; the hub is not asked."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, local_files_only=True))
    except (ImportError, OSError, ValueError):  # the hub's own errors are of the last two
        return None


def download(repository: str, patterns: Sequence[str]) -> Path:
    """Return the folder of a repository, into which those of its files came that match.

    Raises:
        InputError: There is none of that name, or the hub cannot be reached.
    """
    begin = f"There is no folder {repository}, and "
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    except ImportError:
        raise InputError(
            f"{begin}a repository of Hugging Face's hub needs huggingface_hub. Run "
            "`pip install 'mfmjt[hub]'`, or give a folder."
        ) from None
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{begin}Hugging Face's hub has no repository of that name that can be read. Check "
            "the name; for a private one, set HF_TOKEN."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(
            f"{begin}Hugging Face's hub cannot be reached ({reason(error)}). Connect to the "
            "network once, or give a folder."
        ) from error
