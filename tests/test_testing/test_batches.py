"""Batches hold what their names say."""

from __future__ import annotations

import math

import pytest
import torch

from expface_kernels import reference
from expface_kernels.testing.batches import KINDS, LEARNT_ANGLE, NEAR_ANGLES, batch
from tests.tolerances import STORED_ANGLE

ANGLES = {
    "near_centre": [NEAR_ANGLES[row % 5] for row in range(15)],
    "opposite": [math.pi - NEAR_ANGLES[row % 5] for row in range(15)],
    "learnt": [LEARNT_ANGLE] * 15,
}


@pytest.mark.parametrize("kind", ANGLES)
def test_the_target_angles_are_those_promised(kind: str) -> None:
    x, w, y = batch(kind, 15, 41, 32, seed=1)
    theta = reference.pair_angle(x, w[y])
    # Stored values are float32, which moves an angle by some 1e-7.
    assert torch.allclose(theta, torch.tensor(ANGLES[kind], dtype=torch.float64), rtol=0, atol=STORED_ANGLE)
    assert float(theta[0]) == ANGLES[kind][0] or kind == "learnt"  # exactly on the axis


def test_spread_angles_lie_at_even_distances_over_the_half_turn() -> None:
    x, w, y = batch("spread", 15, 41, 32, seed=1)
    theta = reference.pair_angle(x, w[y])
    assert 0 < float(theta[0]) < math.pi / 15
    expected = theta[0] + math.pi / 15 * torch.arange(15, dtype=torch.float64)
    assert torch.allclose(theta, expected, rtol=0, atol=STORED_ANGLE)
    assert float(theta[-1]) < math.pi


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_float32_ones_and_the_same_for_a_seed(kind: str) -> None:
    one, again, other = (batch(kind, 9, 11, 8, seed=seed) for seed in (4, 4, 5))
    for a, b, c in zip(one, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert torch.equal(one[0], one[0].float().double())
    assert torch.equal(one[1], one[1].float().double())
