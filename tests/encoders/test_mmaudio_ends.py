from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mfmjt.codec import MelSpectrogram
from mfmjt.codec.bigvgan import BIGVGAN_CONFIGS, BigVGAN, BigVGANConfig
from mfmjt.codec.mmaudio import MMAudioCodec
from mfmjt.codec.vae import VAE, VAE_CONFIGS
from mfmjt.encoders.clip import CLIP
from mfmjt.encoders.mmaudio import MMAudioEncoders
from mfmjt.encoders.synchformer import Synchformer
from mfmjt.encoders.tokenizer import Tokenizer
from mfmjt.errors import InputError
from tests.oracle import allowance, error
from tests.support.published import (
    CLIP_CONFIG,
    SYNC_CONFIG,
    VAES,
    VOCODERS,
    vae_shapes,
    vocoder_shapes,
)
from tests.support.weights import draw_all

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def same(result, truth, terms=1000):
    assert error(result, truth) <= allowance(truth, torch.float32, terms)


@pytest.fixture(params=["16k", "44k"])
def mode(request):
    return request.param


@pytest.fixture
def codec(mode):
    vae = VAE.from_mmaudio(draw_all(vae_shapes(VAES[mode])), VAES[mode])
    state = draw_all(vocoder_shapes(VOCODERS[mode]))
    return MMAudioCodec(mode, vae, BigVGAN.from_state_dict(state, VOCODERS[mode])).eval()


@pytest.fixture(scope="module")
def encoders(merges):
    torch.manual_seed(0)
    parts = CLIP(CLIP_CONFIG), Synchformer(SYNC_CONFIG), Tokenizer(merges)
    return MMAudioEncoders(*parts, frame_size=(44, 32)).eval().requires_grad_(False)


@torch.inference_mode()
def test_codec_chains_mel_autoencoder_and_vocoder(codec, mode):
    waveform = torch.rand(2, 5 * codec.hop + 3) * 2 - 1
    mean, logvar = codec.encode(waveform)
    assert mean.shape == logvar.shape == (2, 6, codec.latent_dim)
    padded = F.pad(waveform, (0, codec.hop - 3))
    posterior = codec.vae.encode(MelSpectrogram(mode)(padded))
    same(mean, posterior.mean.transpose(1, 2))
    same(logvar, posterior.logvar.transpose(1, 2))
    sound = codec.decode(mean)
    assert sound.shape == (2, 6 * codec.hop)
    assert sound.dtype == torch.float32
    same(sound, codec.vocoder(codec.vae.decode(mean.mT))[:, 0])


