from __future__ import annotations

import pytest
import torch

from mfmjt.experiment.guidance import vectors


def test_parallel_velocities() -> None:
    u_c = torch.randn(3, 5, 2)
    found = vectors(u_c, 2 * u_c, w=4.5)
    expected = {"ratio": 0.5, "scale": 0.5, "overshoot_cfg_scaled": 0.0, "overshoot_cfg": 1.5}
    for key, value in expected.items():
        # The guided velocity is a float32 sum of two terms of at most 7 times u_c.
        assert found[key].tolist() == pytest.approx([value] * 3, abs=2e-6)
    assert found["angle"].tolist() == pytest.approx([0.0] * 3, abs=1e-4)


def test_orthogonal_velocities() -> None:
    u_c, u_0 = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 4.0]]])
    found = vectors(u_c, u_0, w=2.0)
    assert found["angle"].item() == pytest.approx(90)
    assert found["scale"].item() == 0
    assert found["overshoot_cfg_scaled"].item() == pytest.approx(1.0)  # 2 u_c
    assert found["overshoot_cfg"].item() == pytest.approx((36 + 16) ** 0.5 / 3 - 1)
