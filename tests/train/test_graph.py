"""A recording and what goes on beside it; what is recorded is judged in test_compile.py."""

from __future__ import annotations

import time
from contextlib import contextmanager

import torch

from mfmjt.train import graph, store
from mfmjt.train.graph import Recorded
from mfmjt.train.parallel import Processes
from mfmjt.train.tasks.network import NetworkTask
from mfmjt.train.trainer import Trainer


def test_the_next_batch_is_read_before_a_recording_begins(recipe, monkeypatch):
    """Where a GPU is, its thread allocates pinned memory, which a recording need not survive."""
    with Processes() as processes:
        trainer = Trainer(NetworkTask(recipe(), processes), processes)
    monkeypatch.setattr(store, "will_need", lambda *_: time.sleep(0.2))  # a slow disk
    batch, flags = trainer.task.draw(0), trainer._flags()
    read = []

    @contextmanager
    def recording(pool, stream):
        read.extend(future.done() for future in trainer.task.store._ahead.values())
        yield None

    monkeypatch.setattr(graph, "recording", recording)
    recorded = object.__new__(Recorded)  # the rest of it needs a GPU
    recorded.work, recorded.settle = trainer._work, trainer.task.settle
    recorded.pool = recorded.stream = None
    _, _, result = recorded._record((batch, flags))
    assert read == [True]
    assert torch.isfinite(result).all()
