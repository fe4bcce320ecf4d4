"""Sound longer than a window: the same in every way but for its length, and no seams."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mfmjt import media
from mfmjt.codec import NanoCodec
from mfmjt.encoders import NanoEncoders
from mfmjt.errors import InputError
from mfmjt.meanflow import sample
from mfmjt.model import MFMJT
from mfmjt.pipeline import STAGES, Pipeline
from tests.pipeline.conftest import one
from tests.support.clips import moving, write_video

RATE = 16_000


@pytest.fixture(scope="module")
def pipe(model_folder: Path) -> Pipeline:
    """Windows of 2 s, so that few seconds have many seams."""
    return Pipeline(
        MFMJT.load(model_folder / "network.safetensors"),
        NanoCodec.load(model_folder / "codec.safetensors"),
        NanoEncoders.load(model_folder / "encoders.safetensors"),
        "cpu",
        window=2,
    )


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 7.4 s."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    return write_video(path, frames=185, size=(24, 32), picture=moving)


def test_one_window_is_what_the_parts_give(model_folder: Path, clip: Path) -> None:
    """Read, encode, one step, decode, by hand: a seed's sound is bound to this."""
    whole = Pipeline.from_pretrained(model_folder, device="cpu")
    made = one(whole(clip, prompt="a bell", seed=7, guidance=2.0))
    video = media.read_video(clip, (8, 25), 64)
    net, encoders = whole.network, whole.encoders
    slow, fast = (torch.from_numpy(frames)[None] for frames in video.frames)
    # 1.2 s are filled up to four segments of 0.32 s, by holding the last picture.
    slow, fast = slow[:, [*range(10)]], fast[:, [*range(30), 29, 29]]
    with torch.inference_mode():
        features = {
            "video": encoders.encode_frames(slow),
            "sync": encoders.encode_sync(fast),
            "text": encoders.encode_text(["a bell"]),
        }
        noise = torch.randn(1, 40, 20, generator=torch.Generator().manual_seed(7))
        masks = torch.tensor([True]), torch.tensor([False])
        both = [
            {"cond": net.conditions(**features, video_mask=m, text_mask=m, latent_length=40)}
            for m in masks
        ]
        latent = net.unnormalize(sample(net, noise, 1, *both, guidance=2.0))
        waveform = whole.codec.decode(latent)[:, :19_200]
    assert torch.equal(made.waveform, waveform)


@pytest.mark.parametrize("duration", [2.5, 2.51, 3.0, 3.99, 4.6, 7.3])
def test_any_duration(pipe: Pipeline, long_clip: Path, duration: float) -> None:
    for video, prompt in ((long_clip, None), (None, "rain")):
        audio = one(pipe(video, prompt=prompt, duration=duration))
        assert audio.waveform.shape == (1, round(RATE * duration))
        assert float(audio.waveform.std()) > 0


def test_seeds_and_batches(pipe: Pipeline, long_clip: Path) -> None:
    batch = pipe(long_clip, seed=5, count=2)
    assert isinstance(batch, list)
    for audio in batch:
        alone = one(pipe(long_clip, seed=audio.seed))
        assert torch.equal(alone.waveform, one(pipe(long_clip, seed=audio.seed)).waveform)
        torch.testing.assert_close(alone.waveform, audio.waveform)
    assert not torch.allclose(batch[0].waveform, batch[1].waveform)


def test_longer_sound_begins_as_shorter_sound_does(pipe: Pipeline) -> None:
    """All but what the end has changed: a later window, and the fade into it."""
    short, long = (one(pipe(prompt="rain", duration=d)).waveform for d in (5.0, 9.0))
    torch.testing.assert_close(short[:, : 2 * RATE], long[:, : 2 * RATE])


def test_progress_goes_on_over_all_windows(pipe: Pipeline, long_clip: Path) -> None:
    seen: list[tuple[str, float]] = []
    audio = one(pipe(long_clip, steps=2, progress=lambda stage, part: seen.append((stage, part))))
    assert list(dict.fromkeys(stage for stage, _ in seen)) == list(STAGES)
    assert [s for s, _ in seen] == sorted((s for s, _ in seen), key=STAGES.index)
    parts = [part for stage, part in seen if stage == "generate"]
    assert parts == sorted(parts)
    assert parts[0] == 0
    assert parts[-1] == 1
    assert len(set(parts)) == 1 + 2 * 6  # six windows: 0 1 2 3 4 5 to 7.4 s
    assert all(seconds > 0 for seconds in audio.timings.values())


def test_a_video_that_ends_before_it_says(pipe: Pipeline, tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "a.mp4", frames=150, size=(24, 32), picture=moving,
        options={"movflags": "faststart"},
    )  # fmt: skip
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    audio = one(pipe(path))
    assert 2.5 < audio.duration < 6
    assert any("cut short" in note for note in audio.notes)
    with pytest.raises(InputError, match="less than the 6 s"):
        pipe(path, duration=6.0)


