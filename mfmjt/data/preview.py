"""Look at and listen to the procedural or the open set: a contact sheet and playable clips."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mfmjt.data.foley import FPS, SAMPLE_RATE, Clip
from mfmjt.data.open_set import clips_of
from mfmjt.errors import InputError
from mfmjt.files import atomic_path
from mfmjt.plotting import figure, spectrogram

__all__ = ["contact_sheet", "preview", "write_clip"]


def write_clip(
    path: Path, frames: NDArray[np.uint8] | None, audio: NDArray[np.float32] | None, fps: int = FPS
) -> None:
    """Encode frames `(T, H, W, 3)` uint8 as H.264 and mono audio `(S,)` as AAC, what there is."""
    import av

    with atomic_path(path) as temporary, av.open(str(temporary), "w") as container:
        video = None if frames is None else container.add_stream("libx264", rate=fps)
        sound = None if audio is None else container.add_stream("aac", rate=SAMPLE_RATE)
        if video is not None and frames is not None:
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt = "yuv420p"
            video.options = {"crf": "20"}
            for picture in frames:
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(video.encode())
        if sound is not None and audio is not None:
            samples = av.AudioFrame.from_ndarray(audio[None], format="fltp", layout="mono")
            samples.sample_rate = SAMPLE_RATE
            container.mux(sound.encode(samples))
            container.mux(sound.encode())


def contact_sheet(path: Path, clips: list[Clip], columns: int = 8) -> None:
    """Save one row a clip: frames, spectrogram, waveform with its events marked.

    Raises:
        InputError: matplotlib is not installed.
    """
    with figure(path, (1.3 * (columns + 4), 1.45 * len(clips)), dpi=90) as drawn:
        rows = drawn.subfigures(len(clips), 1, squeeze=False)[:, 0]
        for row, item in zip(rows, clips, strict=True):
            row.suptitle(f"{item.class_name}: {item.caption}", fontsize=8, x=0.01, ha="left")
            axes = row.subplots(1, columns + 2, width_ratios=[1.0] * columns + [2.0, 2.0])
            for axis in axes:
                axis.set_axis_off()
            shown = slice(12, 12 + 2 * columns, 2)
            frames = () if item.frames is None else item.frames[shown]
            for axis, frame in zip(axes, frames, strict=False):
                axis.imshow(frame)
            spectrogram(axes[-2], torch.from_numpy(item.audio), SAMPLE_RATE)
            axes[-1].plot(np.arange(item.audio.size) / SAMPLE_RATE, item.audio, linewidth=0.3)
            axes[-1].vlines(item.events, -1, 1, colors="crimson", linewidth=0.6)
            axes[-1].set_ylim(-1, 1)


def preview(
    out: Path | str,
    clips: int = 12,
    split: str = "train",
    seed: int = 0,
    size: int = 256,
    recordings: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write `sheet.png`, playable MP4 files and `clips.json` (captions, classes, event times).

    Args:
        out: Folder, made if needed.
        clips: How many clips, from index 0 on; twelve show each class once.
        split: "train", "validation" or "test".
        seed: Seed of the set.
        size: Pixels along each side of the frames.
        recordings: Folder of the open set's recordings; the procedural set without.
        progress: Called with (done, total) after each clip.

    Returns:
        The files written.

    Raises:
        InputError: `clips` is under 1 or `size` odd or under 16, or matplotlib is missing;
            the folder holds no recordings.
    """
    if clips < 1 or size < 16 or size % 2:
        raise InputError(
            f"Cannot preview {clips} clips of {size} pixels: there must be at least 1 clip, of an "
            "even size from 16 up. Change --clips or --size."
        )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    made, written, index = [], [], []
    make = clips_of(recordings)
    for i in range(clips):
        item = make(i, split, seed, size=size)
        suffix = "m4a" if item.frames is None else "mp4"
        path = out / f"{split}_{i:03d}_{item.class_name.replace(' ', '_')}.{suffix}"
        write_clip(path, item.frames, item.audio)
        made.append(item)
        written.append(path)
        index.append({"file": path.name, "caption": item.caption, "class": item.class_name,
                      "events_seconds": [round(float(e), 4) for e in item.events]})  # fmt: skip
        if progress is not None:
            progress(i + 1, clips)
    contact_sheet(out / "sheet.png", made)
    with atomic_path(out / "clips.json") as temporary:
        temporary.write_text(json.dumps(index, indent=1) + "\n")
    return [out / "sheet.png", *written, out / "clips.json"]
