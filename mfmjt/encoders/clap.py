"""The text half of LAION's CLAP, as MeanAudio uses it: one vector of a whole text.

Wu et al., 2023, arXiv:2211.06687: RoBERTa's pooled state, two linear layers, unit length. RoBERTa
is that of Hugging Face's transformers, unchanged; its weights are in CLAP's own file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.checkpoints import PublishedFile, about, load_published, read_content, weights_in
from mfmjt.encoders.text_model import TextModel, Tokens, import_transformers, open_config

__all__ = ["CLAP_FILE", "ROBERTA", "CLAPText"]

CLAP_FILE = PublishedFile(
    "music_speech_audioset_epoch_15_esc_89.98.pt",
    "https://huggingface.co/lukewys/laion_clap",
    "2243.5M",
    sha256="51c68f12f9d7ea25fdaaccf741ec7f81e93ee594455410f3bca4f47f88d8e006",
    license="CC0-1.0",
)
"""The CLAP that MeanAudio was trained with, and is judged with: HTSAT-base, without fusion."""
ROBERTA = TextModel("roberta", "RobertaConfig", "FacebookAI/roberta-base", ("*.json",))
"""Sizes and tokenizer of its text half: 12 layers of width 768."""
_MARK = "text_branch.embeddings.word_embeddings.weight"
_WIDTH = 512  # of the space that CLAP compares sounds and texts in
_OTHERS = (
    "audio_branch.",
    "audio_projection.",
    "audio_transform.",
    "text_transform.",
    "logit_scale_",
    "text_branch.embeddings.position_ids",
)
"""What CLAP's file holds beside this half, and a table that is computed."""


class CLAPText(nn.Module):
    """RoBERTa, the projection of its pooled state, and its tokenizer.

    Args:
        config: Sizes of RoBERTa: a `RobertaConfig` of transformers.
        tokens: Its tokenizer.

    Attributes:
        dim: Channels of a text's vector: 512.
        tokens: The tokenizer.
        notes: One line each on what was odd about the file that it was read from.
    """

    notes: tuple[str, ...] = ()
    dim = _WIDTH

    def __init__(self, config: Any, tokens: Tokens) -> None:
        super().__init__()
        self.tokens = tokens
        self.text_branch = import_transformers().RobertaModel(config)
        self.text_projection = nn.Sequential(
            nn.Linear(config.hidden_size, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH)
        )

    @classmethod
    def from_files(
        cls, checkpoint: str | os.PathLike[str], roberta: str | os.PathLike[str] = ROBERTA.name
    ) -> CLAPText:
        """Load the text half, in float32, with its tokenizer.

        Args:
            checkpoint: CLAP's file, such as `music_speech_audioset_epoch_15_esc_89.98.pt`.
            roberta: A folder with RoBERTa's `config.json` and `tokenizer.json`, or the name of
                such a repository of Hugging Face's hub. Its weights are not read.

        Raises:
            InputError: There is no such file or folder, a part is missing, damaged or of another
                size, or transformers is not installed.
        """
        _, config, tokens = open_config(ROBERTA, roberta)
        with about(checkpoint, CLAP_FILE):
            return cls.from_state_dict(read_content(checkpoint), config, tokens)

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Any], config: Any, tokens: Tokens
    ) -> CLAPText:
        """Return the text half of a published state dict; that of sounds is left aside.

        Args:
            state_dict: Names and shapes as published, or a checkpoint with these inside.
            config: Sizes of RoBERTa: a `RobertaConfig`.
            tokens: Its tokenizer.

        Raises:
            InputError: Entries of the text half are missing, unexpected or of another shape; the
                first are named.
        """
        what = "a CLAP with RoBERTa"
        state, notes = weights_in(state_dict, _MARK, what)
        with torch.device("meta"):
            clap = cls(config, tokens)
        load_published(clap, state, what, lambda name: name.startswith(_OTHERS))
        # Two tables of RoBERTa's are computed, and so in no file.
        positions = torch.arange(config.max_position_embeddings)[None]
        embeddings = clap.text_branch.embeddings
        embeddings.position_ids, embeddings.token_type_ids = positions, torch.zeros_like(positions)
        clap.notes = notes
        return clap.eval()

    def forward(self, texts: list[str]) -> Tensor:
        """Return a vector of unit length for each text, float32 `(len(texts), 512)`."""
        ids, mask = (part.to(self.text_branch.device) for part in self.tokens(texts))
        return self.encode(ids, mask)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return a vector of unit length for each text.

        Args:
            ids: Token ids `(B, N)`.
            mask: `(B, N)`, 1 for tokens and 0 for padding, which no token attends to.

        Returns:
            `(B, 512)` float32.
        """
        pooled = self.text_branch(input_ids=ids, attention_mask=mask).pooler_output
        return F.normalize(self.text_projection(pooled).float(), dim=-1)
