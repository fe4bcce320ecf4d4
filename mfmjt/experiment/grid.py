"""One experiment at one size: its settings, its folders, and what its rows are known by."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfmjt import __version__
from mfmjt.errors import InputError
from mfmjt.experiment.base import Arm, Experiment
from mfmjt.features.procedural import FeatureExtraction
from mfmjt.train.recipe import NetworkTraining, as_json, load_config

__all__ = ["NAMES", "Grid", "Job", "load_experiment"]

NAMES = ("guidance", "ratio", "steps", "scale", "elsewhere", "length", "joint", "objectives")
"""Each is a module of this package."""
VERSION = 1
"""Of the rows: another one is not comparable."""
PACKAGE = Path(__file__).parents[1]
QUICK_FEATURES = {"clips": 192, "validation": 64}
QUICK_NETWORK = {"steps": 80, "flow_steps": 0, "warmup": 20, "ema": [0.97]}
QUICK_CLIPS, CLIPS = 24, 96
"""Validation clips that sound is made for, at most."""


def load_experiment(name: str) -> Experiment:
    """Return the experiment of this name.

    Raises:
        InputError: There is none.
    """
    if name not in NAMES:
        raise InputError(f"No experiment {name!r}. Give one of {', '.join(NAMES)}.")
    found: Experiment = importlib.import_module(f"mfmjt.experiment.{name}").EXPERIMENT
    return found


@dataclass(frozen=True)
class Job:
    """One network to train and judge."""

    arm: str
    seed: int

    @property
    def stem(self) -> str:
        """Return a name for files."""
        return f"{re.sub('[^a-z0-9]+', '_', self.arm.lower()).strip('_')}_{self.seed}"


@dataclass(frozen=True)
class Grid:
    """One experiment at one size.

    Attributes:
        name: Of the experiment.
        out: Folder of all experiments: features and networks are shared.
        recipe: A recipe with the sections `features` and `network`, by name or as a file.
        quick: Train few steps on few clips.
        device: As for a training.
    """

    name: str
    out: str
    recipe: str = "pico"
    quick: bool = False
    device: str = "cpu"

    @property
    def folder(self) -> Path:
        """Return where this experiment's results are."""
        return Path(self.out) / self.name

    def arms(self) -> dict[str, Arm]:
        """Return the networks by name."""
        return {arm.name: arm for arm in load_experiment(self.name).arms(self.quick)}

    def features(self, workers: int = 1) -> FeatureExtraction:
        """Return how the features are computed that all networks share."""
        changes = {"workers": workers, **(QUICK_FEATURES if self.quick else {})}
        config = load_config(FeatureExtraction, self.recipe, "features", _texts(changes))
        stem = f"features_{Path(self.recipe).stem}_{config.clips}"
        return dataclasses.replace(
            config,
            out=str(Path(self.out) / stem),
            codec=_own(config.codec),
            encoders=_own(config.encoders),
        )

    def network(self, job: Job) -> NetworkTraining:
        """Return how a network is trained; its folder is named by a digest of all that matters.

        So experiments of one folder share networks that are trained alike.
        """
        features, arms = self.features(), self.arms()
        settings: dict[str, Any] = {
            **(QUICK_NETWORK if self.quick else {}),
            "store": features.out,
            "encoders": features.encoders,
            "codec": None,
            "device": self.device,
            "seed": job.seed,
            "threads": 1,
            "preview_every": 0,
            "validate_every": 0,
            "tensorboard": False,
        }
        for key, given in arms[job.arm].settings.items():
            named = isinstance(given, str) and given.startswith("@")
            settings[key] = str(self.file(Job(given[1:], job.seed))) if named else given
        config = load_config(NetworkTraining, self.recipe, "network", _texts(settings))
        whole = {"steps": config.steps, "flow_steps": config.flow_steps, "clips": features.clips}
        parts = arms[job.arm].shares
        shares = {**parts, "flow_steps": parts.get("steps", 1.0)}
        counts: dict[str, Any] = {
            key: max(round(part * whole[key]), min(whole[key], 1)) for key, part in shares.items()
        }
        config = dataclasses.replace(config, **counts)
        own = dataclasses.replace(config, out="")
        about = json.dumps([as_json(own), self._data(), VERSION], sort_keys=True)
        about = about.replace(f"{self.out}/", "").replace(str(PACKAGE), "")
        digest = hashlib.sha256(about.encode()).hexdigest()[:16]
        return dataclasses.replace(config, out=str(Path(self.out) / "networks" / digest))

    def file(self, job: Job) -> Path:
        """Return where the trained network is."""
        return Path(self.network(job).out) / "network.safetensors"

    def result(self, job: Job) -> Path:
        """Return the file of the rows of one network; it is there when they are complete."""
        return self.folder / "parts" / f"{job.stem}.json"

    def _data(self) -> dict[str, Any]:
        data = as_json(self.features())
        return {key: data[key] for key in ("clips", "seed")}

    def about(self) -> dict[str, Any]:
        """Return what results must share to stand in one folder."""
        arms = {name: dataclasses.asdict(arm) for name, arm in self.arms().items()}
        about = {
            "experiment": self.name,
            "version": f"{__version__}, rows {VERSION}",
            "recipe": self.recipe,
            "quick": self.quick,
            "device": self.device.partition(":")[0],
            "network": self._recipe(),
            "data": self._data(),
            "clips": QUICK_CLIPS if self.quick else CLIPS,
            "arms": arms,
        }
        found: dict[str, Any] = json.loads(json.dumps(about))
        return found

    def _recipe(self) -> dict[str, Any]:
        config = load_config(NetworkTraining, self.recipe, "network")
        wanted = ("steps", "batch", "window", "overrides", "model", "lr", "ratio")
        return {key: as_json(config)[key] for key in wanted} | (QUICK_NETWORK if self.quick else {})


def _own(path: str) -> str:
    """Return a file of the package, which recipes name as in a checkout, wherever that is."""
    inside = PACKAGE.parent / path
    return str(inside) if not Path(path).exists() and inside.exists() else path


def _texts(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
