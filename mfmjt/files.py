"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mfmjt.errors import RunError, reason

__all__ = ["atomic_path", "check_writable"]


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it onto `path` if the block succeeds.

    On any exception, Ctrl-C included, the temporary file is removed and `path` is as it was.
    The temporary name keeps the suffix, because encoders choose the container by it.

    Raises:
        RunError: The folder does not exist or cannot be written.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=_prefix(path), suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; the result gets the permissions any new file would have.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise RunError if `path` could not be written now; for use before long work.

    Raises:
        RunError: The folder does not exist or cannot be written.
    """
    path = Path(path)
    try:
        with tempfile.NamedTemporaryFile(prefix=_prefix(path), suffix=path.suffix, dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def _prefix(path: Path) -> str:
    # Names may be as long as the file system allows; the temporary one must not be longer.
    return f".{path.stem[:32]}."


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"Cannot write {path}: {reason(error)}. Choose a folder that exists and is writable."
    )
