"""Margins: closed forms, slopes, ranges, parameters per row, and the two target gradients."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from expface_kernels import ArcFace, CombinedMargin, CosFace, ExpFace, NormFace, SphereFace
from expface_kernels.margins import THETA_FLOOR, Margin, MarginFunction, target_similarity
from tests.cases import MARGINS, TARGET_GRADIENTS
from tests.tolerances import assert_close

PI = math.pi
# Both ends, the middle, next to both ends, and close to both sides of where ArcFace(0.5) changes its rule.
ANGLES = (0.0, 1e-4, 0.3, 1.0, 1.57, PI / 2, 2.0, 2.64, 2.65, 3.0, PI - 1e-4, PI)


def sphere(theta: float, m: float) -> float:
    k = math.floor(m * theta / PI)
    return (-1) ** k * math.cos(m * theta) - 2 * k


# Written from the papers in plain floats, so that nothing is shared with the package.
CLOSED_FORMS: tuple[tuple[MarginFunction, Callable[[float], float]], ...] = (
    (ExpFace(), lambda t: math.cos(PI * (t / PI) ** 0.7)),
    (ExpFace(0.5), lambda t: math.cos(PI * (t / PI) ** 0.5)),
    (ExpFace(1.0), math.cos),
    (ArcFace(), lambda t: math.cos(t + 0.5)),
    (
        ArcFace(0.5, "monotonic"),
        lambda t: math.cos(t + 0.5 if t <= PI - 0.5 else t) - (t > PI - 0.5) * 0.5 * math.sin(0.5),
    ),
    (ArcFace(0.5, "easy"), lambda t: math.cos(t + 0.5) if t < PI / 2 else math.cos(t)),
    (CosFace(), lambda t: math.cos(t) - 0.35),
    (SphereFace(), lambda t: sphere(t, 1.5)),
    (SphereFace(4), lambda t: sphere(t, 4)),
    (CombinedMargin(), lambda t: math.cos(t + 0.5)),
    (CombinedMargin(1.1, 0.3, 0.2), lambda t: math.cos(1.1 * t + 0.3) - 0.2),
    (NormFace(), math.cos),
)


def angles(*values: float) -> Tensor:
    return torch.tensor(values or ANGLES, dtype=torch.float64)


def slope(margin: MarginFunction, theta: Tensor, target_gradient: str = "exact") -> Tensor:
    """dpsi/dθ (B,)."""
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(target_similarity(margin, theta, target_gradient).sum(), theta)[0]


@pytest.mark.parametrize(("margin", "form"), CLOSED_FORMS, ids=[repr(margin) for margin, _ in CLOSED_FORMS])
def test_a_margin_is_its_published_formula(margin: MarginFunction, form: Callable[[float], float]) -> None:
    # ExpFace at 0 is the floor's value, cos(π(1e-7/π)^m): within 1e-7 of 1 for m ≥ 1/2, not the float64 cap.
    theta = angles(*ANGLES[1:]) if isinstance(margin, ExpFace) else angles()
    assert_close(margin(theta), angles(*map(form, theta.tolist())), dtype=torch.float64, what=repr(margin))


@pytest.mark.parametrize(
    ("margin", "at_zero", "at_pi"),
    [
        (ExpFace(0.7), math.cos(PI * (THETA_FLOOR / PI) ** 0.7), -1.0),
        (ArcFace(0.5), math.cos(0.5), math.cos(PI + 0.5)),
        (ArcFace(0.5, "monotonic"), math.cos(0.5), -1 - 0.5 * math.sin(0.5)),
        (ArcFace(0.5, "easy"), math.cos(0.5), -1.0),
        (CosFace(0.35), 0.65, -1.35),
        (SphereFace(1.5), 1.0, -2.0),
        (SphereFace(2.0), 1.0, -3.0),
        (CombinedMargin(1.0, 0.3, 0.2), math.cos(0.3) - 0.2, math.cos(PI + 0.3) - 0.2),
        (NormFace(), 1.0, -1.0),
    ],
    ids=repr,
)
def test_the_ends_of_the_angle_are_defined(margin: MarginFunction, at_zero: float, at_pi: float) -> None:
    assert_close(margin(angles(0.0, PI)), angles(at_zero, at_pi), dtype=torch.float64)
    assert torch.isfinite(slope(margin, angles(0.0, PI))).all()


@pytest.mark.parametrize("m", [0.05, 0.3, 0.5, 0.7, 0.95, 1.0])
def test_expface_falls_strictly_over_the_whole_angle(m: float) -> None:
    # cos is flat to 1e-16 at both ends: steps of π/400 keep each fall above that.
    psi = ExpFace(m)(torch.linspace(0, PI, 401, dtype=torch.float64))
    assert (psi.diff() < 0).all()
    assert psi[-1] == -1


@pytest.mark.parametrize(
    "margin", [SphereFace(1.0), SphereFace(1.5), SphereFace(2.0), SphereFace(3.7)], ids=repr
)
def test_sphereface_falls_and_its_slope_vanishes_at_the_joints(margin: SphereFace) -> None:
    psi = margin(torch.linspace(0, PI, 401, dtype=torch.float64))
    assert (psi.diff() < 0).all()
    joints = angles(*(k * PI / margin.m for k in range(1, math.floor(margin.m) + 1)))
    assert slope(margin, joints).abs().max() < 1e-14 * margin.m


@pytest.mark.parametrize("m", [0.3, 0.5, 0.8])
def test_monotonic_arcface_never_rises_where_the_published_one_does(m: float) -> None:
    theta = torch.linspace(0, PI, 401, dtype=torch.float64)
    assert (ArcFace(m, "monotonic")(theta).diff() < 0).all()
    assert (ArcFace(m)(theta).diff() > 0).any()


def test_expface_presses_hardest_in_the_middle() -> None:
    theta = torch.linspace(0, PI, 1001, dtype=torch.float64)
    gap = torch.cos(theta) - ExpFace(0.7)(theta)
    assert PI / 4 < theta[gap.argmax()] < 3 * PI / 4
    assert gap[[0, -1]].abs().max() < gap.max() / 1000


def smooth(margin: MarginFunction, theta: float) -> bool:
    """Nothing bends or jumps within gradcheck's step of theta."""
    kinks = [PI / 2, PI - getattr(margin, "m", 0.0) if isinstance(margin, ArcFace) else 0.0]
    return all(abs(theta - kink) > 1e-4 for kink in kinks)


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
@settings(deadline=None, derandomize=True, max_examples=25)
@given(theta=st.floats(0.05, PI - 1e-3))
def test_slopes_agree_with_finite_differences(margin: MarginFunction, theta: float) -> None:
    if smooth(margin, theta):
        assert torch.autograd.gradcheck(margin, angles(theta).requires_grad_())


