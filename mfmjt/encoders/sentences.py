"""Sentence encoders in the layout of sentence-transformers: BERT, the mean of its states.

Reimers and Gurevych, 2019, arXiv:1908.10084. `mfmjt train teacher` uses one to say which words mean
the same; what is trained by its word does not need it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.checkpoints import load_published, read_content
from mfmjt.encoders.text_model import TextModel, import_transformers, open_config
from mfmjt.errors import InputError

__all__ = ["MINILM", "SentenceEncoder"]

# What the publisher's file carries and the mean of states does not need.
_OTHERS = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
MINILM = TextModel(
    "bert", "BertConfig", "sentence-transformers/all-MiniLM-L6-v2", ("*.json", "*.safetensors")
)
"""Six layers of width 384, 22 M parameters, Apache-2.0."""


class SentenceEncoder(nn.Module):
    """A sentence encoder whose sentences are means of their tokens' states, of unit length.

    Args:
        source: A folder with `config.json`, `tokenizer.json` and `model.safetensors`, or the name
            of such a repository of Hugging Face's hub.

    Attributes:
        dim: Numbers of an embedding.
        tokens: The tokenizer; sentences of more than 77 tokens are cut.

    Raises:
        InputError: There is no such folder, a part of it is missing or damaged, or transformers is
            not installed.
    """

    def __init__(self, source: str | os.PathLike[str] = MINILM.name) -> None:
        super().__init__()
        folder, config, self.tokens = open_config(MINILM, source)
        files = [path for name in _WEIGHTS if (path := folder / name).is_file()]
        if not files:
            raise InputError(
                f"{folder} holds no weights: neither {' nor '.join(_WEIGHTS)}. Get them from "
                f"{MINILM.publisher}."
            )
        self.dim: int = config.hidden_size
        self.bert = import_transformers().BertModel(config, add_pooling_layer=False).eval()
        state = read_content(files[0])
        load_published(self.bert, state, "a sentence encoder", lambda name: name in _OTHERS)

    @torch.inference_mode()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings `(len(texts), dim)`, float32, of unit length."""
        ids, mask = self.tokens(texts)
        longest = int(mask.sum(1).max())
        ids, mask = ids[:, :longest], mask[:, :longest]
        states = self.bert(ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
