from __future__ import annotations

import pytest
import torch

from mfmjt.errors import InputError
from mfmjt.meanflow import guide
from tests.oracle import allowance, error


def velocities(dtype=torch.float64):
    return torch.randn(2, 3, 5, 4, dtype=torch.float64).to(dtype).unbind()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_formulas(dtype):
    u_c, u_0 = velocities(dtype)
    for w in (0.5, 1.5, 4.5):
        plain, scaled = [], []
        for c, n in zip(u_c.double(), u_0.double(), strict=True):
            s = (c * n).sum() / (n * n).sum()
            plain.append(w * c + (1 - w) * n)
            scaled.append(w * c + (1 - w) * s * n)
        for mode, truth in (("cfg", torch.stack(plain)), ("cfg_scaled", torch.stack(scaled))):
            result = guide(u_c, u_0, w, mode)
            assert result.dtype == dtype
            # Terms of size w may cancel, so the error is that of the largest of them.
            scale = w * torch.maximum(u_c.double().abs().max(), truth.abs().max())
            floor = 1e-8 * float(scale)  # the epsilon that keeps the scale finite
            assert error(result, truth) <= allowance(scale, dtype, 20) + floor


def test_scale_makes_parallel_velocities_agree():
    u_c, _ = velocities()
    # s = 1/3 undoes the factor 3, and nothing is left to guide.
    truth = guide(u_c, 3 * u_c, 7.0)
    assert error(truth, u_c) <= allowance(7 * u_c, torch.float64, 20) + 1e-8 * float(
        u_c.abs().max()
    )


def test_one_scale_for_each_sample():
    u_c, u_0 = velocities()
    w = torch.tensor([1.0, 2.0, 3.0])
    together = guide(u_c, u_0, w)
    for i in range(3):
        alone = guide(u_c[i : i + 1], u_0[i : i + 1], float(w[i]))
        assert torch.equal(together[i : i + 1], alone)


def test_zero_unconditional_velocity_stays_finite():
    u_c, _ = velocities()
    assert torch.equal(guide(u_c, torch.zeros_like(u_c), 1.5), 1.5 * u_c)


def test_none_is_the_conditional_velocity():
    u_c, u_0 = velocities()
    assert guide(u_c, u_0, 9.0, "none") is u_c


def test_misuse_is_named():
    u_c, u_0 = velocities()
    with pytest.raises(InputError, match="No guidance mode 'apg'"):
        guide(u_c, u_0, 1.5, "apg")
    with pytest.raises(InputError, match=r"u_0 \(2, 5, 4\)"):
        guide(u_c, u_0[:2], 1.5)
