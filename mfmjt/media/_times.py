"""When each packet of a copied video is shown and decoded."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from mfmjt.errors import InputError
from mfmjt.media._decode import MAX_JUMP, Decoder, first_time
from mfmjt.media._open import declared_duration, in_decoding_order, open_video, packets, step_of

__all__ = ["Times", "copied_times"]

_UNKNOWN = -(2**63)  # FFmpeg's own
_KEY, _DISCARD = 1, 2
_REORDERED = 32  # pictures that may come between one that is decoded early and its time
_MAX_BEFORE = 86_400  # seconds from where decoding begins to what is shown: more is damage
_MAX_DISORDER = 1  # seconds that the time of decoding may go back: more is another clock


@dataclass(frozen=True)
class Times:
    """What becomes of the packets of a video stream, by their number in the file.

    Times are ticks of the stream's time base; 0 is when the first picture is shown.

    Attributes:
        shown: When each packet's picture is shown; below 0 are those that only others need.
        decoded: When each is decoded: rising, and never after it is shown.
        first: The number of the first packet to copy; from those before it nothing is shown.
        zero: What the file's own clock says at 0, in seconds.
        edited: Whether the file hides pictures that others need, as edit lists do.
        until: When, in ticks, nothing is shown any more although packets follow; None if all are.
    """

    shown: array[int]
    decoded: array[int]
    first: int
    zero: Fraction
    edited: bool
    until: int | None


def copied_times(path: Path, end: Fraction | None = None, formats: str | None = None) -> Times:
    """Find the times of the packets that show a video until `end` seconds.

    They are the file's own wherever it tells them. Where it knows only an order of decoding, or
    its clock jumps, the pictures are decoded, and each is shown when `VideoStream` says.

    Args:
        path: The video.
        end: Only pictures shown before it are wanted; None wants all.
        formats: As for `VideoStream`.

    Raises:
        InputError: As from `VideoStream`; the packets cannot be told apart; or pictures amid
            others are hidden, which no copy can do.
    """
    zero = first_time(path, formats)
    if zero is None:
        raise InputError(f"No frame of {path} can be decoded. Give a video that plays.")
    return _stated(path, zero, end, formats) or _learned(path, end, formats)


def _stated(path: Path, zero: Fraction, end: Fraction | None, formats: str | None) -> Times | None:
    """Return the times that the file tells, None if it does not tell them or they make no sense."""
    with open_video(path, formats) as (container, stream):
        if in_decoding_order(container, stream):
            return None
        base, step = stream.time_base, step_of(stream)
        start, stop = round(zero / base), None if end is None else end / base
        declared = declared_duration(container, stream) or Fraction(0)
        latest = declared / base
        shown, decoded, flags = array("q"), array("q"), bytearray()
        previous: int | None = None
        for packet in _until_damage(container, stream):
            if packet.pts is None:
                return None
            pts = packet.pts - start
            unknown = packet.dts is None or packet.dts > packet.pts
            dts = None if unknown else packet.dts - start
            earliest = pts if dts is None else dts
            if pts > latest + MAX_JUMP / base or earliest < -_MAX_BEFORE / base:
                return None
            latest = max(latest, pts)
            if dts is not None:
                if previous is not None and dts < previous - _MAX_DISORDER / base:
                    return None
                if stop is not None and dts >= stop:
                    break
                previous = dts
            shown.append(pts)
            decoded.append(_UNKNOWN if dts is None else dts)
            flags.append(_KEY * packet.is_keyframe + _DISCARD * packet.is_discard)
    seen = [i for i, pts in enumerate(shown) if not flags[i] & _DISCARD and pts >= 0]
    if not any(shown[i] == 0 for i in seen):
        return None
    last = max(i for i in seen if stop is None or shown[i] < stop)
    first = _first(shown, flags)
    del shown[last + 1 :], decoded[last + 1 :]
    hidden = [shown[i] for i in range(first, last + 1) if flags[i] & _DISCARD]
    late = [pts for pts in hidden if pts >= 0]
    if late and min(late) < max(shown[i] for i in seen if i <= last):
        raise InputError(
            f"The edit list of {path} cuts out pictures amid others, which a copy of the pictures "
            "cannot do. Export the video once more, or write only the sound (.wav)."
        )
    if stop is not None and max(shown) >= stop:
        late.append(-int(-stop // 1))
    step_ticks = max(1, round(step / base))
    return Times(
        shown=shown,
        decoded=_decoded(shown, decoded, step_ticks),
        first=first,
        zero=zero,
        edited=bool(hidden),
        until=min(late, default=None),
    )


def _learned(path: Path, end: Fraction | None, formats: str | None) -> Times:
    """Return the times at which the decoder shows the picture of each packet."""
    with open_video(path, formats) as (container, stream):
        base, step = stream.time_base, step_of(stream)
        decoder = Decoder(path, stream, declared_duration(container, stream), numbered=True)
        found: dict[int, int] = {}
        until, beyond = None, 0
        for time, _ in decoder.frames(container):
            if decoder.number is None:
                raise InputError(
                    f"{path} does not tell when its pictures are shown, and the decoder of its "
                    "codec does not say. Convert it to H.264 in .mp4, or write only the sound "
                    "(.wav)."
                )
            ticks = round(time / base)
            found.setdefault(decoder.number, ticks)
            if end is not None and time >= end:
                until, beyond = ticks if until is None else until, beyond + 1
                if beyond > _REORDERED:
                    break
    last = max(i for i, ticks in found.items() if until is None or ticks < until)
    shown = array("q")
    first = min(found)
    for i in range(last + 1):
        # What shows nothing comes with what is before it.
        shown.append(found[i] if i in found else shown[-1] + 1 if shown else -1)
    unknown = array("q", [_UNKNOWN]) * len(shown)
    step_ticks = max(1, round(step / base))
    return Times(
        shown=shown,
        decoded=_decoded(shown, unknown, step_ticks),
        first=first,
        zero=decoder.first,
        edited=False,
        until=until if until is not None and max(shown) >= until else None,
    )


def _first(shown: array[int], flags: bytearray) -> int:
    """Return the packet that the picture at 0 is decoded from, if nothing before it is shown."""
    at_zero = shown.index(0)
    for i in range(at_zero, 0, -1):
        if flags[i] & _KEY and shown[i] <= 0:
            return i if all(pts < 0 for pts in shown[:i]) else 0
    return 0


def _decoded(shown: array[int], stated: array[int], step: int) -> array[int]:
    """Times of decoding: those stated as far as they can be, `step` apart where there are none."""
    decoded = array("q", shown)
    following = shown[-1] + 1
    for i in reversed(range(len(shown))):
        wanted = following - step if stated[i] == _UNKNOWN else stated[i]
        following = decoded[i] = min(shown[i], following - 1, wanted)
    return decoded


def _until_damage(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the packets as far as they can be read: the sound was made for these."""
    source = packets(container, stream)
    while True:
        try:
            yield next(source)
        except (StopIteration, av.error.FFmpegError, ValueError):
            return
