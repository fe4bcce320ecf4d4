from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.digests import Digests, digest, machine


def test_a_digest_sees_every_bit_dtype_and_shape() -> None:
    x = torch.zeros(2, 3)
    others = [-x, x.half(), x.reshape(3, 2), x[:, :2], x.numpy().tobytes()]
    assert len({digest(x), *map(digest, others), digest(x, x), digest("")}) == 8
    assert digest(x) == digest(x.clone()) == digest(torch.zeros(3, 2).T.clone())
    assert digest(torch.tensor(1.0)) != digest(torch.tensor([1.0]))


def test_recorded_digests_are_compared_on_their_machine_only(tmp_path: Path) -> None:
    path = tmp_path / "test_it.digests.json"
    with pytest.raises(pytest.skip.Exception, match=r"pytest --record-digests .*test_it\.py"):
        Digests(path, record=False).check("loss", torch.ones(2))
    Digests(path, record=True).check("loss", torch.ones(2))
    Digests(path, record=True).check("gradient", b"bytes")
    assert sorted(json.loads(path.read_text())[machine()]) == ["gradient", "loss"]
    Digests(path, record=False).check("loss", torch.ones(2))
    with pytest.raises(AssertionError, match="loss is not what it was"):
        Digests(path, record=False).check("loss", torch.ones(3))
    with pytest.raises(AssertionError, match="unknown is not what it was"):
        Digests(path, record=False).check("unknown", torch.ones(2))
