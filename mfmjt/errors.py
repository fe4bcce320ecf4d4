"""The two errors a user can cause or meet, each one short line: what, why, what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["InputError", "MfmjtError", "RunError", "reason", "short", "some"]

_LONGEST = 580  # 600 with the few words that are printed before it
_BREAKS = re.compile(r"\s*[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]\s*")
_UNSAFE = re.compile(
    r"weights_only|safe_globals|allow_?list|allow_pickle|pickle_module|arbitrary code"
    r"|trust(ed)? (the )?source|trust_remote",
    re.IGNORECASE,
)
"""What other libraries advise who cannot read a file: ways to run the code in it."""


class MfmjtError(Exception):
    """Base of the errors that the command line prints without a traceback.

    Args:
        message: What, why, what to do. It is kept as one line; what is too long loses its middle.

    Attributes:
        exit_code: Process exit status: 2 for misuse, 1 for a failure while running.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(short(message, _LONGEST))


class InputError(MfmjtError, ValueError):
    """An argument, file or checkpoint that cannot be used; the message says what to do instead."""

    exit_code = 2


class RunError(MfmjtError, RuntimeError):
    """Work that began and could not be finished; the message says what failed and what to try."""

    exit_code = 1


def short(text: object, most: int) -> str:
    """`text` as one line of printable characters, `most` at most; the rest is left out within."""
    line = str(text)
    if len(line) > 4 * most:
        line = line[: 2 * most] + line[-2 * most :]
    line = _BREAKS.sub(" ", line).strip()
    # A name may hold anything, sequences that move a terminal's cursor included.
    if not line.isprintable():
        line = "".join(c if c.isprintable() else " " if c.isspace() else _spelled(c) for c in line)
    if len(line) <= most:
        return line
    end = most * 2 // 5
    return f"{line[: most - end - 3]} … {line[-end:]}"


def some(items: Iterable[object], between: str = ", ", most: int = 5, each: int = 100) -> str:
    """Return the first few of a list, each shortened, and how many more there are."""
    listed = list(items)
    told = between.join(short(item, each) for item in listed[:most])
    left = len(listed) - most
    return told if left <= 0 else f"{told} and {left:,} more"


def reason(error: BaseException, whole: bool = False) -> str:
    """Return what went wrong in another library, in at most 200 characters of its own words.

    Advice to run the code that a file holds is left out. What is an error of ours is told as it is.

    Args:
        error: What the library raised.
        whole: Take all lines of its message, not the first that says something.
    """
    if isinstance(error, MfmjtError):
        return str(error).rstrip(".")
    text = getattr(error, "strerror", None) or str(error)
    if isinstance(error, KeyError):
        text = f"no {text}"
    for line in [" ".join(text.split())] if whole else text.splitlines():
        sentences = re.split(r"(?<=[.!?])\s+", line.strip())
        safe = " ".join(s for s in sentences if not _UNSAFE.search(s))
        if told := short(safe, 200).rstrip(" .;:,"):
            return told
    return type(error).__name__


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()
