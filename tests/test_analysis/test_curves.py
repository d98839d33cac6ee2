"""Curves against closed forms in 50 digits, and what the paper claims of each margin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from torch import Tensor

from expface_kernels import ArcFace, CosFace, ExpFace, NormFace, SphereFace
from expface_kernels.analysis.curves import (
    angular_penalty,
    cosine_penalty,
    curvature,
    decision_boundary,
    effective_angle,
    pull,
    similarity,
    slope,
)
from expface_kernels.margins import THETA_FLOOR, MarginFunction
from tests.test_analysis.closed_forms import FORMS, Form, continued_arccos
from tests.tolerances import CURVE, effective_angle_error

PI = math.pi
EXPONENTS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)


def one(f: Callable[..., Tensor], margin: MarginFunction, theta: float, *more: Any) -> float:
    return float(f(margin, torch.tensor([theta], dtype=torch.float64), *more)[0])


def assert_near(actual: float, truth: Any, bound: float = CURVE, what: str = "") -> None:
    truth = float(truth)
    assert abs(actual - truth) <= bound * max(1.0, abs(truth)), f"{what}: {actual!r}, expected {truth!r}"


@pytest.mark.parametrize("form", FORMS, ids=lambda form: repr(form.margin))
@settings(deadline=None, derandomize=True, max_examples=12)
@given(theta=st.floats(1e-3, PI - 1e-3))
def test_every_curve_is_its_closed_form(form: Form, theta: float) -> None:
    margin, t = form.margin, mpf(theta)
    if not form.smooth_at(theta):
        return
    psi, d_psi = form.psi(t), form.slope(t)
    assert_near(one(similarity, margin, theta), psi, what="psi")
    assert_near(one(cosine_penalty, margin, theta), mp.cos(t) - psi, what="cosine penalty")
    assert_near(one(slope, margin, theta, "exact"), d_psi, what="exact slope")
    assert_near(one(slope, margin, theta, "detached"), -mp.sin(t), what="detached slope")
    assert_near(one(pull, margin, theta, "exact"), -d_psi / mp.sin(t), what="exact pull")
    assert_near(one(pull, margin, theta, "detached"), 1, what="detached pull")
    assert_near(one(curvature, margin, theta), form.curvature(t), what="curvature")
    phi = continued_arccos(psi)
    bound = effective_angle_error(float(phi))
    assert_near(one(effective_angle, margin, theta), phi, bound, "effective angle")
    assert_near(one(angular_penalty, margin, theta), phi - t, bound, "angular penalty")
    boundary = one(decision_boundary, margin, theta)
    if psi < -1:
        assert math.isnan(boundary)
    else:
        assert_near(boundary, mp.acos(psi), bound, "decision boundary")


def test_cosface_has_no_boundary_where_its_similarity_is_below_minus_one() -> None:
    end = math.acos(0.35 - 1)
    assert_near(one(decision_boundary, CosFace(), 1.0), mp.acos(mp.cos(1) - mpf(0.35)))
    assert one(decision_boundary, CosFace(), end - 1e-6) < PI
    assert math.isnan(one(decision_boundary, CosFace(), end + 1e-6))


def test_a_similarity_above_one_is_satisfied_anywhere_and_moves_the_row_closer() -> None:
    def eager(theta: Tensor) -> Tensor:
        return torch.cos(theta) + 0.5

    assert one(decision_boundary, eager, 0.2) == 0
    assert_near(one(effective_angle, eager, 0.2), continued_arccos(mp.cos(mpf(0.2)) + mpf(0.5)))
    assert one(effective_angle, eager, 0.2) < 0


# The paper's claims.


@settings(deadline=None, derandomize=True, max_examples=80)
@given(m=st.floats(1e-3, 1.0), theta=st.floats(1e-6, PI - 1e-6))
def test_expface_strictly_falls_for_every_exponent(m: float, theta: float) -> None:
    ratio = mpf(theta) / mp.pi
    truth = -mpf(m) * ratio ** (mpf(m) - 1) * mp.sin(mp.pi * ratio ** mpf(m))
    assert truth < 0
    actual = one(slope, ExpFace(m), theta)
    assert actual < 0
    assert_near(actual, truth)
    farther = theta + 1e-3 * (PI - theta)
    if float(abs(truth)) * (farther - theta) > 1e-14:  # above the rounding of psi
        assert one(similarity, ExpFace(m), farther) < one(similarity, ExpFace(m), theta)


@pytest.mark.parametrize("m", EXPONENTS)
def test_expface_has_no_penalty_at_the_centre_and_opposite_to_it(m: float) -> None:
    assert one(cosine_penalty, ExpFace(m), PI) == 0
    assert one(angular_penalty, ExpFace(m), PI) == 0
    # At 0 exactly, the value is that of the floor, 1e-7 rad; the formula itself goes to 0.
    at_floor = mp.pi * (mpf(THETA_FLOOR) / mp.pi) ** mpf(m)
    assert_near(one(cosine_penalty, ExpFace(m), 0.0), 1 - mp.cos(at_floor))
    assert_near(one(angular_penalty, ExpFace(m), 0.0), at_floor, effective_angle_error(float(at_floor)))
    assert mp.pi * (mpf(10) ** -2000 / mp.pi) ** mpf(m) < mpf(10) ** -190


@pytest.mark.parametrize("m", [1.0, 1.5, 2.0, 2.7, 4.0])
def test_sphereface_slope_vanishes_at_its_joints_and_the_curvature_jumps_by_2_m_squared(m: float) -> None:
    for k in range(1, math.floor(m) + 1):
        joint = k * PI / m
        if joint >= PI:
            continue
        assert one(slope, SphereFace(m), joint) == pytest.approx(0, abs=CURVE)
        before, after = (one(curvature, SphereFace(m), joint + step) for step in (-1e-8, 1e-8))
        assert_near(before, m**2)
        assert_near(after, -(m**2))
        assert_near(before - after, 2 * m**2)


@pytest.mark.parametrize("m", [0.1, 0.5, 1.2])
def test_arcface_rises_past_its_end_unless_the_boundary_is_monotonic(m: float) -> None:
    beyond = PI - m + 1e-3
    assert one(slope, ArcFace(m), beyond) > 0
    assert one(similarity, ArcFace(m), PI) > one(similarity, ArcFace(m), PI - m)
    assert one(slope, ArcFace(m, "monotonic"), beyond) < 0
    grid = torch.linspace(0, PI, 2001, dtype=torch.float64).clamp_max(PI)
    assert (similarity(ArcFace(m, "monotonic"), grid).diff() < 0).all()


# Ends and bad input.


@pytest.mark.parametrize("form", FORMS, ids=lambda form: repr(form.margin))
def test_both_ends_have_finite_values_and_no_pull(form: Form) -> None:
    ends = torch.tensor([0.0, PI], dtype=torch.float64)
    for f in (similarity, slope, cosine_penalty, effective_angle, angular_penalty):
        assert torch.isfinite(f(form.margin, ends)).all(), f.__name__
    assert pull(form.margin, ends).isnan().all()


@pytest.mark.parametrize(
    ("theta", "error", "words"),
    [
        (0.5, TypeError, "theta: expected a tensor"),
        (torch.tensor([30.0]), ValueError, r"theta: expected radians in \[0, π\], got 30"),
        (torch.tensor([-0.1]), ValueError, "got -0.1"),
        (torch.tensor([math.nan]), ValueError, "got nan"),
        (torch.zeros(2, 2), ValueError, r"shape \(N,\), got torch.float32 of shape \(2, 2\)"),
        (torch.zeros(2, dtype=torch.int64), ValueError, "got torch.int64"),
    ],
)
def test_angles_are_checked(theta: Any, error: type[Exception], words: str) -> None:
    for f in (similarity, slope, curvature, pull, angular_penalty, decision_boundary):
        with pytest.raises(error, match=words):
            f(ExpFace(), theta)


def test_an_unknown_target_gradient_is_not_taken_for_the_detached_one() -> None:
    theta = torch.tensor([1.0], dtype=torch.float64)
    for f in (slope, pull):
        with pytest.raises(ValueError, match=r"target_gradient: expected one of .* got 'Exact'"):
            f(ExpFace(), theta, "Exact")


@pytest.mark.parametrize(
    ("margin", "words"),
    [
        (torch.log, r"finite psi on \[0, π\], got -inf at theta = 0"),
        (lambda theta: torch.where(theta > 2, torch.nan, theta), "got nan at theta = 3"),
        (lambda theta: theta[:1], r"margin must return psi of theta's shape \(2,\), got \(1,\)"),
        (lambda theta: 0.5, "margin must return psi of theta's shape .* got float"),
        (lambda theta: theta.long(), "floating point psi, got torch.int64"),
    ],
)
def test_what_a_margin_returns_is_checked(margin: MarginFunction, words: str) -> None:
    theta = torch.tensor([0.0, 3.0], dtype=torch.float64)
    for f in (similarity, slope, curvature, pull, cosine_penalty, angular_penalty, decision_boundary):
        with pytest.raises(ValueError, match=words):
            f(margin, theta)


@pytest.mark.parametrize(
    "margin",
    [lambda theta: torch.cos(theta.detach()), torch.zeros_like],
    ids=["cut off", "constant"],
)
def test_a_similarity_outside_autograd_has_no_slope(margin: MarginFunction) -> None:
    with pytest.raises(ValueError, match="does not depend on theta through autograd"):
        slope(margin, torch.ones(3))


def test_a_margin_of_ones_own_with_a_parameter_is_looked_at_without_gradients() -> None:
    class Mine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = torch.nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

        def forward(self, theta: Tensor) -> Tensor:
            return torch.cos(theta) - self.m * theta

    theta = torch.tensor([0.5, 2.0], dtype=torch.float64)
    with torch.no_grad():
        values = slope(Mine(), theta)
    assert not values.requires_grad
    torch.testing.assert_close(values, -torch.sin(theta) - 0.1, rtol=0, atol=CURVE)
    assert not similarity(Mine(), theta).requires_grad
    torch.testing.assert_close(curvature(lambda t: 1 - t, theta), torch.zeros(2, dtype=torch.float64))


def test_float32_angles_and_similarities_are_taken() -> None:
    theta = torch.tensor([0.5, 2.0])
    assert similarity(NormFace(), theta).dtype == torch.float64
    assert similarity(lambda t: torch.cos(t).float(), theta).dtype == torch.float64
