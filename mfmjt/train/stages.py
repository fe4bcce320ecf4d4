"""The chain that makes a model: codec, encoders, features, network; and the classifier, its judge.

Each stage reads its section of one recipe and goes on where an interrupted run of it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mfmjt.errors import InputError
from mfmjt.features.procedural import FeatureExtraction, extract_all
from mfmjt.train.classifier import ClassifierTraining, train_classifier
from mfmjt.train.codec import CodecConfig, train_codec
from mfmjt.train.config import NetworkTraining, load_config
from mfmjt.train.encoders import EncodersConfig, train_encoders
from mfmjt.train.loop import train

__all__ = ["SETTINGS", "STAGES", "ClassifierStage", "run"]


@dataclass(frozen=True)
class ClassifierStage:
    """Where the classifier goes, and its recipe.

    Attributes:
        out: Folder of the weights and the log.
        training: How it is trained.
    """

    out: str = "output/nano/classifier"
    training: ClassifierTraining = field(default_factory=ClassifierTraining)


SETTINGS: dict[str, Any] = {
    "codec": CodecConfig,
    "encoders": EncodersConfig,
    "features": FeatureExtraction,
    "network": NetworkTraining,
    "classifier": ClassifierStage,
}
"""The dataclass of each stage's settings."""
STAGES = tuple(SETTINGS)
"""The stages, in the order in which they depend on one another."""


def run(stage: str, recipe: str, overrides: Sequence[str] = ()) -> str:
    """Run one stage of a recipe; return a line that says what it made.

    Args:
        stage: One of `STAGES`.
        recipe: A JSON file, or the name of one that ships: `nano`.
        overrides: Settings to change, `key=value` each.

    Raises:
        InputError: An unknown stage or setting, or a file from an earlier stage that is missing.
        RunError: The training diverged or a worker died.
    """
    if stage not in SETTINGS:
        raise InputError(f"Unknown stage {stage!r}. Choose one of {', '.join(STAGES)}.")
    config = load_config(SETTINGS[stage], recipe, stage, overrides)
    if stage == "codec":
        return f"Wrote {train_codec(config)}."
    if stage == "encoders":
        return f"Wrote {train_encoders(config)}."
    if stage == "features":
        return f"Features are in {extract_all(config)}."
    if stage == "classifier":
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        train_classifier(config.training, out / "classifier.safetensors", out / "log.jsonl")
        return f"Wrote {out / 'classifier.safetensors'}."
    result = train(config)
    skipped = f" ({result.skipped} steps were not finite)" if result.skipped else ""
    if result.finished:
        return f"Trained {result.step} steps{skipped}. Wrote {result.network}."
    return f"Stopped at step {result.step}{skipped}. The same command goes on from there."
