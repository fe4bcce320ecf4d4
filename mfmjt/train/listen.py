"""Metrics at validations: what `mfmjt evaluate` says of a network while it is trained."""

from __future__ import annotations

import math

import numpy as np
import torch

from mfmjt.codec import Codec
from mfmjt.encoders import NanoEncoders
from mfmjt.errors import InputError, RunError
from mfmjt.evaluate.classifier import load_classifier
from mfmjt.evaluate.examples import silent, stored
from mfmjt.evaluate.listening import Networks
from mfmjt.evaluate.sounds import Made, Sounds
from mfmjt.families import Bundle
from mfmjt.features.store import FeatureStore
from mfmjt.meanflow import Sampling
from mfmjt.model import MFMJT
from mfmjt.progress import Progress, stage_bar
from mfmjt.train.recipe import NetworkTraining

__all__ = ["Listening"]

FLOW_MATCHING = Sampling(steps=25, instantaneous=True)


class Listening:
    """Makes sound for the first validation clips, always from the same noise, and measures it.

    The figures are those of `mfmjt.evaluate.run.evaluate` with seed 0 on these clips of the store,
    in the network's own sampling, or in 25 steps where it is trained by flow matching alone.
    What the judges hear in the clips' own sound is kept from one validation to the next.

    Args:
        config: Which metrics, of how many clips.
        store: The validation clips, on the device of the training.
        codec: Decodes latents; on that device.
        network: As the training starts: all is measured of it once, so that what cannot be is
            known before the first step.

    Raises:
        InputError: Weights of a judge are missing, the clips are too few, or what a metric needs
            is not known of them.
    """

    def __init__(
        self, config: NetworkTraining, store: FeatureStore, codec: Codec, network: MFMJT
    ) -> None:
        self.metrics = config.chosen_metrics()
        self.sampling = FLOW_MATCHING if config.ratio == 0 else None
        self.codec, self.device = codec, store.device
        with torch.device("meta"):  # nothing is asked of them: the store has the features
            self.encoders = NanoEncoders()
        self.networks = Networks(config.metric_weights, device=self.device)
        for metric in self.metrics:
            self._find(metric.name, metric.needs)
        if not store.has_text and any(store.captions):
            raise InputError(
                f"metrics={','.join(config.metrics)}: the captions of {store.folder} have no "
                "features, and encoders=null. Give the encoders that the store was made with."
            )
        self.classifier = load_classifier()
        with stage_bar() as progress:
            self.examples = stored(
                store,
                self._bundle(network),
                config.metric_clips,
                split="validation",
                progress=progress,
            )
            audio, rate = self.examples.audio, self.examples.sample_rate
            self.real = Sounds(audio, rate, self.classifier, networks=self.networks)
            found = self.measure(network, progress)
        for metric in self.metrics:
            if not any(figure.key in found for figure in metric.figures):
                raise InputError(
                    f"metrics={metric.name}: {store.folder} does not hold what it needs, such as "
                    "classes, onsets or videos of its clips. Leave it out."
                )

    def _find(self, name: str, needs: tuple[str, ...]) -> None:
        try:
            for network in needs:
                self.networks.find(network)
        except InputError as error:
            raise InputError(
                f"metrics={name}: {error} Name its folder with metric_weights=."
            ) from error

    def _bundle(self, network: MFMJT) -> Bundle:
        return Bundle(network, self.codec, self.encoders, self.sampling).to(self.device)

    def measure(self, network: MFMJT, progress: Progress = silent) -> dict[str, float]:
        """Return the figures of a network; all are NaN where its sound is not finite.

        Args:
            network: Its parameters are frozen: it must not be the one that is trained.
            progress: Called as (stage, fraction done).
        """
        self.real.rng = np.random.default_rng(0)  # as in an evaluation of its own
        found: dict[str, float] = {}
        try:
            made = Made(
                self._bundle(network),
                self.examples,
                self.classifier,
                progress=progress,
                networks=self.networks,
            )
            for done, metric in enumerate(self.metrics):
                progress(metric.name, done / len(self.metrics))
                score = metric.score(made, self.real, self.examples)
                found |= {} if score is None else score.figures
        except RunError:
            return {figure.key: math.nan for metric in self.metrics for figure in metric.figures}
        return {key: float(value) for key, value in found.items()}