@settings(deadline=None, derandomize=True, max_examples=40)
@given(m=st.floats(0.01, 1.0), theta=st.floats(1e-12, 3.1))
@example(m=1.0, theta=THETA_FLOOR)
def test_expface_slope_is_its_closed_form_down_to_the_floor(m: float, theta: float) -> None:
    ratio = max(theta, THETA_FLOOR) / PI
    expected = -math.sin(PI * ratio**m) * m * ratio ** (m - 1) if theta >= THETA_FLOOR else 0.0
    assert_close(slope(ExpFace(m), angles(theta)), angles(expected), dtype=torch.float64)


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_slopes_are_bounded_at_every_angle(margin: MarginFunction) -> None:
    theta = torch.cat([torch.logspace(-12, 0, 200, dtype=torch.float64), torch.linspace(1, PI, 200).double()])
    largest = {ExpFace: PI / 2, SphereFace: 4.0, CombinedMargin: 1.1}.get(type(margin), 1.0)
    assert slope(margin, theta).abs().max() <= largest * (1 + 1e-12)


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_detached_has_the_value_of_psi_and_the_slope_of_the_cosine(margin: MarginFunction) -> None:
    theta = angles()
    exact = target_similarity(margin, theta, "exact")
    assert_close(target_similarity(margin, theta, "detached"), exact, dtype=torch.float64)
    assert_close(slope(margin, theta, "detached"), -torch.sin(theta), dtype=torch.float64)
    assert_close(exact, margin(theta), dtype=torch.float64)


