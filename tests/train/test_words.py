from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mfmjt.data.wordings import wordings
from mfmjt.encoders import NanoEncoders
from mfmjt.encoders.nano import word_pieces
from mfmjt.errors import InputError
from mfmjt.train.tasks.teacher import TeacherStage, embed_texts, named_right, texts_to_embed
from mfmjt.train.tasks.words import TextTask, TextTraining, starting_rows, train_text
from tests.support.bundles import TINY_ENCODERS
from tests.support.recordings import write_recordings
from tests.support.texts import needs_transformers, write_bert
from tests.train.states import records, undo

WORDS = [f"{first}{second}" for first in ("dog", "rain", "bell") for second in "abcdefghij"]
TINY = TextTraining(
    steps=40, batch=32, lr=1e-2, warmup=2, ema=0.9, log_every=10, save_every=20, bf16=False,
    model=dataclasses.replace(TINY_ENCODERS, buckets=256),
)  # fmt: skip


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of three meanings, each of which ten words have."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.npz"
    texts = [*WORDS, *(f"a {word}" for word in WORDS)]
    meanings = np.eye(3, 8)[np.arange(len(texts)) // 10 % 3]
    np.savez(path, words=np.array(WORDS), texts=np.array(texts), embeddings=meanings)
    return path


@pytest.fixture(scope="module")
def whole(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("text")
    train_text(dataclasses.replace(TINY, out=out, teacher=taught))
    return out


def test_words_come_to_lie_where_the_teacher_has_them(whole: Path) -> None:
    train = records(whole, "train")
    assert train[-1]["loss"] < train[0]["loss"]
    encoders = NanoEncoders.load(whole / "text.safetensors")
    with torch.no_grad():
        means = torch.nn.functional.normalize(encoders.encode_text(WORDS).mean(1), dim=-1)
    alike = (means @ means.T).unflatten(0, (3, 10)).unflatten(2, (3, 10)).mean((1, 3))
    assert torch.equal(alike.argmax(1), torch.arange(3))


def test_rows_start_as_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    words = [f"{a}{b}{c}" for a in "klmn" for b in "aeiou" for c in "prst"]
    taught = torch.randn(len(words), 6, generator=generator)
    rows = starting_rows(words, taught, 32, 8).double()
    assert rows.shape == (32, 8)
    shares = torch.zeros(len(words), 32, dtype=torch.float64)
    for i, word in enumerate(words):
        for piece in word_pieces(word, 32):
            shares[i, piece] += 1 / len(word_pieces(word, 32))
    centered = (taught - taught.mean(0)).double()
    _, axes = torch.linalg.eigh(centered.T @ centered)
    target = centered @ axes.flip(1)
    target /= target.square().mean().sqrt()
    normal = shares.T @ shares + 1e-3 * torch.eye(32, dtype=torch.float64)
    expected = torch.linalg.solve(normal, shares.T @ target)
    # Principal axes have either sign; of six numbers two of the eight columns are empty.
    torch.testing.assert_close(rows[:, 6:], torch.zeros(32, 2, dtype=torch.float64))
    torch.testing.assert_close(rows[:, :6].abs(), expected.abs(), rtol=0, atol=1e-2)


def test_the_export_knows_the_words_of_the_teacher(whole: Path) -> None:
    encoders = NanoEncoders.load(whole / "text.safetensors")
    assert encoders.vocabulary == frozenset(WORDS)
    assert encoders.understood("a doga, a cat") == (["doga"], ["a", "cat"])


def test_validation_says_how_many_phrases_find_their_label(whole: Path) -> None:
    last = records(whole, "validation")[-1]
    assert {"cosine", "alike", "reworded", "unseen"} <= set(last)


def test_resuming_repeats_the_uninterrupted_run(whole: Path, taught: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    undo(part, 20)
    train_text(dataclasses.replace(TINY, out=part, teacher=taught))
    assert records(part) == records(whole)


def test_what_is_no_teachers_file_is_refused(tmp_path: Path) -> None:
    for name, content in (("none.npz", None), ("other.npz", b"PK"), ("lacking.npz", {})):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            np.savez(path, words=np.array(WORDS))
        with pytest.raises(InputError, match="sentence encoder says of words"):
            TextTask(dataclasses.replace(TINY, out=tmp_path, teacher=path))


def test_texts_hold_every_word_and_no_phrase_that_is_kept_back(tmp_path: Path) -> None:
    corpus = write_recordings(tmp_path, labels=("a tin whistle",))
    recipe = TeacherStage(recordings=corpus, frames=1, pairs=20, mixtures=20)
    words, texts = texts_to_embed(recipe, ["[CLS]", "##ing", "hound", "x"])
    assert {"hound", "tin", "dog"} < set(words)
    assert not {"[CLS]", "##ing", "x"} & set(words)
    assert {"hound", "a tin whistle", "a barking dog"} < set(texts)
    assert len(texts) == len(set(texts))
    kept = {text for wording in wordings().values() for text in wording.test}
    assert not kept & set(texts)
    assert texts_to_embed(recipe, ["[CLS]", "##ing", "hound", "x"]) == (words, texts)


def test_a_teacher_that_knows_labels_names_all_right() -> None:
    labels = list(wordings())
    places = {
        text: label
        for label, wording in enumerate(wordings().values())
        for text in (*wording.training, *wording.test, *wording.unseen)
    }
    assert len(set(places.values())) == len(labels)

    def embed(texts: list[str]) -> torch.Tensor:
        return torch.eye(len(labels))[[places[text] for text in texts]]

    assert named_right(embed) == {"reworded": 1.0, "unseen": 1.0}
    turned = torch.eye(len(labels)).roll(1, 0)
    training = {text for wording in wordings().values() for text in wording.training}

    def confused(texts: list[str]) -> torch.Tensor:
        rows = [places[text] for text in texts]
        return torch.eye(len(labels))[rows] if set(texts) <= training else turned[rows]

    assert named_right(confused) == {"reworded": 0.0, "unseen": 0.0}


def test_a_teachers_file_is_what_the_encoder_says(tmp_path: Path) -> None:
    needs_transformers()
    folder = write_bert(tmp_path / "bert", words=["hound", "owl"])
    recipe = TeacherStage(
        out=tmp_path / "new" / "teacher.npz", model=str(folder), frames=1, pairs=4, mixtures=4
    )
    assert "Labels right: reworded" in embed_texts(recipe)
    from mfmjt.encoders.sentences import SentenceEncoder

    with np.load(recipe.out, allow_pickle=False) as file:
        texts, found = file["texts"].tolist(), file["embeddings"]
        assert {"hound", "owl", "dog"} < set(file["words"].tolist())
    row = texts.index("hound")
    said = SentenceEncoder(folder)(["hound"])[0].numpy()
    # Rounded to float16, after sums in another order.
    np.testing.assert_allclose(found[row], said, rtol=0, atol=2**-11)
