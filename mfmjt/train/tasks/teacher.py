"""What a sentence encoder says of words: `mfmjt train teacher`, which the stage `text` learns from.

The texts are every whole word of its vocabulary, alone and in sentences, pairs of such words, and
the captions of recordings. The file holds NumPy arrays, so that training needs no sentence encoder.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.data.recordings import Recordings
from mfmjt.data.wordings import wordings
from mfmjt.encoders.sentences import MINILM, SentenceEncoder
from mfmjt.files import atomic_path
from mfmjt.progress import ProgressBar

__all__ = ["TeacherStage", "embed_texts", "named_right", "texts_to_embed"]

FRAMES = (
    "a {}", "the {}", "the sound of a {}", "a recording of {}", "we hear {}", "a loud {}",
    "sounds of {}", "a {} in the distance", "you can hear a {}", "someone and a {}",
)  # fmt: skip
PAIRS = (
    "a {} {}", "{} and {}", "the {} of a {}", "a {} that {}", "{} on {}", "a {}, then a {}",
    "{} with {} in the background",
)  # fmt: skip
_WORD = re.compile(r"[a-z]{2,}")
_BATCH = 64


@dataclass(frozen=True)
class TeacherStage:
    """What to ask a sentence encoder.

    Attributes:
        out: `.npz` file to write.
        model: Folder of the sentence encoder, or its name on Hugging Face's hub.
        recordings: Corpus whose captions are asked for as well, from `mfmjt data real`.
        frames: Sentences around each word.
        pairs: Texts of two words.
        mixtures: Texts of two captions, or of a caption and a word.
        seed: Of the draws.
        threads: Of PyTorch; 0 leaves its default.
    """

    out: Path = Path("output/foley/teacher.npz")
    model: str = MINILM.name
    recordings: Path | None = None
    frames: int = 2
    pairs: int = 24000
    mixtures: int = 24000
    seed: int = 0
    threads: int = 0


def texts_to_embed(recipe: TeacherStage, vocabulary: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words to teach and the texts that teach them, without repetitions.

    Phrases that are kept back for tests are not among the texts. A word that no caption has is one
    of the vocabulary, as every other.

    Args:
        recipe: What to ask.
        vocabulary: Tokens of the sentence encoder.
    """
    rng = np.random.default_rng(recipe.seed)
    phrases = sorted({text for wording in wordings().values() for text in wording.training})
    if recipe.recordings:
        said = {row.caption for row in Recordings(recipe.recordings).of("train")}
        phrases = sorted({*phrases, *said})
    own = {word for text in phrases for word in re.findall(r"\w+", text.lower())}
    words = sorted({word for word in vocabulary if _WORD.fullmatch(word)} | own)

    def some(items: Sequence[str], count: int) -> list[str]:
        return [items[i] for i in rng.integers(len(items), size=count)]

    texts = [*words, *phrases]
    for word in words:
        chosen = rng.choice(len(FRAMES), size=min(recipe.frames, len(FRAMES)), replace=False)
        texts += [FRAMES[i].format(word) for i in chosen]
    for frame, first, second in zip(
        some(PAIRS, recipe.pairs), some(words, recipe.pairs), some(words, recipe.pairs), strict=True
    ):
        texts.append(frame.format(first, second))
    half = recipe.mixtures // 2
    others = [*some(phrases, half), *some(words, recipe.mixtures - half)]
    for frame, first, second in zip(
        some(PAIRS[1:], len(others)), some(phrases, len(others)), others, strict=True
    ):
        texts.append(frame.format(*((first, second) if rng.uniform() < 0.5 else (second, first))))
    for frame in ("the sound of {}", "a recording of {}", "we hear {}", "you can hear {}"):
        texts += [frame.format(phrase) for phrase in phrases]
    return words, list(dict.fromkeys(texts))


def named_right(
    embed: Callable[[list[str]], Tensor], names: Collection[str] | None = None
) -> dict[str, float]:
    """Return how often the nearest label of a phrase is its own, as shares of phrases.

    A label lies at the mean of its phrases of training. `reworded` are those kept back for tests,
    `unseen` those whose words no caption has.

    Args:
        embed: Embeddings `(n, d)` of n texts.
        names: The labels to choose from, all by default.
    """
    labels = [w for label, w in wordings().items() if names is None or label in names]
    means = [F.normalize(embed(list(w.training)), dim=-1).mean(0) for w in labels]
    centers = F.normalize(torch.stack(means), dim=-1)
    result = {}
    for name, kept in (("reworded", "test"), ("unseen", "unseen")):
        own = [(i, text) for i, w in enumerate(labels) for text in getattr(w, kept)]
        found = F.normalize(embed([text for _, text in own]), dim=-1) @ centers.T
        right = found.argmax(1) == torch.tensor([i for i, _ in own])
        result[name] = float(right.float().mean())
    return result


def embed_texts(recipe: TeacherStage) -> str:
    """Write `words`, `texts` and their `embeddings` (n, d) in float16; return a line about it."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    teacher = SentenceEncoder(recipe.model)
    words, texts = texts_to_embed(recipe, teacher.tokens.vocabulary())
    found = _embed(teacher, texts).half().numpy()
    recipe.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(recipe.out) as temporary:
        np.savez(temporary, words=np.array(words), texts=np.array(texts), embeddings=found)
    right = named_right(functools.partial(_embed, teacher))
    shares = ", ".join(f"{name} {share:.3f}" for name, share in right.items())
    return f"{len(texts)} texts of {len(words)} words are in {recipe.out}. Labels right: {shares}."


def _embed(teacher: SentenceEncoder, texts: Sequence[str]) -> Tensor:
    """Return embeddings `(n, d)`; texts of like length go together, which saves padding."""
    found = torch.empty(len(texts), teacher.dim)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    with ProgressBar("teacher", len(texts), unit="texts", quiet=len(texts) < 1000) as bar:
        for at in range(0, len(order), _BATCH):
            rows = order[at : at + _BATCH]
            found[rows] = teacher([texts[i] for i in rows])
            bar.update(at + len(rows))
    return found
