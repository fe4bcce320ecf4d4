"""The network that a training starts from: fresh, ours, or one that MMAudio has published."""

from __future__ import annotations

import dataclasses

import torch

from mfmjt.errors import InputError
from mfmjt.model import MFMJT, load_mmaudio
from mfmjt.model.checkpoint import is_ours
from mfmjt.model.config import config_for
from mfmjt.model.lora import add_lora
from mfmjt.train.config import NetworkTraining

__all__ = ["AUTO", "starting_network"]

AUTO = "auto"
"""As `model`, the configuration of the network that is started from."""


def starting_network(config: NetworkTraining) -> MFMJT:
    """Make the network, or read it; put adapters in where they are asked for.

    A network that is read keeps its own normalisation of latents and its own null text, and is at
    first the function it was: MMAudio's velocity with the opposite sign, for every r.

    Raises:
        InputError: The file cannot be used, or is of another network than `config.model`; what
            `add_lora` raises.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.init_from is None:
            if config.model == AUTO:
                raise InputError(
                    f"model={AUTO} takes the sizes of the network that is started from, and there "
                    "is none. Give init_from=FILE, or the name of a configuration."
                )
            net = MFMJT.from_config(config.model, **config.overrides)
        else:
            net = _read(config.init_from, config)
        if config.lora is not None:
            add_lora(net, config.lora)
    return net


def _read(path: str, config: NetworkTraining) -> MFMJT:
    if not is_ours(path):
        return load_mmaudio(
            path, None if config.model == AUTO else config.model, **config.overrides
        )
    net = MFMJT.load(path)
    wanted = net.config if config.model == AUTO else config_for(config.model)
    if net.config != dataclasses.replace(wanted, **config.overrides):
        raise InputError(
            f"init_from={path} is another network ({net.config.name}) than model={config.model} "
            "with these overrides. Give a network of the same sizes, or model=auto without "
            "overrides."
        )
    return net
