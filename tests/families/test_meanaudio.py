"""MeanAudio's family as a pipeline: real layouts, names and arithmetic, small sizes."""

from __future__ import annotations

import functools
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor

from mfmjt.encoders import T5
from mfmjt.errors import InputError
from mfmjt.families import Bundle, meanaudio, open_bundle
from mfmjt.meanflow import Sampling
from mfmjt.model import load_meanaudio
from mfmjt.model.published import MEANAUDIO_FILES
from mfmjt.pipeline import Audio, Pipeline, Request, generate_together
from tests.oracle import allowance, error
from tests.support.bundles import write_model
from tests.support.commands import refused, run
from tests.support.published import VAES, VOCODERS
from tests.support.texts import meanaudio_state, needs_transformers, write_meanaudio

needs_transformers()

FILES = {
    "meanaudio_s": "meanaudio_s_full.pth",
    "fluxaudio_s": "fluxaudio_s_full.pth",
    "resonate": "Resonate_GRPO.pth",
}
TERMS = 4 * 256 * 12  # steps, the widest product, layers
PROMPT = "rain falls on a tin roof"


@pytest.fixture(scope="module", autouse=True)
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache of the hub, which is not asked; small codecs, which no file is."""
    opened, cache = meanaudio.open_published, tmp_path_factory.mktemp("hub")

    def open_small(folder: Path, *args: Any, **options: Any) -> Bundle:
        codec = "44k" if list(Path(folder).glob("**/v1-44.pth")) else "16k"
        sizes = {"vae": VAES[codec], "vocoder": VOCODERS[codec]}
        return opened(folder, *args, **{**sizes, "check": "name", **options})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meanaudio, "open_published", open_small)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield cache


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_meanaudio(root / name, file, name) for name, file in FILES.items()}


@pytest.fixture(scope="module")
def pipes(folders: dict[str, Path]) -> Callable[..., Pipeline]:
    """Pipelines by the name of their network, opened once."""

    @functools.cache
    def opened(name: str, compile: bool = False) -> Pipeline:
        return Pipeline.from_pretrained(folders[name], "cpu", compile=compile)

    return opened


@pytest.fixture
def folder(folders: dict[str, Path]) -> Path:
    return folders["meanaudio_s"]


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture
def pipe(pipes: Callable[..., Pipeline]) -> Pipeline:
    return pipes("meanaudio_s")


@pytest.fixture(scope="module")
def expected(pipes: Callable[..., Pipeline]) -> Tensor:
    """What every form of the same files gives."""
    return one(pipes("meanaudio_s")(prompt=PROMPT, duration=0.5)).waveform


def one(made: Audio | list[Audio]) -> Audio:
    assert isinstance(made, Audio)
    return made


def sound(model: Path | str, **options: Any) -> Tensor:
    pipe = Pipeline.from_pretrained(model, "cpu", **options)
    return one(pipe(prompt=PROMPT, duration=0.5)).waveform


# --- sound -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_each_knows_its_defaults(pipes: Callable[..., Pipeline], name: str) -> None:
    pipe = pipes(name)
    assert pipe.sampling == (
        Sampling(1, 1.0, "cfg")
        if name == "meanaudio_s"
        else Sampling(25, 4.5, "cfg", instantaneous=True)
    )
    assert pipe.bundle.window == pipe.bundle.duration == 10
    assert (pipe.encoders.clap is None) == (name == "resonate")
    assert pipe.codec.sample_rate == (44_100 if name == "resonate" else 16_000)
    # 9.975 s in training, 10 s in the published demo.
    latents = [pipe.bundle.lengths(seconds).latents for seconds in (9.975, 10.0)]
    assert latents == ([430, 431] if name == "resonate" else [312, 313])


def test_ten_seconds_unless_asked_otherwise(pipe: Pipeline) -> None:
    assert one(pipe(prompt=PROMPT)).waveform.shape == (1, 160_000)


def published(pipe: Pipeline, steps: int, guidance: float, against: str, length: int) -> Tensor:
    """Sample as the public code does: from its own noise, with two passes one after the other."""
    encoders, net = pipe.encoders, pipe.network
    given, empty = encoders.text_features([PROMPT]), encoders.text_features([against])
    x = torch.randn(1, length, net.config.latent_dim, generator=torch.Generator().manual_seed(3))
    for step in range(steps, 0, -1):
        t, r = torch.full((1,), step / steps), torch.full((1,), (step - 1) / steps)
        u = net(x, r, t, **given)
        if guidance >= 1:
            u = guidance * u + (1 - guidance) * net(x, r, t, **empty)
        x = x - u / steps
    return pipe.codec.decode(net.unnormalize(x))


@torch.inference_mode()
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("steps", "guidance", "negative"),
    [(1, 0, ""), (2, 0.9, ""), (1, 4.5, ""), (3, 4.5, ""), (1, 2.0, "a dog barks")],
)
@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
def test_it_is_the_published_sampling(
    pipes: Callable[..., Pipeline],
    name: str,
    steps: int,
    guidance: float,
    negative: str,
    compile: bool,
) -> None:
    """Below 1 one pass, else two, of which one is of the *encoded* empty text."""
    pipe = pipes(name, compile)
    made = one(
        pipe(
            prompt=PROMPT, duration=0.5, steps=steps, guidance=guidance, seed=3,
            negative_prompt=negative or None,
        )
    )  # fmt: skip
    length = pipe.bundle.lengths(0.5).latents
    truth = published(pipe, steps, guidance, negative, length)[:, : made.waveform.shape[1]]
    # Guidance adds up the rounding of both passes.
    gain = max(1.0, 2 * guidance - 1)
    assert error(made.waveform, truth) <= gain * allowance(truth, torch.float32, TERMS)


def test_its_own_defaults_are_those(pipes: Callable[..., Pipeline]) -> None:
    said: dict[str, dict[str, Any]] = {
        "meanaudio_s": {"steps": 1, "guidance": 0.0},
        "fluxaudio_s": {"steps": 25, "guidance": 4.5, "mode": "cfg"},
    }
    for name, options in said.items():
        default, same = (
            one(pipes(name)(prompt=PROMPT, duration=0.2, **given)).waveform
            for given in ({}, options)
        )
        assert torch.equal(default, same)


def test_modes_of_one_request_share_their_features(pipes: Callable[..., Pipeline]) -> None:
    for compile in (False, True):
        pipe = pipes("meanaudio_s", compile)
        alone = [
            one(pipe(prompt=PROMPT, duration=0.5, guidance=3.0, mode=mode)).waveform
            for mode in ("cfg", "none")
        ]
        request = Request(prompt=PROMPT, duration=0.5, guidance=3.0, modes=("cfg", "none"))
        (made,) = generate_together(pipe, [request])
        assert isinstance(made, list)
        for a, b in zip(made, alone, strict=True):
            assert torch.equal(a.waveform, b)
        assert not torch.equal(*alone)


def test_several_requests_are_one_batch(pipe: Pipeline) -> None:
    prompts = [PROMPT, "a dog barks"]
    made = generate_together(pipe, [Request(prompt=p, duration=0.5, count=2) for p in prompts])
    for prompt, sounds in zip(prompts, made, strict=True):
        assert isinstance(sounds, list)
        alone = pipe(prompt=prompt, duration=0.5, count=2)
        assert isinstance(alone, list)
        for a, b in zip(sounds, alone, strict=True):
            torch.testing.assert_close(a.waveform, b.waveform)


def test_longer_than_a_window(pipe: Pipeline) -> None:
    pipe.bundle.window = 2
    try:
        audio = one(pipe(prompt=PROMPT, duration=5.3))
    finally:
        pipe.bundle.window = 10
    assert audio.waveform.shape == (1, 84_800)
    assert bool(audio.waveform.std() > 0)


def test_less_memory_and_less_precision(folder: Path, expected: Tensor) -> None:
    assert torch.equal(sound(folder, low_memory=True), expected)
    rough = Pipeline.from_bundle(open_bundle(folder, dtype=torch.bfloat16), "cpu", torch.float32)
    made = one(rough(prompt=PROMPT, duration=0.5)).waveform
    assert float((made - expected).square().mean() / expected.square().mean()) < 0.5
    assert not torch.equal(made, expected)


# --- prompts -----------------------------------------------------------------------------------


def test_a_language_that_t5_does_not_know_is_noted(pipe: Pipeline) -> None:
    (note,) = one(pipe(prompt="犬が吠える", duration=0.1)).notes
    assert "trained on none of the prompt's words: '犬が吠える'" in note
    (note,) = one(pipe(prompt="a dog 犬", duration=0.1)).notes
    assert "these words of the prompt: '犬'" in note
    assert one(pipe(prompt="a dog", duration=0.1)).notes == ()


def test_a_long_prompt_is_cut_with_a_note(pipe: Pipeline) -> None:
    words = "rain " * 100
    (note,) = one(pipe(prompt=words, duration=0.1)).notes
    assert "its end, from 'rain rain" in note
    unread, tokens = pipe.encoders.unread(words), pipe.encoders.t5.tokens
    read = words[: len(words) - len(unread)]
    whole, cut = tokens.of_word(words), tokens.of_word(read)
    assert cut == whole[: len(cut)]
    assert len(cut) <= tokens.room < len(tokens.of_word(f"{read}rain"))


def test_video_is_refused_with_networks_that_take_it(pipe: Pipeline, clip: Path) -> None:
    with pytest.raises(InputError, match=r"text alone.*Leave the video out.*small_16k") as caught:
        pipe(clip, prompt=PROMPT)
    assert "meanaudio" not in str(caught.value)
    for look in (
        lambda: pipe.encoders.frame_specs,
        lambda: pipe.encoders.encode_frames(torch.zeros(1, 1, 8, 8, 3, dtype=torch.uint8)),
        lambda: pipe.encoders.encode_sync(torch.zeros(1, 1, 8, 8, 3, dtype=torch.uint8)),
    ):
        with pytest.raises(InputError, match="text alone"):
            look()


def test_texts_are_a_list(pipe: Pipeline) -> None:
    for bad in ("a dog", [], [1]):
        with pytest.raises(InputError, match="list of strings"):
            pipe.encoders.text_features(bad)  # type: ignore[arg-type]


def test_a_negative_prompt_needs_guidance(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="negative prompt is what guidance leads away from"):
        pipe(prompt=PROMPT, negative_prompt="music")


# --- files -------------------------------------------------------------------------------------


def test_all_that_is_missing_is_named_with_its_publisher(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "weights" / FILES["meanaudio_s"], tmp_path)
    with pytest.raises(InputError) as caught:
        Pipeline.from_pretrained(tmp_path / FILES["meanaudio_s"])
    message = str(caught.value)
    assert "\n" not in message
    for name, publisher in (
        ("google/flan-t5-large", "huggingface.co/google/flan-t5-large"),
        ("FacebookAI/roberta-base", "huggingface.co/FacebookAI/roberta-base"),
        ("v1-16.pth", "github.com/hkchengrex/MMAudio/releases"),
        ("best_netG.pt", "github.com/hkchengrex/MMAudio/releases"),
        ("music_speech_audioset_epoch_15_esc_89.98.pt", "huggingface.co/lukewys/laion_clap"),
    ):
        assert name in message
        assert publisher in message.split(name, 1)[1]
    # Resonate needs T5 alone.
    torch.save(meanaudio_state("resonate"), tmp_path / "mine.pth")
    with pytest.raises(InputError, match=r"v1-44\.pth.*bigvgan_generator\.pt") as caught:
        Pipeline.from_pretrained(tmp_path / "mine.pth")
    assert "roberta" not in str(caught.value)


def test_published_files_are_those_of_the_facts(folder: Path) -> None:
    assert [file.name for file in MEANAUDIO_FILES.values()] == [
        "meanaudio_s_full.pth",
        "meanaudio_s_ac.pth",
        "meanaudio_l_full.pth",
        "fluxaudio_s_full.pth",
        "fdaudio.pth",
        "driftaudio_from_meanaudio_s_full_step4400.pth",
        "driftaudio_from_fdaudio_step1800.pth",
        "Resonate_GRPO.pth",
        "Resonate_PT.pth",
    ]
    with pytest.raises(InputError, match=r"89\.98\.pt has .* 2243\.5M.*655M.*429M"):
        meanaudio.open_published(folder, check="size")


FORMS: dict[str, Callable[[dict, Path], object]] = {
    "anything.pth": torch.save,
    "ema.pt": lambda state, path: torch.save(
        {f"ema_model.{k}": v for k, v in state.items()}
        | {"_extra_state": torch.zeros(2), "initted": torch.tensor(True)},
        path,
    ),
    "trained.ckpt": lambda state, path: torch.save({"weights": state, "it": 7}, path),
    "network.safetensors": lambda state, path: load_meanaudio(state).save(path),
    "fdaudio.pth": torch.save,
}


@pytest.mark.parametrize("name", FORMS)
def test_the_file_of_a_network_of_any_name_is_a_model(
    copy: Path, name: str, expected: Tensor
) -> None:
    old = copy / "weights" / FILES["meanaudio_s"]
    FORMS[name](torch.load(old), old.with_name(name))
    old.unlink()
    torch.testing.assert_close(sound(old.with_name(name)), expected)
    if name in ("fdaudio.pth", "network.safetensors"):  # of a known name
        (copy / "weights" / name).rename(copy / name)
        torch.testing.assert_close(sound(copy), expected)


def test_of_several_the_first_is_taken_with_a_note(copy: Path, expected: Tensor) -> None:
    state = meanaudio_state("meanaudio_s")
    torch.save(state | {"latent_mean": state["latent_mean"] + 1}, copy / "meanaudio_s_ac.pth")
    pipe = Pipeline.from_pretrained(copy, "cpu")
    assert torch.equal(one(pipe(prompt=PROMPT, duration=0.5)).waveform, expected)
    (note,) = pipe.notes
    assert note.endswith("meanaudio_s_full.pth was taken, not meanaudio_s_ac.pth.")
    assert Pipeline.from_pretrained(copy / "meanaudio_s_ac.pth", "cpu").notes == ()
    write_model(copy)  # ours, of another family, goes before published ones
    assert not meanaudio.holds(copy, True)
    (copy / "network.safetensors").unlink()
    (copy / "mmaudio_small_16k.pth").touch()
    with pytest.raises(InputError, match=r"of MeanAudio's and of MMAudio's: .*mmaudio_small_16k"):
        Pipeline.from_pretrained(copy)


def test_a_network_of_an_unknown_family_is_refused(copy: Path) -> None:
    path = copy / "weights" / FILES["meanaudio_s"]
    state = torch.load(path)
    other = {k: v for k, v in state.items() if not k.startswith("text_cond_proj")}
    torch.save(other, path.with_name("mine.pth"))
    with pytest.raises(InputError, match="of no known family"):
        Pipeline.from_pretrained(path.with_name("mine.pth"))
    torch.save(other, path)
    with pytest.raises(InputError, match=r"meanaudio_s_full\.pth.*its input layers are others"):
        Pipeline.from_pretrained(copy)
    path.write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"meanaudio_s_full\.pth.*web page"):
        Pipeline.from_pretrained(copy)


def test_widths_that_no_encoder_has_are_refused(copy: Path) -> None:
    path = copy / "weights" / "mine.pth"
    torch.save(meanaudio_state("meanaudio_s", pooled_dim=560), path)
    with pytest.raises(InputError, match=r"vector of 560 .* CLAP's 512 and the 48 of T5's mean"):
        Pipeline.from_pretrained(path)
    torch.save(meanaudio_state("meanaudio_s", text_dim=40), path)
    with pytest.raises(InputError, match=r"T5 of width 48, and the network takes 40"):
        Pipeline.from_pretrained(path)


def test_the_t5_of_the_right_width_is_taken(copy: Path, expected: Tensor) -> None:
    other = shutil.copytree(copy / "google" / "flan-t5-large", copy / "a-flan-t5-base")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "d_model": 768}))
    assert torch.equal(sound(copy), expected)


def test_a_repository_of_the_hub_with_t5_and_roberta_in_the_cache(
    folder: Path, hub: Path, expected: Tensor
) -> None:
    revision = "0" * 40
    for name, files in (
        ("somebody/sounds", folder / "weights"),
        ("google/flan-t5-large", folder / "google" / "flan-t5-large"),
        ("FacebookAI/roberta-base", folder / "roberta-base"),
    ):
        known = hub / f"models--{name.replace('/', '--')}"
        (known / "refs").mkdir(parents=True)
        (known / "refs" / "main").write_text(revision)
        shutil.copytree(files, known / "snapshots" / revision)
    assert torch.equal(sound("somebody/sounds"), expected)
    assert T5.from_pretrained("google/flan-t5-large").dim == 48
    shutil.rmtree(hub / "models--google--flan-t5-large")
    with pytest.raises(InputError, match="no folder google/flan-t5-large, and Hugging Face's hub"):
        sound("somebody/sounds")
    shutil.rmtree(hub / "models--FacebookAI--roberta-base")


def test_no_network_is_asked_where_the_files_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch, expected: Tensor
) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("it asked the network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert torch.equal(sound(folder), expected)


# --- command line ------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_a_prompt_on_the_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    model = folder if whole else folder / "weights" / FILES["meanaudio_s"]
    result = run("generate", "--model", model, "--prompt", PROMPT, "--duration", 0.5)
    assert result.exit_code == 0, result.output
    assert "0.50 s of sound" in result.stdout
    assert (tmp_path / "sound.wav").stat().st_size > 16_000


def test_a_video_on_the_command_line(folder: Path, clip: Path) -> None:
    refused(run("generate", clip, "--model", folder), 2, "text alone")
