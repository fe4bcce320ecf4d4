"""MMAudio's published files as a pipeline: real layouts, names and arithmetic, small sizes."""

from __future__ import annotations

import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mfmjt import cli
from mfmjt.codec import MMAudioCodec
from mfmjt.convert import from_mmaudio
from mfmjt.encoders import MMAudioEncoders
from mfmjt.errors import InputError, RunError
from mfmjt.families import mmaudio
from mfmjt.meanflow import Sampling
from mfmjt.media import VideoStream
from mfmjt.model import MFMJT, load_mmaudio, to_mmaudio_state_dict
from mfmjt.model.published import NETWORK_FILES
from mfmjt.pipeline import Pipeline
from tests.oracle import allowance, error
from tests.pipeline.conftest import one
from tests.support.clips import moving, write_video
from tests.support.published import CLIP_CONFIG, SIZES, SYNC_CONFIG, VAES, VOCODERS, network_state


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_mmaudio(folder, device="cpu", check="name", **SIZES)


@pytest.fixture(scope="module")
def short_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 s at 30 frames a second, wider than high."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return write_video(path, frames=60, rate=30, size=(48, 80), picture=moving)


def test_it_is_a_flow_matching_network_and_knows_its_defaults(
    pipe: Pipeline, short_clip: Path
) -> None:
    assert pipe.sampling == Sampling(25, 4.5, "cfg", instantaneous=True)
    assert pipe.bundle.window == 8
    seen: list[float] = []

    def progress(stage: str, part: float) -> None:
        if stage == "generate":
            seen.append(part)

    default = one(pipe(short_clip, prompt="a dog barks", progress=progress)).waveform
    assert len(set(seen)) == 1 + 25
    said = one(pipe(short_clip, prompt="a dog barks", steps=25, guidance=4.5, mode="cfg"))
    assert torch.equal(default, said.waveform)
    assert default.shape == (1, 32_000)
    assert float(default.std()) > 0


def test_it_is_the_published_sampling(pipe: Pipeline, folder: Path, short_clip: Path) -> None:
    """Euler's method on the published velocity, from its own noise at time 0 to data at 1."""
    made = one(pipe(short_clip, prompt="rain", seed=3, steps=4))
    frames = pipe.encoders
    net = load_mmaudio(folder / "weights" / "mmaudio_small_16k.pth")
    whole: tuple[list, list] = ([], [])
    for block in VideoStream(short_clip, (8, 25), fit=(torch.from_numpy,) * 2, pick="next"):
        for kept, pieces in zip(whole, block, strict=True):
            kept += pieces
    seen, synced = (torch.cat(pieces)[None] for pieces in whole)
    with torch.inference_mode():
        given = {
            "video": frames.encode_frames(seen[:, :16]),
            "sync": frames.encode_sync(synced[:, :50]),
            "text": frames.encode_text(["rain"]),
        }
        assert given["video"].shape == (1, 16, 24)
        assert given["sync"].shape == (1, 40, 12)  # (50 - 16) // 8 + 1 segments of 8
        x = torch.randn(1, 63, 20, generator=torch.Generator().manual_seed(3))
        lengths = {"video": 16, "sync": 40}
        null = net.conditions(
            video=net.empty_clip_feat.expand(1, lengths["video"], -1),
            sync=net.empty_sync_feat.expand(1, lengths["sync"], -1),
        )
        for step in range(4):
            t = torch.full((1,), 1 - step / 4)
            with_all, without = net(x, t, t, **given), net(x, t, t, cond=null)
            velocity = -(4.5 * with_all - 3.5 * without)
            x = x + velocity / 4
        waveform = pipe.codec.decode(net.unnormalize(x))[:, :32_000]
    terms = 4 * 256 * 12
    assert error(made.waveform, waveform) <= allowance(waveform, torch.float32, terms)


@pytest.mark.parametrize("duration", [0.05, 0.5, 1.9])
def test_any_duration(pipe: Pipeline, short_clip: Path, duration: float) -> None:
    audio = one(pipe(short_clip, duration=duration, steps=1))
    assert audio.waveform.shape == (1, round(16_000 * duration))


def test_longer_than_a_window(pipe: Pipeline, tmp_path: Path) -> None:
    clip = write_video(tmp_path / "long.mp4", frames=130, size=(24, 32), picture=moving)
    pipe.bundle.window = 2
    try:
        audio = one(pipe(clip, steps=1))
        cached = [one(pipe(clip, steps=1, cache=tmp_path / "cache")) for _ in range(2)]
    finally:
        pipe.bundle.window = 8
    assert audio.waveform.shape == (1, 83_200)
    assert all(torch.equal(audio.waveform, c.waveform) for c in cached)


def test_a_long_prompt_is_cut_with_a_note(pipe: Pipeline) -> None:
    words = " ".join(["a"] * 75)
    assert one(pipe(prompt=words, duration=0.5, steps=1)).notes == ()
    (note,) = one(pipe(prompt=f"{words} lost words", duration=0.5, steps=1)).notes
    assert "'lost words'" in note


@pytest.mark.parametrize("part", ["network", "ends"])
def test_bfloat16_stays_close(pipe: Pipeline, folder: Path, short_clip: Path, part: str) -> None:
    way = {"dtype" if part == "network" else "ends_dtype": torch.bfloat16}
    half = Pipeline.from_mmaudio(folder, "small_16k", "cpu", check="name", **way, **SIZES)
    assert half.codec.vae.data_std.dtype == torch.float32
    rough, exact = (one(p(short_clip, steps=2)).waveform for p in (half, pipe))
    assert float((rough - exact).square().mean() / exact.square().mean()) < 0.5
    assert not torch.equal(rough, exact)


