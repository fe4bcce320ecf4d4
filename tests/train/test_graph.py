"""What other threads do during a capture; what is captured is judged in test_compile.py."""

from __future__ import annotations

import time
from contextlib import contextmanager

import torch

from mfmjt import cuda_graph
from mfmjt.cuda_graph import CapturedStep
from mfmjt.train import store
from mfmjt.train.distributed import Processes
from mfmjt.train.loop import _Run


def test_the_next_batch_is_read_before_a_capture_begins(recipe, monkeypatch):
    """Where a GPU is, its thread allocates pinned memory, which may end a capture."""
    with Processes() as processes:
        run = _Run(recipe(), processes)
    monkeypatch.setattr(store, "will_need", lambda *_: time.sleep(0.2))  # a slow disk
    batch, flags = run._draw(4, 20), run._flags()
    read = []

    @contextmanager
    def capturing(pool, stream):
        read.extend(future.done() for future in run.store._ahead.values())
        yield None

    monkeypatch.setattr(cuda_graph, "_capturing", capturing)
    step = object.__new__(CapturedStep)  # the rest of it needs a GPU
    step._step, step._settle = run._work, run.store.settle
    step._pool = step._stream = None
    result = step._capture((batch, flags)).result
    assert read == [True]
    assert torch.isfinite(result).all()
