"""The chain that makes a model: codec, encoders, features, network; and the classifier, its judge.

A text encoder may be trained before the encoders, by the word of a sentence encoder, its teacher.

Each stage reads its section of one recipe and goes on where an interrupted run of it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mfmjt.errors import InputError
from mfmjt.features.procedural import FeatureExtraction, extract_all
from mfmjt.processes import rank_and_world
from mfmjt.train.recipe import NetworkTraining, load_config
from mfmjt.train.tasks.classifier import ClassifierStage, train_classifier
from mfmjt.train.tasks.codec import CodecTraining, train_codec
from mfmjt.train.tasks.encoders import EncodersTraining, train_encoders
from mfmjt.train.tasks.network import train_network
from mfmjt.train.tasks.teacher import TeacherStage, embed_texts
from mfmjt.train.tasks.words import TextTraining, train_text

__all__ = ["STAGES", "run"]

STAGES: dict[str, tuple[type[Any], Callable[[Any], object]]] = {
    "codec": (CodecTraining, train_codec),
    "teacher": (TeacherStage, embed_texts),
    "text": (TextTraining, train_text),
    "encoders": (EncodersTraining, train_encoders),
    "features": (FeatureExtraction, lambda config: f"Features are in {extract_all(config)}."),
    "network": (NetworkTraining, train_network),
    "classifier": (ClassifierStage, train_classifier),
}
"""The settings of each stage and what runs it, in the order in which they depend on one another."""
SHARED = ("features", "network")
"""Stages that several processes can share."""


def run(stage: str, recipe: str, overrides: Sequence[str] = ()) -> str:
    """Run one stage of a recipe; return a line that says what it made.

    Args:
        stage: One of `STAGES`.
        recipe: A JSON file, or the name of one that ships: `nano`.
        overrides: Settings to change, `key=value` each.

    Raises:
        InputError: An unknown stage or setting, a file from an earlier stage that is missing, or
            several processes for a stage that one makes.
        RunError: The training diverged or a worker died.
    """
    if stage not in STAGES:
        raise InputError(f"Unknown stage {stage!r}. Choose one of {', '.join(STAGES)}.")
    _, world = rank_and_world()
    if world > 1 and stage not in SHARED:
        raise InputError(
            f"The stage {stage} is made by one process, not {world}. Start it without torchrun; "
            f"it is {' and '.join(SHARED)} that are shared."
        )
    settings, work = STAGES[stage]
    return str(work(load_config(settings, recipe, stage, overrides)))