def test_an_error_leaves_no_thread_behind(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = write_video(tmp_path / "long.mp4", frames=1000, size=(16, 16), picture=moving)
    monkeypatch.setattr(pipe.codec, "decode", lambda latent: latent[..., 0] / 0.0)
    with pytest.raises(RunError, match="not finite") as caught:
        pipe(clip, steps=1)
    assert caught.tb is not None  # what an interpreter keeps of an error keeps nothing running
    assert "mfmjt-ahead" not in [thread.name for thread in threading.enumerate()]


def test_a_converted_network_runs_on_the_same_ends(
    folder: Path, tmp_path: Path, pipe: Pipeline
) -> None:
    mine = shutil.copytree(folder, tmp_path / "mine")
    published = mine / "weights" / "mmaudio_small_16k.pth"
    from_mmaudio(published, mine / "network.safetensors")
    published.unlink()
    again = Pipeline(
        MFMJT.load(mine / "network.safetensors"),
        MMAudioCodec.from_folder(mine, "16k", "name", VAES["16k"], VOCODERS["16k"]),
        MMAudioEncoders.from_folder(mine, "name", CLIP_CONFIG, SYNC_CONFIG),
        "cpu",
    )
    made, expected = (one(p(prompt="rain", duration=1.0, steps=2)) for p in (again, pipe))
    torch.testing.assert_close(made.waveform, expected.waveform)
    # Found by its folder, too: these small files are not the published ones.
    with pytest.raises(InputError, match=r"v1-16\.pth has .* 655M.*best_netG\.pt has .* 429M"):
        Pipeline.from_pretrained(mine, device="cpu")


# --- files -------------------------------------------------------------------------------------


def test_all_that_is_missing_is_named_with_its_publisher(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        Pipeline.from_mmaudio(tmp_path, "large_44k_v2")
    message = str(caught.value)
    assert "\n" not in message
    for name, publisher in (
        ("mmaudio_large_44k_v2.pth", "huggingface.co/hkchengrex/MMAudio"),
        ("v1-44.pth", "github.com/hkchengrex/MMAudio/releases"),
        ("bigvgan_generator.pt", "huggingface.co/nvidia/bigvgan_v2_44khz_128band_512x"),
        ("open_clip_pytorch_model.bin", "huggingface.co/apple/DFN5B-CLIP-ViT-H-14-384"),
        ("synchformer_state_dict.pth", "github.com/hkchengrex/MMAudio/releases"),
    ):
        assert name in message
        assert publisher in message.split(name, 1)[1]


def test_sizes_and_digests_are_compared(folder: Path) -> None:
    with pytest.raises(InputError, match="601M") as caught:
        Pipeline.from_mmaudio(folder, "small_16k")
    for stated in ("601M", "655M", "429M", "907M"):
        assert stated in str(caught.value)
    with pytest.raises(InputError, match="No check 'sometimes'"):
        Pipeline.from_mmaudio(folder, "small_16k", check="sometimes")  # type: ignore[arg-type]


def test_published_files_are_those_of_the_facts() -> None:
    assert {name: (f.size, f.md5[:4]) for name, f in NETWORK_FILES.items()} == {
        "small_16k": ("601M", "af93"),
        "small_44k": ("601M", "babd"),
        "medium_44k": ("2.4G", "5a56"),
        "large_44k": ("3.9G", "fed9"),
        "large_44k_v2": ("3.9G", "01ad"),
    }


def test_which_network(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no network 'small'"):
        Pipeline.from_mmaudio(folder, "small")
    both = shutil.copytree(folder, tmp_path / "both")
    shutil.copy(both / "weights" / "mmaudio_small_16k.pth", both / "mmaudio_small_44k.pth")
    with pytest.raises(InputError, match=r"several networks.*small_16k\.pth.*small_44k\.pth"):
        Pipeline.from_pretrained(both)
    with pytest.raises(InputError, match="601M"):
        Pipeline.from_pretrained(both / "weights" / "mmaudio_small_16k.pth")


def test_a_damaged_file_is_named(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "ext_weights" / "best_netG.pt").write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"best_netG\.pt cannot be read"):
        Pipeline.from_mmaudio(broken, check="name", **SIZES)
    state = network_state("small_16k")
    state["latent_mean"] = torch.zeros(1, 1, 3)
    torch.save(state, broken / "weights" / "mmaudio_small_16k.pth")
    with pytest.raises(InputError, match="latent_std has shape"):
        Pipeline.from_mmaudio(broken, check="name", **SIZES)


def test_on_the_command_line(
    folder: Path, tmp_path: Path, short_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sized = partial(mmaudio.open_published, check="name", sizes=mmaudio.Sizes(**SIZES))
    monkeypatch.setattr(mmaudio, "open_published", sized)
    for model in (folder, folder / "weights" / "mmaudio_small_16k.pth"):
        out = tmp_path / "out.mp4"
        arguments = ["generate", short_clip, "--model", model, "--steps", "2", "-o", out,
                     "--device", "cpu", "--cache", tmp_path / "cache"]  # fmt: skip
        result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        assert out.stat().st_size > 1000
        out.unlink()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_layout_comes_back_bit_for_bit(folder: Path) -> None:
    path = folder / "weights" / "mmaudio_small_16k.pth"
    state = torch.load(path, weights_only=True)
    again = to_mmaudio_state_dict(load_mmaudio(path))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())
