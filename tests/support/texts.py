"""Small text models of random weights, in the folders and files in which people have them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mfmjt.encoders.clap import CLAP_FILE
from mfmjt.model import MFMJT, config_for
from tests.support.peers import load_torchvision
from tests.support.published import VAES, VOCODERS, vae_shapes, vocoder_shapes
from tests.support.weights import draw_all

SENTENCES = [
    "a dog barks twice",
    "rain falls on a tin roof",
    "a man speaks while a bell rings",
    "water splashes, birds sing and an engine starts",
    "someone plays the guitar in a large hall",
]
T5_SIZES = {
    "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "tie_word_embeddings": False,
}  # fmt: skip
ROBERTA_SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 90, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
NETWORK = {"hidden_dim": 64, "num_heads": 1, "depth": 2, "fused_depth": 1, "text_dim": 48}


def needs_transformers() -> None:
    """Skip a test where the extra is not installed."""
    load_torchvision()  # which transformers imports where it is installed
    pytest.importorskip("transformers", reason="the text encoders need the extra 'text'")


def write_t5(folder: Path, **sizes: object) -> Path:
    """Save a T5 with its decoder, as Hugging Face's hub has Flan-T5."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()  # the published one also maps a few characters more
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", "$A </s> $B </s>", [("</s>", 1)]
    )
    _write_tokenizer(
        folder, tokenizer, "T5Tokenizer", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        extra_ids=0, additional_special_tokens=[], model_max_length=512,
    )  # fmt: skip
    config = T5Config(**{"vocab_size": tokenizer.get_vocab_size() + 6, **T5_SIZES, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def write_roberta(folder: Path, **sizes: object) -> Path:
    """Save the sizes and the tokenizer of a RoBERTa, and not its weights, which CLAP's file has."""
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import RobertaConfig

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        SENTENCES, vocab_size=300, special_tokens=special, show_progress=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(folder))  # vocab.json and merges.txt
    tokenizer._tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    _write_tokenizer(
        folder, tokenizer._tokenizer, "RobertaTokenizer", bos_token="<s>", cls_token="<s>",
        pad_token="<pad>", eos_token="</s>", sep_token="</s>", unk_token="<unk>",
        mask_token="<mask>", model_max_length=512,
    )  # fmt: skip
    vocabulary = tokenizer.get_vocab_size()
    sizes = {"vocab_size": vocabulary, "pad_token_id": 1, **ROBERTA_SIZES, **sizes}
    RobertaConfig(**sizes).save_pretrained(folder)
    return folder


def write_bert(folder: Path, words: Sequence[str] = ()) -> Path:
    """Save a BERT with its pooling layer, as sentence-transformers lays one out."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    known = dict.fromkeys([*special, *" ".join(SENTENCES).replace(",", "").split(), *words, ","])
    tokenizer = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(known)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    _write_tokenizer(folder, tokenizer, "BertTokenizer", pad_token="[PAD]", unk_token="[UNK]")
    sizes = {name: ROBERTA_SIZES[name] for name in ROBERTA_SIZES if name != "type_vocab_size"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(known), **sizes)).save_pretrained(folder)
    return folder


def _write_tokenizer(folder: Path, tokenizer: object, kind: str, **settings: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **settings}))


def clap_shapes(roberta: Path) -> dict[str, list[int]]:
    """Names and shapes of CLAP's file for a folder of RoBERTa's, written down without our modules.

    Of the half for sounds there are two.
    """
    c = json.loads((roberta / "config.json").read_text())
    d, inner = c["hidden_size"], c["intermediate_size"]
    shapes = {
        "logit_scale_a": [],
        "audio_branch.bn0.weight": [64],
        "text_branch.embeddings.word_embeddings.weight": [c["vocab_size"], d],
        "text_branch.embeddings.position_embeddings.weight": [c["max_position_embeddings"], d],
        "text_branch.embeddings.token_type_embeddings.weight": [1, d],
    }

    def linear(name: str, outer: int, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [outer, width], [outer]

    norms = ["text_branch.embeddings.LayerNorm"]
    for i in range(c["num_hidden_layers"]):
        at = f"text_branch.encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{at}.attention.{part}", d, d)
        linear(f"{at}.intermediate.dense", inner, d)
        linear(f"{at}.output.dense", d, inner)
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    for norm in norms:
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = [d]
    linear("text_branch.pooler.dense", d, d)
    linear("text_projection.0", 512, d)
    linear("text_projection.2", 512, 512)
    linear("text_transform.sequential.0", 512, 512)
    return shapes


def clap_state(roberta: Path) -> dict[str, Tensor]:
    """Random weights under the names of CLAP's file, a computed table included."""
    shapes = clap_shapes(roberta)
    table = torch.arange(shapes["text_branch.embeddings.position_embeddings.weight"][0])[None]
    return {**draw_all(shapes), "text_branch.embeddings.position_ids": table}


def write_clap(folder: Path, roberta: Path) -> Path:
    """Save it as published: a training's checkpoint, behind DDP's prefix."""
    state = {f"module.{name}": value for name, value in clap_state(roberta).items()}
    path = folder / CLAP_FILE.name
    torch.save({"epoch": 15, "name": "clap", "state_dict": state}, path)
    return path


def part_weights(folder: Path) -> None:
    """Make two files and an index of the weights of a folder."""
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2]}
    parts["model-00002-of-00002.safetensors"] = names[1::2]
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, folder / file)
    where = {name: file for file, held in parts.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "model.safetensors").unlink()


def meanaudio_state(name: str, **changes: object) -> dict[str, Tensor]:
    """Random weights of a small network of MeanAudio's family, in the published layout."""
    changes = {**NETWORK, **({"pooled_dim": 48} if name == "resonate" else {}), **changes}
    with torch.device("meta"):
        net = MFMJT(config_for(name, **changes))
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    if net.config.second_time != "r":
        shapes = {key: shape for key, shape in shapes.items() if not key.startswith("r_embed.")}
    return draw_all(shapes)


def write_meanaudio(folder: Path, network: str, name: str = "meanaudio_s") -> Path:
    """Save a network of a configuration in a file, and all that goes with it, as people have it.

    T5, RoBERTa and CLAP lie where the publisher's own code downloads them to.
    """
    weights = folder / "weights"
    weights.mkdir(parents=True)
    torch.save(meanaudio_state(name), weights / network)
    codec, vae, vocoder = (
        ("44k", "v1-44.pth", "bigvgan_generator.pt")
        if name == "resonate"
        else ("16k", "v1-16.pth", "best_netG.pt")
    )
    torch.save(draw_all(vae_shapes(VAES[codec])), weights / vae)
    torch.save({"generator": draw_all(vocoder_shapes(VOCODERS[codec]))}, weights / vocoder)
    write_t5(folder / "google" / "flan-t5-large")
    if name != "resonate":
        write_clap(weights, write_roberta(folder / "roberta-base"))
    return folder