@pytest.mark.parametrize("target_gradient", TARGET_GRADIENTS)
@pytest.mark.parametrize(
    ("make", "value"),
    [
        (ExpFace, 0.7),
        (ArcFace, 0.5),
        (lambda m: ArcFace(m, "monotonic"), 0.5),
        (lambda m: ArcFace(m, "easy"), 0.5),
        (CosFace, 0.35),
        (SphereFace, 1.5),
        (lambda m: CombinedMargin(m1=m), 1.0),
        (lambda m: CombinedMargin(m2=m), 0.5),
        (lambda m: CombinedMargin(m3=m), 0.2),
    ],
)
def test_each_parameter_may_be_one_value_per_row_and_keeps_its_gradient(
    make: Callable[[Any], Margin], value: float, target_gradient: str
) -> None:
    theta = angles(0.4, 1.1, 1.9, 2.9)
    m = (value + 0.02 * torch.arange(4, dtype=torch.float64)).requires_grad_()

    def psi(m: Tensor) -> Tensor:
        return target_similarity(make(m), theta, target_gradient)

    one_by_one = torch.cat([make(m[b].item())(theta[b : b + 1]) for b in range(4)])
    assert_close(psi(m), one_by_one, dtype=torch.float64)
    assert torch.autograd.gradcheck(psi, m)
    assert (torch.autograd.grad(psi(m).sum(), m)[0] != 0).any()


def test_parameters_in_float32_do_not_narrow_psi() -> None:
    psi = ArcFace(torch.tensor([0.5, 0.25], dtype=torch.float32))(angles(0.3, 1.0))
    assert psi.dtype == torch.float64


RANGES: tuple[tuple[type[Margin], str, str, tuple[float, ...], tuple[float, ...]], ...] = (
    (ExpFace, "m", "(0, 1]", (1e-9, 0.7, 1, 1.0), (0, 0.0, -0.1, 1.0000001, 2)),
    (ArcFace, "m", "[0, 3.14159)", (0, 0.0, 0.5, 3.14), (-1e-9, -1)),
    (CosFace, "m", "[0, 2]", (0, 0.35, 2, 2.0), (-1e-9, 2.0000001)),
    (SphereFace, "m", "[1, inf)", (1, 1.0, 4, 100.0), (0.9999999, 0, -1)),
    (CombinedMargin, "m1", "(0, inf)", (1e-9, 1, 4.0), (0, 0.0, -1)),
    (CombinedMargin, "m2", "[0, 3.14159)", (0, 0.5, 3.14), (-1e-9, 3.2, 28.6)),
    (CombinedMargin, "m3", "[0, 2]", (0, 0.35, 2.0), (-1e-9, 2.0000001)),
)
EACH_RANGE = pytest.mark.parametrize(
    ("kind", "name", "range_text", "good", "bad"), RANGES, ids=lambda value: getattr(value, "__name__", None)
)


@EACH_RANGE
def test_parameters_in_range_are_taken_at_once_and_later(
    kind: type[Margin], name: str, range_text: str, good: tuple[float, ...], bad: tuple[float, ...]
) -> None:
    margin = kind()
    for value in good:
        assert getattr(kind(**{name: value}), name) == value
        setattr(margin, name, value)
        assert getattr(margin, name) == value


@EACH_RANGE
def test_parameters_out_of_range_raise_at_once_and_on_assignment(
    kind: type[Margin], name: str, range_text: str, good: tuple[float, ...], bad: tuple[float, ...]
) -> None:
    for value in (*bad, math.inf, -math.inf, math.nan):
        text = re.escape(f"{kind.__name__}: {name} must be in {range_text}, got {value}")
        with pytest.raises(ValueError, match=f"^{text}"):
            kind(**{name: value})
        margin = kind()
        before = getattr(margin, name)
        with pytest.raises(ValueError, match=f"^{text}"):
            setattr(margin, name, value)
        assert getattr(margin, name) == before


