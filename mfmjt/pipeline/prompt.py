"""What of a prompt the encoders do not read or do not understand, in words."""

from __future__ import annotations

from collections.abc import Sequence

from mfmjt.encoders import Encoders

__all__ = ["prompt_notes"]

_SHOWN = 5


def prompt_notes(encoders: Encoders, prompt: str | None) -> tuple[str, ...]:
    """Return one line on a prompt that is cut off, and one on words that training had not.

    CLIP was trained on everybody's words; nano's text encoder on those of its captions.
    """
    notes = []
    if unread := encoders.unread(prompt or ""):
        notes.append(f"The prompt is too long: its end, from {unread[:30]!r} on, is not read.")
    known, unknown = encoders.understood(prompt or "")
    if unknown and known:
        notes.append(
            f"The text encoder was not trained on these words of the prompt: {_list(unknown)}. "
            "What is heard depends on the others."
        )
    elif unknown:
        notes.append(
            f"The text encoder was trained on none of the prompt's words: {_list(unknown)}. "
            "What is heard does not follow them."
        )
    return tuple(notes)


def _list(words: Sequence[str]) -> str:
    shown = ", ".join(map(repr, words[:_SHOWN]))
    return shown if len(words) <= _SHOWN else f"{shown} and {len(words) - _SHOWN} more"