def test_codec_lengths_are_those_of_the_networks(codec, mode):
    # 8 s are 250 latents of 512 samples, or 345 of 1024 (which is 8.01 s).
    assert -(-8 * codec.sample_rate // codec.hop) == {"16k": 250, "44k": 345}[mode]


def test_codec_refuses_what_it_cannot_take(codec):
    for bad in (
        torch.zeros(8),
        torch.zeros(1, 0),
        torch.zeros(1, 99, dtype=torch.int16),
        torch.full((1, 99), torch.nan),
    ):
        with pytest.raises(InputError):
            codec.encode(bad)
    for shape in ((1, 4, codec.latent_dim + 1), (4, codec.latent_dim), (1, 0, codec.latent_dim)):
        with pytest.raises(InputError, match=re.escape(str(shape))):
            codec.decode(torch.zeros(shape))


def test_codec_refuses_parts_of_two_modes():
    with pytest.raises(InputError, match="vocoder's bands are 128, not 80"):
        MMAudioCodec("16k", VAE(VAES["16k"]), BigVGAN(VOCODERS["44k"]))
    with pytest.raises(InputError, match="24k"):
        MMAudioCodec.from_folder(".", "24k")


@torch.inference_mode()
def test_frames_are_squashed_and_normalised_for_clip(encoders):
    frames = torch.randint(0, 256, (2, 17, 30, 60, 3), dtype=torch.uint8)
    features = encoders.encode_frames(frames)
    assert features.shape == (2, 17, CLIP_CONFIG.embed_dim)
    for sample, found in zip(frames, features, strict=True):
        small = F.interpolate(sample.movedim(-1, 1), (44, 44), mode="bicubic", antialias=True)
        x = (small.movedim(1, -1).double() / 255 - MEAN) / STD
        same(found, encoders.clip.encode_image(x.movedim(-1, 1).float()))


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, 15, 16, 23, 24, 91])
def test_segments_are_sixteen_frames_eight_apart(encoders, count):
    frames = torch.randint(0, 256, (2, count, 32, 32, 3), dtype=torch.uint8)
    features = encoders.encode_sync(frames)
    segments = max(0, (count - 16) // 8) + 1
    assert features.shape == (2, 8 * segments, SYNC_CONFIG.dim)
    if count < 16:
        frames = torch.cat([frames, *[frames[:, -1:]] * (16 - count)], dim=1)
    x = (frames.movedim(-1, 2).double() / 255 - 0.5) / 0.5
    for s in range(segments):
        truth = encoders.synchformer(x[:, None, 8 * s : 8 * s + 16].float())[:, 0]
        same(features[:, 8 * s : 8 * s + 8], truth)


@torch.inference_mode()
@pytest.mark.parametrize(("height", "width"), [(64, 90), (90, 64), (20, 33)])
def test_synchformer_sees_the_middle_square(encoders, height, width):
    frames = torch.randint(0, 256, (1, 16, height, width, 3), dtype=torch.uint8)
    short = min(height, width)
    size = (int(32 * height / short), int(32 * width / short))
    small = F.interpolate(frames[0].movedim(-1, 1), size, mode="bicubic", antialias=True)
    top, left = round((size[0] - 32) / 2), round((size[1] - 32) / 2)
    middle = small[..., top : top + 32, left : left + 32].movedim(1, -1)
    same(encoders.encode_sync(frames), encoders.encode_sync(middle[None]))


@torch.inference_mode()
def test_text_is_tokenized_and_encoded(encoders):
    texts = ["a dog barks", "", "\U0001f436"]
    features = encoders.encode_text(texts)
    assert features.shape == (3, 77, CLIP_CONFIG.text_dim)
    same(features, encoders.clip.encode_text(encoders.tokenizer(texts)))
    for bad in ("a dog", [], [1]):
        with pytest.raises(InputError, match="list of strings"):
            encoders.encode_text(bad)


def test_encoders_refuse_what_are_no_frames(encoders):
    for bad in (
        torch.zeros(1, 2, 8, 8, 3),
        torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(1, 0, 8, 8, 3, dtype=torch.uint8),
    ):
        for encode in (encoders.encode_frames, encoders.encode_sync):
            with pytest.raises(InputError):
                encode(bad)


@torch.inference_mode()
def test_encoders_run_in_bfloat16(encoders):
    frames = torch.randint(0, 256, (1, 16, 32, 32, 3), dtype=torch.uint8)
    exact = encoders.encode_frames(frames), encoders.encode_sync(frames), encoders.encode_text([""])
    half = MMAudioEncoders(
        CLIP.from_state_dict(encoders.clip.state_dict(), CLIP_CONFIG).bfloat16(),
        Synchformer(SYNC_CONFIG).bfloat16(),
        encoders.tokenizer,
        frame_size=(44, 32),
    )
    half.synchformer.load_state_dict(encoders.synchformer.state_dict())
    found = half.encode_frames(frames), half.encode_sync(frames), half.encode_text([""])
    for result, truth in zip(found, exact, strict=True):
        assert result.dtype == torch.float32
        assert error(result, truth) <= allowance(truth, torch.bfloat16, 100)


ENDS = {
    "autoencoder": lambda e: (e[0].vae, e[0].vae.decode, torch.randn(1, e[0].latent_dim, 6)),
    "vocoder": lambda e: (e[0].vocoder, e[0].vocoder, torch.randn(1, e[0].vae.config.bands, 3)),
    "clip frames": lambda e: (e[1].clip, e[1].clip.encode_image, torch.randn(2, 3, 44, 44)),
    "clip text": lambda e: (e[1].clip, e[1].clip.encode_text, torch.randint(0, 99, (1, 77))),
    "synchformer": lambda e: (e[1].synchformer, e[1].synchformer, torch.randn(1, 2, 16, 3, 32, 32)),
}


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("aot_eager", torch.float32),
        pytest.param("inductor", torch.float32, marks=pytest.mark.slow),
        pytest.param("inductor", torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=["traced", "float32", "bfloat16"],
)
@pytest.mark.parametrize("end", ENDS)
def test_every_end_compiles_without_a_break(merges, end, backend, dtype):
    mode = "16k"
    vae = VAE.from_mmaudio(draw_all(vae_shapes(VAES[mode])), VAES[mode])
    small = BigVGANConfig(80, 8, (2,), (4,), tanh=True, bias=True)
    vocoder = BigVGAN.from_state_dict(draw_all(vocoder_shapes(small)), small)
    codec = SimpleNamespace(vae=vae, vocoder=vocoder, latent_dim=VAES[mode].latent_dim)
    parts = CLIP(CLIP_CONFIG), Synchformer(SYNC_CONFIG), Tokenizer(merges)
    module, forward, x = ENDS[end]((codec, MMAudioEncoders(*parts, frame_size=(44, 32))))
    module.to(dtype).eval().requires_grad_(False)
    truth = forward(x)
    torch.compiler.reset()
    result = torch.compile(forward, fullgraph=True, backend=backend)(x)
    assert result.dtype == truth.dtype
    assert error(result, truth) <= allowance(truth, dtype, 100)


def test_missing_files_are_named_with_their_publisher(tmp_path):
    for load, name, publisher in (
        (lambda: MMAudioCodec.from_folder(tmp_path, "16k"), "v1-16.pth", "MMAudio/releases"),
        (lambda: MMAudioCodec.from_folder(tmp_path, "44k"), "v1-44.pth", "MMAudio/releases"),
        (lambda: MMAudioEncoders.from_folder(tmp_path), "open_clip_pytorch_model.bin", "apple"),
    ):
        with pytest.raises(InputError, match=re.escape(name)) as caught:
            load()
        assert publisher in str(caught.value)


@pytest.mark.slow
def test_published_files_are_found_and_loaded(tmp_path):
    weights = tmp_path / "ext_weights"
    weights.mkdir()
    vae = draw_all(vae_shapes(VAE_CONFIGS["16k"]))
    vocoder = draw_all(vocoder_shapes(BIGVGAN_CONFIGS["16k"]))
    torch.save(vae, weights / "v1-16.pth")
    torch.save({"generator": vocoder}, weights / "best_netG.pt")
    codec = MMAudioCodec.from_folder(tmp_path, "16k")
    latent = torch.randn(1, 2, 20)
    mel = VAE.from_mmaudio(vae, "16k").decode(latent.mT)
    with torch.inference_mode():
        same(codec.decode(latent), BigVGAN.from_state_dict(vocoder, "16k")(mel)[:, 0], 1536 * 11)
    with pytest.raises(InputError, match="69f56803f59a549a1a507c93859fd4d7"):
        MMAudioCodec.from_folder(tmp_path, "16k", check="md5")
