"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
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
    # Names may be as long as the file system allows; the temporary one must not be longer. It is
    # known before there is a file: a signal may come while that is made.
    temporary = path.with_name(f".{path.stem[:32]}.{secrets.token_hex(4)}{path.suffix}")
    try:
        try:
            temporary.open("xb").close()
            mode = temporary.stat().st_mode
        except OSError as error:
            raise _unwritable(path, error) from error
        yield temporary
        temporary.chmod(mode)  # some libraries put a file of their own there, with another
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or could not be made
            temporary.unlink()


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise RunError if `path` could not be written now; for use before long work.

    Raises:
        RunError: The folder does not exist or cannot be written.
    """
    try:
        # Without a name where the system can: a signal that comes now leaves nothing behind.
        with tempfile.TemporaryFile(dir=Path(path).parent):
            pass
    except OSError as error:
        raise _unwritable(Path(path), error) from error


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"Cannot write {path}: {reason(error)}. Choose a folder that exists and is writable."
    )
