"""Settings of a server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mfmjt.errors import InputError

__all__ = ["MAX_COUNT", "MAX_PROMPT", "MAX_SECONDS", "MAX_STEPS", "Settings", "authority"]

MAX_COUNT = 8
"""Sounds of one request and guidance mode."""
MAX_STEPS = 100
MAX_SECONDS = 600.0
MAX_PROMPT = 2000
"""Characters; a note says what of them the encoders do not read."""
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[\w.-]+)(?::(\d{0,5}))?", re.ASCII | re.IGNORECASE)
# No part of the server's own paths: whether a proxy left the root path out is seen by its presence.
_ROOT = re.compile(r"(?!/?(v1|page|examples)(/|$))[\w./~-]*", re.ASCII)


def authority(text: str) -> tuple[str, int | None]:
    """Split NAME or NAME:PORT into host (lower case) and port; an empty host where it is neither.

    An IPv6 address stands in brackets there and comes back without.
    """
    found = _AUTHORITY.fullmatch(text)
    if found is None:
        return "", None
    return found[1].strip("[]").lower(), int(found[2]) if found[2] else None


@dataclass(frozen=True)
class Settings:
    """Limits and addresses of a server.

    Attributes:
        host: Address to listen at.
        port: Port to listen at; 0 takes a free one.
        token: Secret that every request but those for the page and for health must carry, if any.
        names: Further host names under which browsers may reach the server, as NAME or NAME:PORT.
        max_duration: Longest sound in seconds.
        max_upload: Largest upload in bytes.
        workers: Uploads that are read at once, each in a process of its own.
        queue: Requests that may be waiting or running; more are told to come again.
        read_seconds: Longest time that reading one upload may take.
        body_seconds: Longest silence of a client that is sending.
        memory: Bytes that a process may take for one upload, in addition to what an idle one takes.
        grace: Seconds after which work is dropped when nobody follows it any more.
        keep: Seconds that results stay after they were made.
        kept: Finished jobs that stay at most.
        batch: Sounds in a batch at most, of one request or of several.
        folder: Where temporary files go; None takes the system's folder.
        root_path: Path under which a proxy shows the server, such as /foley.

    Raises:
        InputError: A limit is not positive, or an address is none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    names: tuple[str, ...] = ()
    max_duration: float = 30.0
    max_upload: int = 100 * 2**20
    workers: int = 2
    queue: int = 32
    read_seconds: float = 20.0
    body_seconds: float = 15.0
    memory: int = 1536 * 2**20
    grace: float = 3.0
    keep: float = 900.0
    kept: int = 64
    batch: int = 16
    folder: Path | None = None
    root_path: str = ""

    def __post_init__(self) -> None:
        for name in ("max_duration", "max_upload", "workers", "queue", "kept", "batch"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}. Give more than 0.")
        if self.max_duration > MAX_SECONDS:
            raise InputError(
                f"max_duration is {self.max_duration:g} s. Give at most {MAX_SECONDS:g}: the "
                "frames of longer videos do not belong in memory."
            )
        if not 0 <= self.port < 2**16:
            raise InputError(f"There is no port {self.port}. Give 1 to 65535, or 0 for a free one.")
        for name in self.names:
            if not authority(name)[0]:
                raise InputError(
                    f"{name!r} is no host name. Give one as browsers send it, without http:// and "
                    "without a path, such as sound.example.org or sound.example.org:8443."
                )
        if not _ROOT.fullmatch(self.root_path):
            raise InputError(
                f"{self.root_path!r} cannot be the root path. Give one such as /foley; /v1, /page "
                "and /examples are the server's own."
            )
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise InputError("The token has characters that no header carries. Use plain ASCII.")
        if self.token is not None and len(self.token) < 8:
            raise InputError("The token is too short to be a secret. Give 8 characters or more.")

    @property
    def root(self) -> str:
        """Return what stands before /v1: `root_path` with one slash, at its begin, or nothing."""
        path = self.root_path.strip("/")
        return f"/{path}" if path else ""
