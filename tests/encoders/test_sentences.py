"""Sentence encoders: the mean of BERT's states, and the folders they are in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mfmjt.encoders.sentences import SentenceEncoder
from mfmjt.errors import InputError
from tests.support.texts import SENTENCES, needs_transformers, write_bert

needs_transformers()
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("model") / "minilm")


@torch.inference_mode()
def test_a_sentence_is_the_mean_of_its_states_of_unit_length(folder: Path) -> None:
    encoder = SentenceEncoder(folder)
    bert = transformers.BertModel.from_pretrained(folder).eval()
    together = encoder(SENTENCES)
    assert together.shape == (len(SENTENCES), encoder.dim)
    for sentence, found in zip(SENTENCES, together, strict=True):
        ids, mask = encoder.tokens([sentence])
        states = bert(ids[:, : int(mask.sum())]).last_hidden_state[0].double()
        expected = states.mean(0) / states.mean(0).norm()
        # Padding adds terms of weight zero; what is left is the rounding of some hundred sums.
        assert float((found - expected).norm()) <= 200 * torch.finfo(torch.float32).eps


def test_the_vocabulary_is_that_of_the_tokenizer(folder: Path) -> None:
    words = SentenceEncoder(folder).tokens.vocabulary()
    assert {"dog", "barks", "[CLS]"} < set(words)
    assert words == sorted(words)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("model.safetensors", "holds no weights"), ("tokenizer.json", "has no tokenizer")],
)
def test_a_folder_without_a_part_is_refused(
    folder: Path, tmp_path: Path, missing: str, message: str
) -> None:
    part = tmp_path / "part"
    shutil.copytree(folder, part, ignore=shutil.ignore_patterns(missing))
    with pytest.raises(InputError, match=message):
        SentenceEncoder(part)
