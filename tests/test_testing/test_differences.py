"""Finite differences: right gradients pass by far, wrong ones do not, cones are stepped around."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expface_kernels import ArcFace, ExpFace, reference
from expface_kernels.margins import MarginFunction
from expface_kernels.testing import KINDS, batch, truth
from expface_kernels.testing.differences import NEAREST, difference_error, frozen
from expface_kernels.testing.policy import FINITE_DIFFERENCES

Batch = tuple[Tensor, Tensor, Tensor]


def _error(data: Batch, scale: float, margin: MarginFunction, dx: Tensor, dw: Tensor) -> float | None:
    def loss(x: Tensor, w: Tensor, margin: MarginFunction) -> Tensor:
        value = reference.margin_cross_entropy(x, w, data[2], margin, scale=scale, reduction="sum")
        assert isinstance(value, Tensor)
        return value

    return difference_error(loss, *data, margin, dx, dw, scale)


@pytest.mark.parametrize("scale", [1.0, 64.0, 256.0])
@pytest.mark.parametrize("kind", KINDS)
def test_right_gradients_are_within_a_tenth_of_the_bound(kind: str, scale: float) -> None:
    data = batch(kind, 10, 33, 16, seed=2)
    for margin, mode in ((ExpFace(), "exact"), (ArcFace(), "detached")):
        _, dx, dw = truth(*data, margin, scale=scale, reduction="sum", target_gradient=mode)
        sloped = frozen(margin, *data) if mode == "detached" else margin
        error = _error(data, scale, sloped, dx, dw)
        assert error is not None
        assert error < FINITE_DIFFERENCES / 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_off_by_a_thousandth_is_not(kind: str) -> None:
    data = batch(kind, 10, 33, 16, seed=2)
    _, dx, dw = truth(*data, ExpFace(), reduction="sum")
    for wrong in ((1.001 * dx, dw), (dx, 1.001 * dw), (dx * torch.nan, dw)):
        error = _error(data, 64.0, ExpFace(), *wrong)
        assert error is not None
        assert not error < 10 * FINITE_DIFFERENCES


def test_the_two_slopes_are_told_apart() -> None:
    data = batch("random", 10, 33, 16)
    margin = ArcFace()
    _, dx, dw = truth(*data, margin, reduction="sum", target_gradient="detached")
    assert (_error(data, 64.0, margin, dx, dw) or 0) > 100 * FINITE_DIFFERENCES
    assert (_error(data, 64.0, frozen(margin, *data), dx, dw) or 1) < FINITE_DIFFERENCES


def test_where_every_row_is_at_a_cone_there_is_no_derivative() -> None:
    x, w, y = batch("near_centre", 1, 5, 8)
    assert float(reference.pair_angle(x, w[y])) < NEAREST
    _, dx, dw = truth(x, w, y, reduction="sum")
    assert _error((x, w, y), 64.0, ExpFace(), dx, dw) is None
