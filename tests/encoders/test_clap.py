"""The text half of CLAP: numbers and files."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from mfmjt.encoders import CLAPText
from mfmjt.errors import InputError
from tests.oracle import allowance, error
from tests.support.texts import clap_state, needs_transformers, write_clap, write_roberta, write_t5
from tests.support.weights import draw_all

needs_transformers()
transformers = pytest.importorskip("transformers")

VECTORS = Path(__file__).parent / "vectors"
TEXTS = ["a dog barks", "", "rain falls on a tin roof " * 20]


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_roberta(tmp_path_factory.mktemp("model") / "roberta-base")


@pytest.fixture(scope="module")
def file(roberta: Path) -> Path:
    return write_clap(roberta.parent, roberta)


@pytest.fixture(scope="module")
def clap(file: Path, roberta: Path) -> CLAPText:
    return CLAPText.from_files(file, roberta)


@torch.inference_mode()
def test_it_is_the_published_encoder() -> None:
    """At the published size, which is what `RobertaConfig` states but for a few numbers."""
    with safe_open(VECTORS / "clap_text.safetensors", "pt") as file:
        shapes, seed = (json.loads(file.metadata()[key]) for key in ("shapes", "seed"))
        ids, mask, truth = map(file.get_tensor, ("in.ids", "in.mask", "out.text"))
    sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    config = transformers.RobertaConfig(**sizes, layer_norm_eps=1e-5, pad_token_id=1)
    clap = CLAPText.from_state_dict(draw_all(shapes, seed), config, None)
    made = clap.encode(ids.long(), mask.long())
    assert float((made - truth).norm() / truth.norm()) <= 1e-5


@torch.inference_mode()
def test_texts_become_unit_vectors(roberta: Path, clap: CLAPText) -> None:
    """As the public code goes: the library's tokenizer and RoBERTa, two layers, unit length."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(roberta)
    given = tokenizer(
        TEXTS, max_length=77, padding="max_length", truncation=True, return_tensors="pt"
    )
    ids, mask = clap.tokens(TEXTS)
    assert torch.equal(ids, given["input_ids"])
    assert torch.equal(mask, given["attention_mask"])
    state = clap_state(roberta)
    theirs = transformers.RobertaModel(transformers.RobertaConfig.from_pretrained(roberta)).eval()
    of_roberta = {k.removeprefix("text_branch."): v for k, v in state.items()}
    theirs.load_state_dict({k: of_roberta[k] for k in theirs.state_dict()})
    x = theirs(**given).pooler_output
    for i in (0, 2):
        x = F.linear(x.relu() if i else x, *(state[f"text_projection.{i}.{p}"] for p in PARTS))
    assert torch.equal(clap(TEXTS), F.normalize(x, dim=-1))


PARTS = ("weight", "bias")


def test_long_texts_are_cut_and_still_end(clap: CLAPText) -> None:
    ids, mask = clap.tokens(TEXTS)
    assert ids[2, -1] == 2
    assert mask.sum(1).tolist()[1:] == [2, 77]


@torch.inference_mode()
def test_half_precision_is_computed_in_and_given_as_float32(file: Path, roberta: Path) -> None:
    clap = CLAPText.from_files(file, roberta)
    truth = clap(TEXTS[:1])
    made = clap.bfloat16()(TEXTS[:1])
    assert made.dtype == torch.float32
    assert error(made, truth) <= allowance(truth, torch.bfloat16, 100)


# --- files -------------------------------------------------------------------------------------


def test_a_file_of_another_size_is_refused(file: Path, tmp_path: Path) -> None:
    other = write_roberta(tmp_path / "roberta", hidden_size=48)
    with pytest.raises(InputError) as caught:
        CLAPText.from_files(file, other)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert re.search(r"word_embeddings\.weight has shape \(\d+, 32\), not \(\d+, 48\)", message)
    assert message.endswith("Wanted is what music_speech_audioset_epoch_15_esc_89.98.pt of "
                            "https://huggingface.co/lukewys/laion_clap holds.")  # fmt: skip


def test_what_a_file_holds_beside_it_is_named(roberta: Path, file: Path, tmp_path: Path) -> None:
    state = clap_state(roberta)
    path = tmp_path / "mine.pt"
    torch.save({**state, "text_branch.encoder.layer.7.output.dense.bias": torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"unexpected text_branch\.encoder\.layer\.7"):
        CLAPText.from_files(path, roberta)
    torch.save({"visual.conv1.weight": torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"looks like a CLIP of open_clip"):
        CLAPText.from_files(path, roberta)


def test_a_folder_of_another_model_is_refused(file: Path, roberta: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is of the kind 't5'"):
        CLAPText.from_files(file, write_t5(tmp_path / "t5"))
    copy = shutil.copytree(roberta, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer: .*FacebookAI/roberta-base"):
        CLAPText.from_files(file, copy)


def test_without_transformers_it_says_what_to_install(
    file: Path, roberta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'mfmjt\[text\]'"):
        CLAPText.from_files(file, roberta)
