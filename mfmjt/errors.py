"""The two errors a user can cause or meet, each one line: what, why, what to do."""

from __future__ import annotations

__all__ = ["InputError", "MfmjtError", "RunError"]


class MfmjtError(Exception):
    """Base of the errors that the command line prints without a traceback.

    Attributes:
        exit_code: Process exit status: 2 for misuse, 1 for a failure while running.
    """

    exit_code = 1


class InputError(MfmjtError, ValueError):
    """An argument, file or checkpoint that cannot be used; the message says what to do instead."""

    exit_code = 2


class RunError(MfmjtError, RuntimeError):
    """Work that began and could not be finished; the message says what failed and what to try."""

    exit_code = 1
