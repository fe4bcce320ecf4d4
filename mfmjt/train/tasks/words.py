"""Training of the text encoder to put words and sentences where a sentence encoder puts them.

Sanh et al., 2019, arXiv:1910.01108 call this distillation. A linear map of the mean of the text
features, thrown away afterwards, learns the teacher's embedding itself; without it the means learn
how alike the teacher finds the texts of a batch (Park et al., 2019, arXiv:1904.05068). A network
trained on these features then hears of a hound what it has learned of a dog.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.encoders import NanoEncoders, NanoEncodersConfig
from mfmjt.encoders.nano import word_pieces
from mfmjt.errors import InputError, reason
from mfmjt.train.tasks.procedural import ProceduralTask, ProceduralTraining, whole_batch
from mfmjt.train.tasks.teacher import named_right
from mfmjt.train.trainer import Batch, TrainingResult, train

__all__ = ["TextTask", "TextTraining", "starting_rows", "train_text"]

_ROUNDS = 60  # of the conjugate gradients, for the rows to start from
_RIDGE = 1e-3
_HELD_OUT = 50  # one text of so many is kept for validation
_ALIKE = 5.0  # weight of the error of likenesses, whose squares are small


@dataclass(frozen=True)
class TextTraining(ProceduralTraining):
    """How the text encoder is trained.

    Attributes:
        teacher: Words, texts and their embeddings, from the stage `teacher`.
        batch: Texts per step.
        model: Sizes of the encoders; those of frames are written as they start, for the stage
            `encoders` to train.

    No clips are rendered: `clips`, `validation_clips` and `workers` are not looked at.
    """

    out: Path = Path("runs/text")
    teacher: Path = Path("output/foley/teacher.npz")
    steps: int = 3000
    batch: int = 256
    lr: float = 2e-3
    save_every: int = 500
    model: NanoEncodersConfig = field(default_factory=NanoEncodersConfig)


class _Student(nn.Module):
    """The encoders, and the map to the teacher's numbers that only the training needs."""

    def __init__(self, config: NanoEncodersConfig, dim: int) -> None:
        super().__init__()
        self.encoders = NanoEncoders(config)
        self.text = self.encoders.text_encoder
        self.head = nn.Linear(config.dim, dim)

    def pooled(self, texts: list[str]) -> Tensor:
        """Return the mean of all 32 features `(B, dim)`: those of padding have seen the words."""
        return self.text(texts).mean(1)


