"""The target path that every backend shares: angles and unit tangents, in float64.

B rows · C classes · D features · theta (B,) radians · u, v (B, D) unit tangents at xn and wn
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from expface_kernels.backends.base import (
    INVALID_TARGET,
    NO_TARGET,
    TargetGeometry,
    compute_dtype,
    norms_and_units,
)
from expface_kernels.reference import pair_angle
from tests.cases import KINDS, batch, leaves
from tests.tolerances import UNIT_ENTRY, UNIT_LENGTH, assert_close, assert_rows_close, relative_error

F64 = torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_tangents_are_the_slope_of_the_angle(kind: str) -> None:
    x, w, y = batch(kind, 40, 23, 16)
    a, b = leaves(x, w[y], F64)
    theta = pair_angle(a, b)
    theta.sum().backward()
    pairs = TargetGeometry(x, w, y, None)
    u, v = pairs.tangents()
    assert_close(pairs.theta(), theta, dtype=F64)
    # Rows within 1e-6 rad of the axis know their direction to 1e-10 only.
    assert_rows_close(-u / pairs.x_norm, a.grad, cap=1e-9, what="u")
    assert_rows_close(-v / pairs.w_norm, b.grad, cap=1e-9, what="v")


@pytest.mark.parametrize("kind", KINDS)
def test_tangents_have_length_one_are_orthogonal_and_lead_to_the_other(kind: str) -> None:
    x, w, y = batch(kind, 40, 23, 16)
    pairs = TargetGeometry(x, w, y, None)
    theta = pairs.theta()[:, None]
    apart = ((theta > 1e-9) & (theta < math.pi - 1e-9))[:, 0]
    for t, at, to in zip(pairs.tangents(), (pairs.xn, pairs.wn), (pairs.wn, pairs.xn), strict=True):
        length = torch.linalg.vector_norm(t, dim=1)
        torch.testing.assert_close(length[apart], torch.ones_like(length[apart]), rtol=0, atol=UNIT_LENGTH)
        assert float((t * at).sum(1)[apart].abs().max()) < UNIT_LENGTH
        reached = torch.cos(theta) * at + torch.sin(theta) * t
        assert relative_error(reached[apart], to[apart]) < 1e-14
        assert torch.equal(t[~apart], torch.zeros_like(t[~apart]))


@pytest.mark.parametrize("factor", [4.0, 3.0, -4.0, -3.0])
def test_on_the_axis_there_is_no_tangent(factor: float) -> None:
    # 4·w normalises to the bits of w; 3·w misses them by a rounding, whose direction is noise.
    _, w, _ = batch("random", 1, 20, 8)
    for t in TargetGeometry(factor * w, w, torch.arange(20), None).tangents():
        assert torch.equal(t, torch.zeros_like(w))


def test_without_a_target_the_angle_is_0_and_there_is_no_direction() -> None:
    x, w, y = batch("random", 4, 5, 3)
    y[1] = NO_TARGET
    x[2] = torch.nan
    y[2] = NO_TARGET
    pairs = TargetGeometry(x, w, y, None)
    assert pairs.theta()[1] == 0
    assert pairs.theta()[2] == 0
    for t in pairs.tangents():
        assert torch.equal(t[1:3], torch.zeros(2, 3, dtype=F64))
        assert bool((t[[0, 3]].abs().amax(1) > 0).all())


def test_an_invalid_label_has_an_angle_of_nan_and_leaves_others_alone() -> None:
    x, w, y = batch("random", 4, 5, 3)
    expected = TargetGeometry(x, w, y, None).theta()
    y[1] = INVALID_TARGET
    theta = TargetGeometry(x, w, y, None).theta()
    assert theta.isnan().tolist() == [False, True, False, False]
    assert torch.equal(theta[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize("dead", ["row", "centre"])
def test_a_vector_below_the_smallest_norm_has_no_tangent_and_gives_none(dead: str) -> None:
    x, w, y = batch("random", 3, 3, 4)
    y = torch.arange(3)
    (x if dead == "row" else w)[1] *= 1e-14 / float((x if dead == "row" else w)[1].norm())
    for t in TargetGeometry(x, w, y, None).tangents():
        assert torch.equal(t[1], torch.zeros(4, dtype=F64))
        assert bool((t[[0, 2]].abs().amax(1) > 0).all())


def test_labels_are_positions_in_the_subset() -> None:
    x, w, y = batch("random", 6, 9, 4)
    subset = torch.unique(y)
    through = TargetGeometry(x, w, torch.searchsorted(subset, y), subset)
    assert torch.equal(through.theta(), TargetGeometry(x, w, y, None).theta())


@pytest.mark.parametrize(
    ("x", "w", "expected"),
    [
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.float64, torch.bfloat16, torch.float64),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_compute_is_float32_unless_an_input_is_float64(
    x: torch.dtype, w: torch.dtype, expected: torch.dtype
) -> None:
    def one(dtype: torch.dtype) -> Tensor:
        return torch.zeros(1, 1, dtype=dtype)

    assert compute_dtype(one(x), one(w)) == expected


def test_norms_below_eps_divide_by_eps() -> None:
    v = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2e-13]], dtype=F64)
    norm, unit = norms_and_units(v)
    assert torch.equal(norm, torch.tensor([[5.0], [0.0], [2e-13]], dtype=F64))
    torch.testing.assert_close(
        unit, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.2]], dtype=F64), rtol=UNIT_ENTRY, atol=0
    )
