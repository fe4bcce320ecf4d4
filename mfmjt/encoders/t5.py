"""Flan-T5's encoder, as MeanAudio and Resonate use it: the states of 77 tokens.

Chung et al., "Scaling Instruction-Finetuned Language Models", 2022, arXiv:2210.11416. The network
is that of Hugging Face's transformers, unchanged. Its attention is told which tokens are padding;
their states are given out all the same, as the published networks were trained with them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mfmjt.checkpoints import load_published, read_content
from mfmjt.encoders.text_model import TextModel, Tokens, import_transformers, open_config
from mfmjt.errors import InputError

__all__ = ["FLAN_T5", "T5"]

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
FLAN_T5 = TextModel("t5", "T5Config", "google/flan-t5-large", ("*.json", "*.safetensors"))
"""What the published networks were trained with: 24 layers of width 1024, 0.3 B parameters."""
_SHARED, _TIED = "shared.weight", "encoder.embed_tokens.weight"  # names of one table


class T5(nn.Module):
    """The encoder of a T5, and its tokenizer.

    Args:
        encoder: A `T5EncoderModel` of transformers.
        tokens: Its tokenizer.

    Attributes:
        dim: Channels of a token's state.
        tokens: The tokenizer.
    """

    def __init__(self, encoder: Any, tokens: Tokens) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokens = tokens
        self.dim: int = encoder.config.d_model

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str] = FLAN_T5.name) -> T5:
        """Load an encoder, in float32, with its tokenizer.

        Args:
            source: A folder in the layout of transformers, with `config.json`, `tokenizer.json`
                and weights (`model.safetensors` or `pytorch_model.bin`, whole or in parts), of the
                encoder alone or with its decoder; or the name of such a repository of Hugging
                Face's hub.

        Raises:
            InputError: There is no such folder, a part of it is missing or damaged, or transformers
                is not installed.
        """
        folder, config, tokens = open_config(FLAN_T5, source)
        files = [path for name in _WEIGHTS if (path := folder / name).is_file()]
        if not files:
            raise InputError(
                f"{folder} holds no weights: neither {' nor '.join(_WEIGHTS)}. Get them from "
                f"{FLAN_T5.publisher}."
            )
        return cls.from_state_dict(read_content(files[0]), config, tokens)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], config: Any, tokens: Tokens) -> T5:
        """Return the encoder of a state dict; that of the decoder is left aside.

        Args:
            state_dict: Names and shapes as in transformers.
            config: Sizes: a `T5Config`.
            tokens: Its tokenizer.

        Raises:
            InputError: Entries of the encoder are missing, unexpected or of another shape; the
                first are named.
        """
        state = dict(state_dict)
        for name, other in ((_SHARED, _TIED), (_TIED, _SHARED)):
            if other in state:  # files hold one of them, or both
                state.setdefault(name, state[other])
        with torch.device("meta"):
            encoder = import_transformers().T5EncoderModel(config)
        load_published(encoder, state, "the encoder of a T5", _of_the_decoder)
        encoder.set_input_embeddings(encoder.shared)  # one table, not two that are equal
        return cls(encoder, tokens).eval()

    def forward(self, texts: list[str]) -> Tensor:
        """Return the states of the tokens of texts, float32 `(len(texts), 77, dim)`."""
        ids, mask = (part.to(self.encoder.device) for part in self.tokens(texts))
        return self.encode(ids, mask)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the last states after the final norm, those of padding included.

        Args:
            ids: Token ids `(B, N)`.
            mask: `(B, N)`, 1 for tokens and 0 for padding, which no token attends to.

        Returns:
            `(B, N, dim)` float32.
        """
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()


def _of_the_decoder(name: str) -> bool:
    return name.startswith(("decoder.", "lm_head."))
