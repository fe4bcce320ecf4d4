from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mfmjt.codec import NanoCodec, NanoCodecConfig
from mfmjt.data import foley
from mfmjt.errors import InputError
from mfmjt.train.parallel import Processes
from mfmjt.train.tasks.codec import CodecTask, CodecTraining, SpectralLoss, train_codec
from mfmjt.train.trainer import Trainer
from tests.support.bundles import TINY_CODEC
from tests.support.recordings import write_recordings
from tests.train.states import records, undo

TINY = CodecTraining(
    steps=12, batch=2, seconds=0.256, lr=3e-3, warmup=2, clips=4, validation_clips=1, workers=0,
    log_every=3, save_every=6, bf16=False,
    model=TINY_CODEC,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("codec")
    train_codec(dataclasses.replace(TINY, out=out))
    return out


def test_a_few_steps_help(whole: Path) -> None:
    # On the validation clip: single batches differ by how much of them is silence.
    first, second = (r for r in records(whole) if r["kind"] == "validation")
    assert second["log"] < first["log"]
    assert second["mel_log10"] < first["mel_log10"]


def test_what_is_exported_is_the_averaged_codec(whole: Path) -> None:
    codec = NanoCodec.load(whole / "codec.safetensors")
    last = [r for r in records(whole) if r["kind"] == "validation"][-1]
    sound = torch.from_numpy(np.array(np.load(whole / "validation_1.npy"))).float() / 32767
    with torch.no_grad():
        mean, _ = codec.encode(sound)
        log, _ = SpectralLoss()(codec.decode(mean), sound)
    # The file holds float16, the log five decimals.
    assert float(log) == pytest.approx(last["log"], rel=4 * torch.finfo(torch.float16).eps)


def test_resuming_repeats_the_uninterrupted_run(whole: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    undo(part, 6)
    train_codec(dataclasses.replace(TINY, out=part))
    assert records(part) == records(whole)
    ours, theirs = (NanoCodec.load(f / "codec.safetensors") for f in (part, whole))
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_it_begins_again_when_told(whole: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    train_codec(dataclasses.replace(TINY, out=part, resume=False))
    assert records(part) == records(whole)


def test_refuses_the_state_of_another_model(whole: Path) -> None:
    model = dataclasses.replace(TINY.model, encoder_dim=24)
    with pytest.raises(InputError, match="was trained with model"):
        train_codec(dataclasses.replace(TINY, out=whole, model=model))


def test_spectral_loss_orders_sounds() -> None:
    loss = SpectralLoss()
    clip = torch.from_numpy(foley.clip(0, "train", duration=1.0, render=False).audio)[None]
    log, linear = loss(clip, clip)
    assert float(log) == float(linear) == 0.0
    quieter, later = loss(0.9 * clip, clip), loss(clip.roll(800, -1), clip)
    silent = loss(torch.zeros_like(clip), clip)
    for a, b, c in zip(quieter, later, silent, strict=True):
        assert 0 < float(a) < float(b)
        assert float(a) < float(c)


def test_learning_rate_rises_and_falls_to_a_fiftieth(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, out=tmp_path, steps=100, warmup=10)
    task = CodecTask(config)
    factors = [task.rate(step, step / 100) for step in range(101)]
    assert max(factors) == 1.0
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert math.isclose(factors[(10 + 100) // 2], (1 + 0.02) / 2)
    assert math.isclose(factors[100], 0.02)


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    """Though this optimizer is not told on the device."""
    with Processes() as processes:
        trainer = Trainer(CodecTask(dataclasses.replace(TINY, out=tmp_path)), processes)
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    batch = trainer.task.draw(0)
    batch.passes[0].inputs[1][0, 0, 0] = math.nan  # of the latents' noise
    assert math.isnan(float(trainer.work(batch, trainer._flags())[0]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.tensors().items())


def test_a_decoder_alone_improves_and_leaves_the_latents(whole: Path, tmp_path: Path) -> None:
    start = whole / "codec.safetensors"
    tuned = dataclasses.replace(
        TINY, out=tmp_path, init_from=start, train_encoder=False, mel=1.0, lr=1e-3
    )
    before, after = NanoCodec.load(start), NanoCodec.load(train_codec(tuned).file)
    sound = torch.from_numpy(foley.clip(0, "validation", render=False).audio)[None]
    for one, other in zip(before.encode(sound), after.encode(sound), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not torch.equal(before.head.weight, after.head.weight)
    assert records(tmp_path)[-1]["mel_log10"] < records(whole)[-1]["mel_log10"]


def test_a_decoder_alone_starts_from_the_same_sizes(whole: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(
        TINY, out=tmp_path, init_from=whole / "codec.safetensors", train_encoder=False,
        model=NanoCodecConfig(),
    )  # fmt: skip
    with pytest.raises(InputError, match="other sizes"):
        train_codec(other)


def test_a_start_of_other_sizes_gives_the_tensors_that_fit(whole: Path, tmp_path: Path) -> None:
    start = whole / "codec.safetensors"
    model = dataclasses.replace(TINY.model, latent_dim=TINY.model.latent_dim + 1)
    task = CodecTask(dataclasses.replace(TINY, out=tmp_path, init_from=start, model=model))
    given, own = NanoCodec.load(start).state_dict(), task.codec.state_dict()
    differing = {name for name in own if own[name].shape != given[name].shape}
    assert differing == {
        "posterior.weight", "posterior.bias", "decoder.0.weight"
    }  # fmt: skip
    assert all(torch.equal(own[name], given[name]) for name in own if name not in differing)
    assert task.notes == (f"{len(own) - 3} of {len(own)} tensors start from {start}.",)


def test_recordings_are_trained_on_and_judged(tmp_path: Path) -> None:
    corpus = write_recordings(tmp_path / "corpus")
    recipe = dataclasses.replace(TINY, out=tmp_path, recordings=corpus, recorded=1.0)
    target = CodecTask(recipe).draw(0).passes[0].inputs[0]
    # The recordings are tones of 1 kHz; two semitones and a half are a factor of 1.16.
    spectrum = torch.fft.rfft(target).abs()
    peaks = spectrum.argmax(-1) * 16000 / target.shape[-1]
    assert ((peaks > 860) & (peaks < 1160)).all()
    train_codec(recipe)
    first, second = (r for r in records(tmp_path) if r["kind"] == "validation")
    assert second["recorded_log"] < first["recorded_log"]


def test_a_corpus_without_a_split_is_refused(tmp_path: Path) -> None:
    corpus = write_recordings(tmp_path / "corpus", splits=("validation",))
    with pytest.raises(InputError, match="no recordings of the split train"):
        CodecTask(dataclasses.replace(TINY, out=tmp_path, recordings=corpus))
