"""Flan-T5's encoder: numbers, files, and tokens."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from mfmjt.encoders import T5
from mfmjt.errors import InputError
from tests.oracle import allowance, error
from tests.support.texts import needs_transformers, part_weights, write_roberta, write_t5
from tests.support.weights import draw_all, normal

needs_transformers()
transformers = pytest.importorskip("transformers")

VECTORS = Path(__file__).parent / "vectors"
TEXTS = ["a dog barks", "", "rain falls on a tin roof " * 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("model") / "flan-t5-large")


@pytest.fixture(scope="module")
def t5(folder: Path) -> T5:
    return T5.from_pretrained(folder)


@torch.inference_mode()
def test_it_is_the_published_encoder() -> None:
    with safe_open(VECTORS / "t5_encoder_tiny.safetensors", "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        ids, mask, truth = map(file.get_tensor, ("in.ids", "in.mask", "out.hidden"))
    shapes, seed, sizes = metadata["shapes"], metadata["seed"], metadata["sizes"]
    state = draw_all(shapes, seed)
    for name, shape in shapes.items():
        if name == "shared.weight":
            state[name] = normal(name, shape, seed)
        elif name.endswith("relative_attention_bias.weight"):
            state[name] = 0.5 * normal(name, shape, seed)
        elif name.endswith("SelfAttention.q.weight"):  # T5 does not scale attention's products
            state[name] /= sizes["d_kv"] ** 0.5
    t5 = T5.from_state_dict(state, transformers.T5Config(**sizes), None)
    made = t5.encode(ids.long(), mask.long())
    assert float((made - truth).norm() / truth.norm()) <= 1e-5


@torch.inference_mode()
def test_texts_become_the_states_of_77_tokens(folder: Path, t5: T5) -> None:
    """As the library itself reads the folder: tokenizer, decoder left aside, weights."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(
        TEXTS, max_length=77, padding="max_length", truncation=True, return_tensors="pt"
    )
    theirs = transformers.T5EncoderModel.from_pretrained(folder).eval()
    truth = theirs(**given).last_hidden_state
    ids, mask = t5.tokens(TEXTS)
    assert torch.equal(ids, given.input_ids)
    assert torch.equal(mask, given.attention_mask)
    assert mask.sum(1).tolist() == [len(tokenizer(TEXTS[0]).input_ids), 1, 77]
    made = t5(TEXTS)
    assert made.shape == (3, 77, t5.dim)
    assert torch.equal(made, truth)
    # What stands in a row of padding depends on the text, which it attends to.
    assert not torch.allclose(made[0, 76], made[1, 76])


def test_there_is_one_table_of_words(t5: T5) -> None:
    assert t5.encoder.shared is t5.encoder.encoder.embed_tokens


@torch.inference_mode()
def test_other_forms_of_the_same_weights(folder: Path, tmp_path: Path, t5: T5) -> None:
    truth = t5(TEXTS[:1])
    parts = shutil.copytree(folder, tmp_path / "parts")
    part_weights(parts)
    old = shutil.copytree(folder, tmp_path / "old")
    state = transformers.T5ForConditionalGeneration.from_pretrained(folder).state_dict()
    torch.save(state, old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    alone = shutil.copytree(folder, tmp_path / "alone")
    transformers.T5EncoderModel.from_pretrained(folder).save_pretrained(alone)
    for path in (parts, old, alone):
        assert torch.equal(T5.from_pretrained(path)(TEXTS[:1]), truth)


@torch.inference_mode()
def test_half_precision_is_computed_in_and_given_as_float32(folder: Path) -> None:
    t5 = T5.from_pretrained(folder)
    truth = t5(TEXTS[:1])
    made = t5.bfloat16()(TEXTS[:1])
    assert made.dtype == torch.float32
    assert error(made, truth) <= allowance(truth, torch.bfloat16, 100)


@given(st.text())
def test_any_text_has_tokens(t5: T5, text: str) -> None:
    ids, mask = t5.tokens([text])
    assert ids.shape == mask.shape == (1, 77)
    count = int(mask.sum())
    assert ids[0, count - 1] == 1
    assert not bool(ids[0, count:].any())


# --- files -------------------------------------------------------------------------------------


def without(folder: Path, new: Path, name: str) -> Path:
    shutil.copytree(folder, new)
    (new / name).unlink()
    return new


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("tokenizer.json", r"has no tokenizer: tokenizer\.json is missing.*google/flan-t5-large"),
        ("model.safetensors", r"no weights: neither model\.safetensors nor.*google/flan-t5-large"),
        ("config.json", r"no model of the kind 't5': it has no config\.json that says so"),
    ],
)
def test_what_is_missing_is_named(folder: Path, tmp_path: Path, missing: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        T5.from_pretrained(without(folder, tmp_path / "copy", missing))


def test_another_model_is_told_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is of the kind 'roberta'"):
        T5.from_pretrained(write_roberta(tmp_path / "roberta"))
    with pytest.raises(InputError, match=re.escape(f"no folder {tmp_path / 'nowhere'}")):
        T5.from_pretrained(tmp_path / "nowhere")


def test_damaged_files_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "model.safetensors"):
        copy = shutil.copytree(folder, tmp_path / name)
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match=re.escape(str(copy))) as caught:
            T5.from_pretrained(copy)
        assert "\n" not in str(caught.value)


def test_weights_of_another_size_are_named(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_layers": 1, "d_ff": 32}))
    with pytest.raises(InputError, match=r"wi_0\.weight has shape.*unexpected encoder\.block\.1"):
        T5.from_pretrained(copy)


def test_without_transformers_it_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'mfmjt\[text\]'"):
        T5.from_pretrained(folder)