class TextTask(ProceduralTask):
    """The text encoder.

    Raises:
        InputError: The teacher's file is missing or is none.
    """

    title = "text"
    figures = ("loss", "cosine", "alike")

    def __init__(self, recipe: TextTraining) -> None:
        words, self.texts, self.embeddings = _read(recipe.teacher)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.student = _Student(recipe.model, self.embeddings.shape[1])
        self.student.encoders.vocabulary = frozenset(words)
        alone = {text: i for i, text in enumerate(self.texts)}
        known = [word for word in words if word in alone]
        taught = torch.from_numpy(self.embeddings[[alone[word] for word in known]]).float()
        rows = self.student.text.rows
        with torch.no_grad():
            rows.weight.copy_(starting_rows(known, taught, *rows.weight.shape))
        super().__init__(recipe, self.student)
        held_out = np.arange(len(self.texts)) % _HELD_OUT == _HELD_OUT - 1
        self.training, self.held_out = np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def draw(self, step: int) -> Batch:
        """Draw texts and their embeddings."""
        rng, _ = self.generators(step)
        rows = self.training[rng.integers(len(self.training), size=self.recipe.batch)]
        return whole_batch(self.recipe.batch, self.figures, *self._rows(rows))

    def _rows(self, rows: np.ndarray) -> tuple[list[str], Tensor]:
        return [self.texts[i] for i in rows], torch.from_numpy(self.embeddings[rows]).float()

    def loss(self, texts: list[str], taught: Tensor) -> dict[str, Tensor]:
        """Return the distances from the teacher's embeddings and from its likenesses.

        Args:
            texts: Any.
            taught: What the teacher says of them (B, D).
        """
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            pooled = self.student.pooled(texts)
            said = self.student.head(pooled).float()
        cosine = 1 - F.cosine_similarity(said, taught).mean()
        own, theirs = (F.normalize(x, dim=-1) for x in (pooled.float(), taught))
        alike = (own @ own.T - theirs @ theirs.T).square().mean()
        return {"loss": cosine + _ALIKE * alike, "cosine": cosine, "alike": alike}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return distances on texts held out, and how often a phrase is nearest to its own label.

        See `mfmjt.train.tasks.teacher.named_right`.
        """
        parts = np.array_split(self.held_out, max(1, len(self.held_out) // self.recipe.batch))
        found = [self.loss(*self._rows(rows)) for rows in parts]
        means = {name: float(torch.stack([x[name] for x in found]).mean()) for name in found[0]}
        return {"cosine": means["cosine"], "alike": means["alike"], **named_right(self._embed)}

    def _embed(self, texts: list[str]) -> Tensor:
        return torch.cat([self.student.pooled(texts[i : i + 64]) for i in range(0, len(texts), 64)])

    def export(self) -> Path:
        """Write `text.safetensors`, in float16, and `words.txt`."""
        path = Path(self.loop.out) / "text.safetensors"
        self.student.encoders.save(path, torch.float16)
        return path


def starting_rows(words: list[str], taught: Tensor, buckets: int, dim: int) -> Tensor:
    """Return rows `(buckets, dim)` whose means over each word's pieces are what is taught of it.

    That is the regularized least-squares solution, by conjugate gradients, for the embeddings'
    principal components at unit mean square. A text has few of the words: gradients of texts would
    take long to move all rows there. What the words that share a piece have in common goes to the
    piece, from which unknown words are read.

    Args:
        words: Words.
        taught: Their embeddings `(n, D)`.
        buckets: Number of rows.
        dim: Width of a row; what D lacks of it stays 0.
    """
    centered = taught - taught.mean(0)
    _, axes = torch.linalg.eigh(centered.T @ centered)
    target = centered @ axes.flip(1)[:, :dim]
    target = F.pad(target / target.square().mean().sqrt(), (0, dim - target.shape[1]))
    pieces = [word_pieces(word, buckets) for word in words]
    lengths = torch.tensor([len(some) for some in pieces])
    owner = torch.arange(len(words)).repeat_interleave(lengths)
    index = torch.tensor([piece for some in pieces for piece in some])
    share = (1 / lengths)[owner, None]

    def means(rows: Tensor) -> Tensor:
        return torch.zeros(len(words), dim).index_add_(0, owner, rows[index] * share)

    def back(values: Tensor) -> Tensor:
        return torch.zeros(buckets, dim).index_add_(0, index, values[owner] * share)

    rows = torch.zeros(buckets, dim)
    rest = back(target)
    direction, size = rest, rest.square().sum()
    for _ in range(_ROUNDS):
        change = back(means(direction)) + _RIDGE * direction
        step = size / (direction * change).sum().clamp(min=1e-30)
        rows, rest = rows + step * direction, rest - step * change
        before, size = size, rest.square().sum()
        direction = rest + size / before.clamp(min=1e-30) * direction
    return rows


def _read(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            words, texts, embeddings = (file[name] for name in ("words", "texts", "embeddings"))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} does not hold what a sentence encoder says of words: {reason(error)}. "
            "Make it with `mfmjt train teacher`."
        ) from error
    return words.tolist(), texts.tolist(), embeddings


def train_text(recipe: TextTraining) -> TrainingResult:
    """Train the text encoder of `NanoEncoders`; see `mfmjt.train.trainer.train`."""
    return train(recipe.loop(), lambda _: TextTask(recipe))