def test_a_jump_in_time_is_damage(pipe: Pipeline, tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "a.mkv", frames=75, size=(24, 32), picture=moving,
        options={"cluster_time_limit": "500"},
    )  # fmt: skip
    content = bytearray(path.read_bytes())
    cluster = content.rindex(bytes.fromhex("1f43b675"))
    stamp = content.index(b"\xe7\x82", cluster) + 2  # its time in milliseconds, two bytes
    assert cluster < stamp < cluster + 20
    assert int.from_bytes(content[stamp : stamp + 2], "big") < 3000
    content[stamp : stamp + 2] = b"\xff\xf0"
    path.write_bytes(bytes(content))
    audio = one(pipe(path))
    assert abs(audio.duration - 3) < 0.1
    assert any("damaged in" in note for note in audio.notes)


# --- memory ------------------------------------------------------------------------------------


def pictures_alive() -> int:
    """Bytes of uint8 tensors that are held anywhere."""
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.dtype == torch.uint8]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def test_pictures_do_not_pile_up(pipe: Pipeline, tmp_path: Path) -> None:
    peaks = []
    for seconds in (4, 9):
        path = write_video(tmp_path / f"{seconds}.mp4", seconds * 25, (24, 32), picture=moving)
        alive: list[int] = []

        def look(stage: str, _: float, alive: list[int] = alive) -> None:
            if stage == "generate":
                alive.append(pictures_alive())

        pipe(path, progress=look)
        peaks.append(max(alive))
    a_second = (8 + 25) * 64 * 64 * 3
    assert peaks[0] > a_second
    assert peaks[1] <= peaks[0] + a_second


PEAK = """
import re, sys, torch
from pathlib import Path
from mfmjt.pipeline import Pipeline
torch.set_num_threads(1)
audio = Pipeline.from_pretrained("nano", device="cpu")(video=sys.argv[1])
audio.mux(sys.argv[1], sys.argv[2])
peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(audio.duration, peak)
"""


@pytest.mark.slow
def test_ten_minutes_need_the_memory_of_one(tmp_path: Path) -> None:
    peaks = []
    for minutes in (1, 10):
        path = tmp_path / f"{minutes}.mp4"
        write_video(path, minutes * 60 * 25, (48, 64), picture=moving)
        command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / "out.mp4")]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        duration, peak = done.stdout.split()
        assert float(duration) == minutes * 60
        peaks.append(int(peak))
    assert peaks[1] <= 1.2 * peaks[0]


# --- seams, with the model that ships ----------------------------------------------------------

HOP = RATE // 20
SEAMS = (7.5, 14.5, 20.5)  # the middles of the overlaps of windows at 0, 7, 14 and 19 s
DURATION = 27.0


@pytest.fixture(scope="module")
def seamed() -> list[np.ndarray]:
    nano = Pipeline.from_pretrained("nano", device="cpu")
    prompts = ("rain falls", "a motor hums")
    return [one(nano(prompt=p, duration=DURATION)).waveform[0].numpy() for p in prompts]


def segments(wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log spectra in bands of every second, near a seam and away from any."""
    middles = np.arange(1.0, DURATION - 1.0, 0.5)
    away = np.abs(middles[:, None] - np.array(SEAMS)).min(1) >= 1.0
    spectra = []
    for middle in (*SEAMS, *middles[away]):
        part = wave[round((middle - 0.5) * RATE) : round((middle + 0.5) * RATE)]
        power = np.abs(np.fft.rfft(part * np.hanning(len(part)))) ** 2
        bands = [chunk.mean() for chunk in np.array_split(power, 16)]
        spectra.append(10 * np.log10(np.array(bands) + 1e-9))
    return np.array(spectra[: len(SEAMS)]), np.array(spectra[len(SEAMS) :])


def test_seams_are_as_loud_as_the_rest(seamed: list[np.ndarray]) -> None:
    for wave in seamed:
        near, away = (10 * np.log10((10 ** (s / 10)).mean(1)) for s in segments(wave))
        assert len(away) > 20
        assert away.min() <= near.mean() <= away.max()
        assert abs(near.mean() - away.mean()) < 2 * away.std()


def test_seams_have_the_spectrum_of_the_rest(seamed: list[np.ndarray]) -> None:
    for wave in seamed:
        near, away = segments(wave)
        center = away.mean(0)
        distances = np.sqrt(((away - center) ** 2).mean(1))
        assert np.sqrt(((near - center) ** 2).mean(1)).mean() <= distances.max()


def test_seams_do_not_click(seamed: list[np.ndarray]) -> None:
    """The steepest step between samples near a seam is none of the steepest of all."""
    for wave in seamed:
        steps = np.abs(np.diff(wave))
        near = np.concatenate(
            [steps[round((s - 0.5) * RATE) : round((s + 0.5) * RATE)] for s in SEAMS]
        )
        assert near.max() <= steps.max()
        assert (near > np.quantile(steps, 0.999)).mean() < 0.005
