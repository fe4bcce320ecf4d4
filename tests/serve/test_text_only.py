"""A network that takes no video, served."""

from __future__ import annotations

import pytest

from mfmjt.families import meanaudio
from mfmjt.pipeline import Pipeline
from tests.serve.conftest import Start
from tests.support.published import VAES, VOCODERS
from tests.support.texts import needs_transformers, write_meanaudio

needs_transformers()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = write_meanaudio(tmp_path_factory.mktemp("model") / "text", "meanaudio_s_full.pth")
    bundle = meanaudio.open_published(
        folder, check="name", vae=VAES["16k"], vocoder=VOCODERS["16k"]
    )
    return Pipeline.from_bundle(bundle, "cpu")


def test_prompts_are_taken_and_videos_refused(
    start: Start, pipeline: Pipeline, clip: bytes
) -> None:
    with start(pipeline=pipeline) as server:
        answer = server.generate(prompt="rain", duration=0.2)
        assert answer.status == 202
        assert server.wait(answer.json["id"])["status"] == "done"
        answer = server.generate(clip, prompt="rain")
        assert answer.status == 422
        assert b"makes sound of text alone" in answer.body
