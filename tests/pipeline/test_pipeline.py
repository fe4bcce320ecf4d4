from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import mfmjt
from mfmjt.errors import InputError
from mfmjt.media import read_video
from mfmjt.pipeline import MAX_DURATION, STAGES, Pipeline
from tests.pipeline.conftest import one
from tests.support.bundles import write_model
from tests.support.clips import packets, write_video


def test_video_and_prompt(pipe: Pipeline, clip: Path) -> None:
    audio = one(pipe(video=clip, prompt="a wooden ball bounces"))
    assert audio.waveform.shape == (1, 19_200)
    assert audio.waveform.dtype == torch.float32
    assert audio.sample_rate == 16_000
    assert audio.duration == 1.2
    assert float(audio.waveform.std()) > 0


def test_the_seed_decides(pipe: Pipeline, clip: Path) -> None:
    first, again, other = (one(pipe(clip, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(first.waveform, again.waveform)
    assert not torch.equal(first.waveform, other.waveform)


def test_a_batch_is_the_same_as_one_at_a_time(pipe: Pipeline, clip: Path) -> None:
    batch = pipe(clip, prompt="a bell", seed=5, count=3)
    assert isinstance(batch, list)
    assert [a.seed for a in batch] == [5, 6, 7]
    for audio in batch:
        torch.testing.assert_close(
            audio.waveform, one(pipe(clip, prompt="a bell", seed=audio.seed)).waveform
        )


def test_each_condition_is_heard(pipe: Pipeline, clip: Path, tmp_path: Path) -> None:
    def noise(i: int, height: int, width: int) -> np.ndarray:
        return np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)

    other = write_video(tmp_path / "other.mp4", frames=30, picture=noise)
    made = [
        one(pipe(video, prompt=prompt, duration=1.2)).waveform
        for video, prompt in (
            (clip, None),
            (clip, "rain"),
            (clip, "a bell"),
            (other, None),
            (None, "rain"),
            (None, "a bell"),
        )
    ]
    for i, first in enumerate(made):
        assert not any(torch.allclose(first, second) for second in made[i + 1 :])


def test_guidance_and_steps_change_the_sound(pipe: Pipeline, clip: Path) -> None:
    plain = one(pipe(clip, mode="none")).waveform
    torch.testing.assert_close(plain, one(pipe(clip, guidance=1.0)).waveform)
    made = [
        plain,
        one(pipe(clip, guidance=3.0, mode="cfg")).waveform,
        one(pipe(clip, guidance=3.0, mode="cfg_scaled")).waveform,
        one(pipe(clip, steps=3)).waveform,
    ]
    for i, first in enumerate(made):
        assert not any(torch.allclose(first, second) for second in made[i + 1 :])


@pytest.mark.parametrize("duration", [0.01, 0.32, 0.5, 1.0, 1.19])
def test_any_duration(pipe: Pipeline, clip: Path, duration: float) -> None:
    assert one(pipe(clip, duration=duration)).waveform.shape == (1, round(16_000 * duration))


def test_text_alone_lasts_as_long_as_training_clips(pipe: Pipeline) -> None:
    assert one(pipe(prompt="rain")).duration == 8.0


@pytest.mark.parametrize(
    "prompt",
    ["🔨" * 50, "a " * 5000, "x" * 10_000, "\x00\n\t", "ключ 鍵 \u202e", "\ud800 lone surrogate"],
    ids=["emoji", "5000 words", "one word", "control", "scripts", "surrogate"],
)
def test_any_prompt(pipe: Pipeline, prompt: str) -> None:
    if not prompt.strip():
        prompt += "."
    assert one(pipe(prompt=prompt, duration=0.32)).waveform.shape == (1, 5120)


def test_a_long_prompt_is_cut_with_a_note(pipe: Pipeline) -> None:
    kept = [f"word{i}" for i in range(pipe.encoders.config.text_length - 1)]
    audio = one(pipe(prompt=" ".join(kept), duration=0.32))
    assert audio.notes == ()
    longer = one(pipe(prompt=" ".join([*kept, "Lost", "words"]), duration=0.32))
    (note,) = longer.notes
    assert "'Lost words'" in note
    assert torch.equal(longer.waveform, audio.waveform)


def test_timings_and_progress(pipe: Pipeline, clip: Path) -> None:
    seen: list[tuple[str, float]] = []
    made = pipe(clip, steps=3, count=2, progress=lambda stage, part: seen.append((stage, part)))
    assert isinstance(made, list)
    assert list(dict.fromkeys(stage for stage, _ in seen)) == list(STAGES)
    assert [part for stage, part in seen if stage == "generate"] == [0, 1 / 3, 2 / 3, 1]
    audio = made[0]
    assert list(audio.timings) == list(STAGES)
    assert all(seconds > 0 for seconds in audio.timings.values())
    assert audio.rtf_generator == audio.timings["generate"] / 2.4
    assert audio.rtf_end_to_end == sum(audio.timings.values()) / 2.4


def test_save_and_mux(pipe: Pipeline, clip: Path, tmp_path: Path) -> None:
    audio = one(pipe(clip))
    audio.save(tmp_path / "a.flac")
    read, rate = soundfile.read(tmp_path / "a.flac", dtype="float32")
    assert rate == 16_000
    assert np.abs(read - audio.waveform[0].clamp(-1, 1).numpy()).max() <= 2.0**-15
    audio.mux(clip, tmp_path / "a.mp4")
    assert packets(tmp_path / "a.mp4", "video") == packets(clip, "video")


def test_notes_on_a_video_cut_short(pipe: Pipeline, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", options={"movflags": "faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    audio = one(pipe(path))
    assert audio.duration < 2
    assert any("cut short" in note for note in audio.notes)


def test_bfloat16_stays_close(model_folder: Path, clip: Path, pipe: Pipeline) -> None:
    half = Pipeline.from_pretrained(model_folder, device="cpu", dtype=torch.bfloat16)
    rough = one(half(clip)).waveform
    exact = one(pipe(clip)).waveform
    difference = (rough - exact).square().mean() / exact.square().mean()
    assert float(difference) < 0.5  # the same sound, not the same samples
    assert not torch.equal(rough, exact)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "nothing to make sound for"),
        ({"prompt": "  "}, "nothing to make sound for"),
        ({"prompt": "a", "steps": 0}, "steps is 0"),
        ({"prompt": "a", "steps": 10**9}, "steps is"),
        ({"prompt": "a", "guidance": -1.0}, "guidance is -1"),
        ({"prompt": "a", "guidance": float("nan")}, "guidance is nan"),
        ({"prompt": "a", "guidance": float("inf")}, "guidance is inf"),
        ({"prompt": "a", "mode": "loud"}, "mode"),
        ({"prompt": "a", "seed": -1}, "seed is -1"),
        ({"prompt": "a", "seed": 2**63}, "seed is"),
        ({"prompt": "a", "count": 0}, "count is 0"),
        ({"prompt": "a", "count": 10**6}, "count is"),
        ({"prompt": "a", "duration": 0.0}, "duration is 0"),
        ({"prompt": "a", "duration": float("nan")}, "duration is nan"),
        ({"prompt": "a", "duration": MAX_DURATION + 1}, "at most"),
        ({"video": "nothing.mp4"}, "no file"),
    ],
    ids=repr,
)
def test_what_cannot_be_asked(pipe: Pipeline, arguments: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        pipe(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


# --- loading -----------------------------------------------------------------------------------


def test_pictures_that_were_read_before_sound_as_their_file(
    pipe: Pipeline, clip: Path, tmp_path: Path
) -> None:
    rates = pipe.encoders.video_fps, pipe.encoders.sync_fps
    held = read_video(clip, rates, pipe.encoders.frame_size)
    for duration in (None, 0.7):
        made = one(pipe(held, duration=duration, cache=tmp_path / "cache")).waveform
        assert torch.equal(made, one(pipe(clip, duration=duration)).waveform)
    with pytest.raises(InputError, match="was read as"):
        pipe(held, duration=5.0)
    with pytest.raises(InputError, match="was read as"):
        pipe(read_video(clip, rates[:1], 8))


def test_public_names(model_folder: Path) -> None:
    assert mfmjt.Pipeline is Pipeline
    assert Pipeline.from_pretrained(str(model_folder), device="cpu").network.config.name == "nano"


def test_loading_and_generating_import_no_compiler(model_folder: Path, clip: Path) -> None:
    code = (
        "import sys, mfmjt\n"
        f"pipe = mfmjt.Pipeline.from_pretrained({str(model_folder)!r}, device='cpu')\n"
        f"pipe({str(clip)!r})\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no model nonsense"):
        Pipeline.from_pretrained("nonsense")
    with pytest.raises(InputError, match=r"network\.safetensors"):
        Pipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["network", "codec", "encoders"])
@pytest.mark.parametrize("fault", ["missing", "empty", "garbage", "another part", "cut"])
def test_foreign_checkpoints(model_folder: Path, tmp_path: Path, part: str, fault: str) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    file = folder / f"{part}.safetensors"
    content = file.read_bytes()
    file.unlink()
    if fault == "empty":
        file.write_bytes(b"")
    elif fault == "garbage":
        file.write_bytes(np.random.default_rng(0).bytes(1000))
    elif fault == "another part":
        other = "codec" if part == "network" else "network"
        shutil.copy(folder / f"{other}.safetensors", file)
    elif fault == "cut":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=part) as error:
        Pipeline.from_pretrained(folder, device="cpu")
    assert "\n" not in str(error.value)


def test_parts_of_different_models(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", latent_dim=16)
    with pytest.raises(InputError, match="parts of one model"):
        Pipeline.from_pretrained(folder)


def test_devices_and_dtypes(model_folder: Path) -> None:
    with pytest.raises(InputError, match="device"):
        Pipeline.from_pretrained(model_folder, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device"):
            Pipeline.from_pretrained(model_folder, device="cuda")
    with pytest.raises(InputError, match="int8"):
        Pipeline.from_pretrained(model_folder, device="cpu", dtype=torch.int8)


@pytest.mark.gpu
def test_cuda_makes_the_same_sound(model_folder: Path, clip: Path, pipe: Pipeline) -> None:
    cuda = Pipeline.from_pretrained(model_folder, device="cuda")
    made, expected = one(cuda(clip)).waveform, one(pipe(clip)).waveform
    error = float((made - expected).square().mean() / expected.square().mean())
    assert error < torch.finfo(torch.float32).eps ** 0.5  # tf32 and the order of sums
