"""A negative prompt stands for the null text in the pass that guidance leads away from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mfmjt.errors import InputError
from mfmjt.media import Video, read_video
from mfmjt.pipeline import Audio, Pipeline, Request, generate_together
from tests.oracle import allowance, error
from tests.pipeline.conftest import one

TERMS = 3 * 256 * 12  # steps, the widest product, layers
GAIN = 3 + 2  # w and |1 - w|: what guidance makes of the rounding of both passes


@pytest.fixture(scope="module")
def pipes(model_folder: Path, pipe: Pipeline) -> dict[bool, Pipeline]:
    """By whether they are compiled."""
    return {False: pipe, True: Pipeline.from_pretrained(model_folder, device="cpu", compile=True)}


@pytest.fixture(scope="module")
def held(pipe: Pipeline, clip: Path) -> Video:
    rates = pipe.encoders.video_fps, pipe.encoders.sync_fps
    return read_video(clip, rates, pipe.encoders.frame_size)


@contextmanager
def null_text(pipe: Pipeline, text: str) -> Iterator[None]:
    """The network's null text is this one meanwhile."""
    null = pipe.network.empty_string_feat
    kept = null.data
    null.data = pipe.encoders.encode_text([text])[0].detach()
    try:
        yield
    finally:
        null.data = kept


def wave(made: Any) -> torch.Tensor:
    return torch.cat([a.waveform for a in (made if isinstance(made, list) else [made])])


@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("mode", ["cfg", "cfg_scaled"])
@pytest.mark.parametrize("given", ["video text", "video", "text"])
def test_it_is_a_second_pass_by_hand(
    pipes: dict[bool, Pipeline], held: Video, given: str, mode: Any, steps: int, compile: bool
) -> None:
    pipe = pipes[compile]
    video, prompt = held if "video" in given else None, "a bell" if "text" in given else None
    made = one(
        pipe(video, prompt, steps, 3.0, mode, seed=5, duration=1.2, negative_prompt="footsteps")
    )
    net, encoders = pipe.network, pipe.encoders
    length, *counts = pipe.bundle.lengths(1.2)
    with torch.inference_mode():
        features, null = {}, {"text": encoders.encode_text(["footsteps"])}
        if video is not None:
            seen, synced = (
                torch.from_numpy(frames)[None, [min(i, len(frames) - 1) for i in range(count)]]
                for frames, count in zip(held.frames, counts, strict=True)
            )
            features = {"video": encoders.encode_frames(seen), "sync": encoders.encode_sync(synced)}
        if prompt is not None:
            features["text"] = encoders.encode_text([prompt])
        x = torch.randn(1, length, 20, generator=torch.Generator().manual_seed(5))
        for step in range(steps, 0, -1):
            t, r = torch.full((1,), step / steps), torch.full((1,), (step - 1) / steps)
            u, away = net(x, r, t, **features), net(x, r, t, **null)
            scale = (u * away).sum() / away.square().sum() if mode == "cfg_scaled" else 1.0
            x = x - (3 * u - 2 * scale * away) / steps
        waveform = pipe.codec.decode(net.unnormalize(x))[:, : made.waveform.shape[1]]
    assert error(made.waveform, waveform) <= GAIN * allowance(waveform, torch.float32, TERMS)
    assert not torch.allclose(
        made.waveform, wave(pipe(video, prompt, steps, 3.0, mode, 5, 1.2)), rtol=0.1
    )


@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize(
    "given", [{"duration": 11.0}, {"duration": 0.7, "count": 2}], ids=["windows", "two"]
)
def test_in_windows_and_batches(
    pipes: dict[bool, Pipeline], given: dict[str, Any], compile: bool
) -> None:
    pipe = pipes[compile]
    made = wave(pipe(prompt="a bell", negative_prompt="rain", **given))
    # A pipeline of its own, since a prepared network keeps what it has computed of its null text.
    with null_text(pipes[False], "rain"):
        torch.testing.assert_close(made, wave(pipes[False](prompt="a bell", **given)))


@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
def test_requests_with_and_without_sound_as_alone(
    pipes: dict[bool, Pipeline], held: Video, compile: bool
) -> None:
    pipe = pipes[compile]
    requests = [
        Request(held, "a bell", negative_prompt="rain"),
        Request(held, "a bell"),
        Request(held, negative_prompt="rain", count=2, modes=("cfg", "cfg_scaled")),
        Request(held, "a bell", negative_prompt=" "),
        Request(prompt="a bell", duration=1.2, negative_prompt="a drum", steps=2),
        Request(prompt="a bell", duration=1.2, steps=2),
    ]
    together = generate_together(pipe, requests)
    assert not any(isinstance(made, Exception) for made in together)
    for request, made in zip(requests, together, strict=True):
        (alone,) = generate_together(pipe, [request])
        torch.testing.assert_close(wave(made), wave(alone))
    torch.testing.assert_close(wave(together[3]), wave(together[1]))  # an empty one is none


@pytest.mark.parametrize(
    "given", [{"mode": "none"}, {"guidance": 1.0}, {"guidance": 0.5}], ids=repr
)
def test_it_needs_guidance(pipe: Pipeline, given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"negative prompt.*guidance above 1"):
        pipe(prompt="a bell", negative_prompt="rain", duration=0.5, **given)
    assert isinstance(pipe(prompt="a bell", negative_prompt="  ", duration=0.5, **given), Audio)


def test_nothing_but_a_negative_prompt(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="nothing to make sound for"):
        pipe(negative_prompt="rain")


def test_a_long_one_is_cut_with_a_note(pipe: Pipeline) -> None:
    kept = " ".join(f"word{i}" for i in range(pipe.encoders.config.text_length - 1))
    short, long = (
        one(pipe(prompt="a bell", negative_prompt=text, duration=0.32))
        for text in (kept, f"{kept} Lost words")
    )
    assert short.notes == ()
    (note,) = long.notes
    assert "The negative prompt is too long" in note
    assert "'Lost words'" in note
    assert torch.equal(long.waveform, short.waveform)
