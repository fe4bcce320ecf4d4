"""What other threads do during a capture; what is captured is judged in test_compile.py."""

from __future__ import annotations

import time
from contextlib import contextmanager

import torch

from mfmjt import cuda_graph
from mfmjt.cuda_graph import CapturedStep
from mfmjt.features import store
from mfmjt.train.parallel import Processes
from mfmjt.train.tasks.network import NetworkTask
from mfmjt.train.trainer import Trainer


def test_the_next_batch_is_read_before_a_capture_begins(recipe, monkeypatch):
    """Where a GPU is, its thread allocates pinned memory, which may end a capture."""
    with Processes() as processes:
        trainer = Trainer(NetworkTask(recipe(), processes), processes)
    monkeypatch.setattr(store, "will_need", lambda *_: time.sleep(0.2))  # a slow disk
    batch, flags = trainer.task.draw(0), trainer._flags()
    read = []

    @contextmanager
    def capturing(pool, stream):
        read.extend(future.done() for future in trainer.task.store._ahead.values())
        yield None

    monkeypatch.setattr(cuda_graph, "_capturing", capturing)
    step = object.__new__(CapturedStep)  # the rest of it needs a GPU
    step._step, step._settle = trainer._work, trainer.task.settle
    step._pool = step._stream = None
    result = step._capture((batch, flags)).result
    assert read == [True]
    assert torch.isfinite(result).all()
