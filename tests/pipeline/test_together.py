from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mfmjt.errors import InputError
from mfmjt.media import Video, read_video
from mfmjt.pipeline import STAGES, Audio, Pipeline, Request, generate_together


@pytest.fixture(scope="module")
def held(pipe: Pipeline, clip: Path) -> Video:
    rates = pipe.encoders.video_fps, pipe.encoders.sync_fps
    return read_video(clip, rates, pipe.encoders.frame_size)


def alone(pipe: Pipeline, request: Request) -> list[Audio]:
    """The same sounds, each from a call of its own."""
    made: list[Audio] = []
    for mode in request.modes or (None,):
        sounds = pipe(
            request.video,
            request.prompt,
            request.steps,
            request.guidance,
            mode,
            request.seed,
            request.duration,
            request.count,
        )
        made += sounds if isinstance(sounds, list) else [sounds]
    return made


def test_sounds_are_those_of_calls_of_their_own(pipe: Pipeline, held: Video) -> None:
    requests = [
        Request(held, seed=3),
        Request(held, "a bell", modes=("cfg", "none", "cfg_scaled"), count=2),
        Request(held, duration=0.7, steps=2),
        Request(None, "rain on tin", duration=1.2),
        Request(None, "two windows and a bit", duration=11.0),
        Request(held, guidance=3.0),
    ]
    for most in (1, 3, 16):
        made = generate_together(pipe, requests, most=most)
        for request, sounds in zip(requests, made, strict=True):
            assert isinstance(sounds, list)
            for sound, expected in zip(sounds, alone(pipe, request), strict=True):
                assert (sound.seed, sound.sample_rate) == (expected.seed, expected.sample_rate)
                torch.testing.assert_close(sound.waveform, expected.waveform)


def test_requests_of_one_shape_are_one_batch(
    pipe: Pipeline, held: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    decode = pipe.codec.decode

    def counted(latent: torch.Tensor) -> torch.Tensor:
        batches.append(len(latent))
        return decode(latent)

    monkeypatch.setattr(pipe.codec, "decode", counted)
    same = [Request(held, seed=i) for i in range(3)]
    generate_together(pipe, [*same, Request(held, "a drum", count=2), Request(held, steps=2)])
    assert sorted(batches) == [1, 5]
    batches.clear()
    generate_together(pipe, same, most=2)
    assert batches == [2, 1]


def test_an_error_is_of_its_request_alone(pipe: Pipeline, held: Video) -> None:
    made = generate_together(
        pipe, [Request(), Request(held), Request(held, duration=5.0), Request(None, "x", steps=0)]
    )
    assert [type(answer) for answer in made] == [InputError, list, InputError, InputError]


def test_progress_goes_forward_and_what_it_raises_ends_the_work(
    pipe: Pipeline, held: Video
) -> None:
    told: list[tuple[str, float]] = []
    requests = [Request(held, steps=2), Request(held, "a prompt " * 200, steps=2)]
    made = generate_together(pipe, requests, lambda *state: told.append(state))
    order = {stage: i for i, stage in enumerate(STAGES)}
    assert [(order[stage], part) for stage, part in told] == sorted(
        (order[stage], part) for stage, part in told
    )
    assert ("generate", 1.0) in told
    assert isinstance(made[1], list)
    assert "too long" in made[1][0].notes[0]

    def stop(stage: str, fraction: float) -> None:
        if stage == "generate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_together(pipe, requests, stop)
