from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mfmjt.errors import InputError
from mfmjt.evaluate import score
from mfmjt.evaluate.networks import ImageBind
from mfmjt.evaluate.scoring.reading import read_clip
from mfmjt.evaluate.statistics import cosine
from mfmjt.evaluate.watching import watch_imagebind
from tests.evaluate.scoring.conftest import Write, sound
from tests.support.clips import moving, write_video
from tests.support.weights import about, normal, read


def test_desync_of_feature_caches_is_the_public_one(tmp_path: Path) -> None:
    metadata, tensors = about("evaluate", "desync")
    given = {}
    for kind in ("video", "audio"):
        noise, mean = (
            normal(name, metadata["inputs"][name], metadata["seed"])
            for name in (f"input.{kind}", f"input.{kind}_mean")
        )
        given[kind] = noise + 2 * mean.repeat_interleave(7, dim=1)[:, : noise.shape[1]]
    for folder in ("weights", "made", "real"):
        (tmp_path / folder).mkdir()
    torch.save(read("evaluate", "desync")[0], tmp_path / "weights" / "synchformer_state_dict.pth")
    names = [f"clip{i}" for i in range(len(given["video"]))]
    sides = {"made/synchformer_audio": "audio", "real/synchformer_video": "video"}
    for path, kind in sides.items():
        torch.save(dict(zip(names, given[kind], strict=True)), tmp_path / f"{path}.pth")
    # What tells the names of the real sounds.
    torch.save({name: torch.zeros(3) for name in names}, tmp_path / "real" / "passt_logits.pth")
    result = score(
        tmp_path / "made", tmp_path / "real", metrics=["desync"], weights=tmp_path / "weights",
        check="name", protocol="av-benchmark", device="cpu",
    )  # fmt: skip
    assert result.figures["desync"] == pytest.approx(float(tensors["out.desync"]))
    assert "desync_real" not in result.figures
    assert 0 <= result.figures["desync_near"] <= 1


@pytest.fixture(scope="module")
def network() -> ImageBind:
    return ImageBind.from_state_dict(read("evaluate", "imagebind_small")[0])


def clips(write: Write, tmp_path: Path, count: int = 3) -> None:
    (tmp_path / "videos").mkdir()
    for i in range(count):
        write(f"made/clip{i}.wav", sound(i, seconds=4.0, noise=0.05))
        write(f"real/clip{i}.wav", sound(i, seconds=4.0))
        write_video(
            tmp_path / "videos" / f"clip{i}.mp4", frames=104 + i, picture=lambda n, h, w, i=i:
            moving(n * (i + 1), h, w),
        )  # fmt: skip


def test_sounds_and_videos_get_their_cosine(
    write: Write, tmp_path: Path, network: ImageBind
) -> None:
    clips(write, tmp_path)
    write_video(tmp_path / "videos" / "clip2.mp4", frames=60, picture=moving)
    (tmp_path / "weights").mkdir()
    state = read("evaluate", "imagebind_small")[0]
    torch.save(state, tmp_path / "weights" / "imagebind_huge.pth")
    options = {"weights": tmp_path / "weights", "cache": tmp_path / "cache", "workers": 1}
    result = score(
        tmp_path / "made", tmp_path / "real", videos=tmp_path / "videos", metrics=["ib"],
        check="name", device="cpu", **options,
    )  # fmt: skip
    with torch.inference_mode():
        heard, seen = [], []
        for name in ("clip0", "clip1"):
            clip = read_clip(tmp_path / "made" / f"{name}.wav", 4.0, whole=False)
            heard.append(network.encode_audio(clip.at(16000, 4.0, exact=True))[0])
            seen.append(watch_imagebind(network, tmp_path / "videos" / f"{name}.mp4", 4.0)["video"])
        expected = cosine(torch.stack(heard), np.stack(seen)).mean()
    # One thread or several: sums of a thousand terms in another order.
    assert result.figures["ib"] == pytest.approx(float(expected), rel=1e-4)
    assert result.clips == 2
    told = [problem for problem in result.problems if problem.side == "video"]
    assert [problem.name for problem in told] == ["clip2"]
    assert "2.40 s" in told[0].why


def test_too_short_a_video_for_a_pair_of_frames_is_refused(
    tmp_path: Path, network: ImageBind
) -> None:
    path = write_video(tmp_path / "a.mp4", frames=55)
    with pytest.raises(InputError, match="4 s are needed"):
        watch_imagebind(network, path, 2.0)