@EACH_RANGE
def test_parameters_of_another_type_raise(
    kind: type[Margin], name: str, range_text: str, good: tuple[float, ...], bad: tuple[float, ...]
) -> None:
    for value, type_name in (
        ("0.5", "str"),
        (True, "bool"),
        (None, "NoneType"),
        ([0.5], "list"),
        (0.5j, "complex"),
    ):
        text = re.escape(f"{kind.__name__}: {name} must be a float or a (B,) tensor, got {type_name}")
        with pytest.raises(TypeError, match=f"^{text}$"):
            kind(**{name: value})
        with pytest.raises(TypeError, match=f"^{text}$"):
            setattr(kind(), name, value)
    for tensor, came in (
        (torch.ones(3, dtype=torch.int64), "torch.int64 of shape (3,)"),
        (torch.ones(3, 1), "torch.float32 of shape (3, 1)"),
    ):
        text = re.escape(
            f"{kind.__name__}: {name} as a tensor must be floating point of shape (B,) or (), got {came}"
        )
        with pytest.raises(ValueError, match=f"^{text}$"):
            kind(**{name: tensor})


@pytest.mark.parametrize("degrees", [28.6, 5, PI])
def test_arcface_above_pi_says_that_it_wants_radians(degrees: float) -> None:
    text = (
        f"ArcFace: m must be in [0, 3.14159), got {degrees}; it is in radians, not degrees "
        f"({degrees} degrees are {math.radians(degrees):.4g} radians)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        ArcFace(degrees)
    margin = ArcFace()
    with pytest.raises(ValueError, match=re.escape(text)):
        margin.m = degrees


def test_an_unknown_boundary_raises_at_once_and_on_assignment() -> None:
    text = "ArcFace: boundary must be one of ('none', 'monotonic', 'easy'), got 'steep'"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        ArcFace(0.5, boundary="steep")
    margin = ArcFace()
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        margin.boundary = "steep"


def test_assigning_a_parameter_changes_the_next_call() -> None:
    margin = ArcFace(0.1)
    margin.m = 0.4
    margin.boundary = "easy"
    assert_close(margin(angles()), ArcFace(0.4, "easy")(angles()), dtype=torch.float64)


def test_a_margin_without_a_call_says_what_is_missing() -> None:
    class Halfway(Margin):
        pass

    text = "Halfway has no __call__(theta): a margin maps (B,) radians to (B,)"
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        Halfway()(angles())


@pytest.mark.parametrize("target_gradient", TARGET_GRADIENTS)
@pytest.mark.parametrize(
    ("wrong", "came"),
    [
        (lambda theta: theta.sum(), "()"),
        (lambda theta: theta[:1], "(1,)"),
        (lambda theta: theta[:, None], f"({len(ANGLES)}, 1)"),
        (lambda theta: 0.5, "float"),
        (lambda theta: None, "NoneType"),
    ],
    ids=["a sum", "one row", "a column", "a float", "nothing"],
)
def test_a_margin_that_returns_another_shape_raises(
    wrong: MarginFunction, came: str, target_gradient: str
) -> None:
    text = f"margin must return psi of theta's shape ({len(ANGLES)},), got {came}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        target_similarity(wrong, angles(), target_gradient)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128], ids=str)
def test_a_margin_that_returns_no_real_numbers_raises(dtype: torch.dtype) -> None:
    for target_gradient in ("exact", "detached"):
        with pytest.raises(ValueError, match=f"^margin must return floating point psi, got {dtype}$"):
            target_similarity(lambda theta: theta.to(dtype), angles(), target_gradient)


def test_a_parameter_of_another_batch_size_names_both_shapes() -> None:
    text = "margin: expected a parameter of shape (8,), one value a row, got (5,)"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        ExpFace(torch.full((5,), 0.7))(torch.rand(8, dtype=torch.float64))


def test_degrees_are_recognised_in_a_combined_margin_too() -> None:
    with pytest.raises(ValueError, match=r"^CombinedMargin: m2 must be in .* it is in radians, not degrees"):
        CombinedMargin(1.0, 28.6, 0.0)


def test_a_value_out_of_range_in_a_tensor_raises_on_the_cpu() -> None:
    with pytest.raises(ValueError, match=r"^ExpFace: m must be in \(0, 1\], got 2\.0$"):
        ExpFace(torch.tensor([0.7, 2.0, 0.5]))
