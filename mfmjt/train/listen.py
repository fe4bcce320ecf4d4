"""Metrics at validations: what `mfmjt evaluate` says of a network while it is trained."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from mfmjt.codec import Codec
from mfmjt.encoders import NanoEncoders
from mfmjt.errors import InputError, RunError
from mfmjt.evaluate.classifier import load_classifier
from mfmjt.evaluate.examples import stored
from mfmjt.evaluate.listening import Networks, Unheard
from mfmjt.evaluate.sounds import Made, Sounds
from mfmjt.families import Bundle
from mfmjt.features.store import FeatureStore
from mfmjt.model import MFMJT
from mfmjt.train.recipe import NetworkTraining

__all__ = ["Listening"]

FLOW_STEPS = 25


class Listening:
    """Makes sound for the first validation clips, always from the same noise, and measures it.

    The figures are those of `mfmjt.evaluate.run.evaluate` with seed 0 on these clips of the store.
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
        self.metrics, self.flow = config.chosen_metrics(), config.ratio == 0
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
        self.examples = stored(store, self._bundle(network), config.metric_clips, 0, "validation")
        self.classifier = load_classifier()
        audio, rate = self.examples.audio, self.examples.sample_rate
        self.real = Sounds(audio, rate, self.classifier, networks=self.networks)
        found = self.measure(network)
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
        except Unheard as error:
            raise InputError(
                f"metrics={name}: {error} Name its folder with metric_weights=."
            ) from error

    def _bundle(self, network: MFMJT) -> Bundle:
        bundle = Bundle(network, self.codec, self.encoders).to(self.device)
        if self.flow:
            bundle.sampling = dataclasses.replace(
                bundle.sampling, steps=FLOW_STEPS, instantaneous=True
            )
        return bundle

    def measure(self, network: MFMJT) -> dict[str, float]:
        """Return the figures of a network that is no part of the training's graph.

        They are not a number where its sound is not finite.
        """
        try:
            made = Made(
                self._bundle(network), self.examples, self.classifier, networks=self.networks
            )
        except RunError:
            return {figure.key: math.nan for metric in self.metrics for figure in metric.figures}
        self.real.rng = np.random.default_rng(0)
        found: dict[str, float] = {}
        for metric in self.metrics:
            score = metric.score(made, self.real, self.examples)
            found |= {} if score is None else score.figures
        return {key: float(value) for key, value in found.items()}
