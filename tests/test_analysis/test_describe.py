"""describe: what it finds of margins whose answer is known, and of some with jumps and flat stretches."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor

from expface_kernels import ArcFace, CosFace, ExpFace, NormFace, SphereFace
from expface_kernels.analysis import describe
from expface_kernels.analysis.curves import Interval, label
from expface_kernels.margins import MarginFunction
from tests.cases import MARGINS
from tests.tolerances import FOUND_ANGLE

PI = math.pi
WHOLE = (Interval(0.0, PI),)


def near(value: Any) -> Any:
    return pytest.approx(float(value), abs=FOUND_ANGLE)


@pytest.mark.parametrize("m", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_expface(m: float) -> None:
    found, exponent = describe(ExpFace(m)), mpf(m)
    assert found.monotonic
    assert found.falls == WHOLE
    assert found.rises == found.jumps == found.turns == found.vanishes == ()
    top = mp.pi * exponent ** (1 / (1 - exponent))
    assert found.angular_peak.start == found.angular_peak.end == near(top)
    assert found.angular_peak.size == near(mp.pi * (top / mp.pi) ** exponent - top)
    # The cosine penalty grows as long as the slope of psi is steeper than that of cos θ: until r = 1.
    r_is_one = mp.findroot(
        lambda t: (
            exponent * (t / mp.pi) ** (exponent - 1) * mp.sin(mp.pi * (t / mp.pi) ** exponent) - mp.sin(t)
        ),
        found.weak[0].start,
    )
    assert found.weak == (Interval(near(r_is_one), PI),)
    assert found.cosine_peak.start == near(r_is_one)


@pytest.mark.parametrize("m", [0.1, 0.5, 1.2])
def test_arcface_as_published_turns_at_its_end(m: float) -> None:
    found = describe(ArcFace(m))
    assert not found.monotonic
    assert found.falls == (Interval(0.0, near(PI - m)),)
    assert found.rises == (Interval(near(PI - m), PI),)
    assert found.turns == (near(PI - m),)
    assert found.jumps == found.vanishes == ()
    assert found.weak == (Interval(near((PI - m) / 2), PI),)
    assert found.cosine_peak == (near(2 * math.sin(m / 2)), near((PI - m) / 2), near((PI - m) / 2))
    assert found.angular_peak.size == near(m)
    assert found.angular_peak.start == 0
    assert 0 <= PI - m - found.angular_peak.end < math.radians(0.05)  # a grid point


@pytest.mark.parametrize(("m", "monotonic"), [(0.5, True), (2.3, True), (2.4, False)])
def test_monotonic_arcface_falls_everywhere_while_its_jump_is_downwards(m: float, monotonic: bool) -> None:
    found = describe(ArcFace(m, "monotonic"))
    assert found.monotonic == monotonic
    (jump,) = found.jumps
    assert jump == (near(PI - m), near(1 - math.cos(m) - m * math.sin(m)))
    assert found.turns == found.rises == ()
    assert found.weak == (Interval(near((PI - m) / 2), near(PI - m)),)
    if not monotonic:
        assert found.falls == (Interval(0.0, near(PI - m)), Interval(near(PI - m), PI))


def test_easy_arcface_jumps_up_in_the_middle() -> None:
    found = describe(ArcFace(0.5, "easy"))
    assert found.jumps == ((near(PI / 2), near(math.sin(0.5))),)
    assert found.falls == (Interval(0.0, near(PI / 2)), Interval(near(PI / 2), PI))
    assert not found.monotonic
    assert found.weak == (Interval(near((PI - 0.5) / 2), near(PI / 2)),)


@pytest.mark.parametrize("m", [1.5, 2.0, 4.0])
def test_sphereface_falls_and_its_slope_vanishes_at_the_joints(m: float) -> None:
    found = describe(SphereFace(m))
    assert found.monotonic
    assert found.vanishes == tuple(near(k * PI / m) for k in range(1, 10) if k < m)
    assert found.jumps == found.turns == ()
    assert found.angular_peak == (near((m - 1) * PI), PI, PI)
    middle = [interval for interval in found.weak if interval.start < PI / m < interval.end]
    for edge in middle[0]:  # around each joint the target pulls less than the others push
        assert abs(m * math.sin(m * edge)) == near(math.sin(edge))


@pytest.mark.parametrize(("margin", "size"), [(NormFace(), 0.0), (CosFace(0.35), 0.35), (ExpFace(1.0), 0.0)])
def test_where_the_cosine_only_moves_the_penalty_is_the_same_everywhere(
    margin: MarginFunction, size: float
) -> None:
    found = describe(margin)
    assert found.monotonic
    assert found.cosine_peak == (near(size), 0.0, PI)
    assert found.weak == found.turns == found.vanishes == ()


def test_functions_are_called_by_name_and_modules_by_one_line() -> None:
    def mine(theta: Tensor) -> Tensor:
        return torch.cos(theta)

    assert describe(mine).margin == "mine"
    assert describe(torch.cos).margin == "cos"
    nested = torch.nn.Sequential(torch.nn.Identity())
    assert label(nested) == "Sequential( (0): Identity() )"


def test_a_flat_stretch_neither_falls_nor_rises() -> None:
    found = describe(lambda theta: torch.cos(theta).clamp(-0.5, 0.5))
    assert found.falls == (Interval(near(PI / 3), near(2 * PI / 3)),)
    assert found.rises == found.turns == found.vanishes == ()
    assert [tuple(interval) for interval in found.weak] == [(0.0, near(PI / 3)), (near(2 * PI / 3), PI)]


def test_a_margin_that_computes_in_float32_has_no_jumps_for_it() -> None:
    found = describe(lambda theta: torch.cos(theta.float()) - 0.25)
    assert found.monotonic
    assert found.jumps == found.weak == found.turns == found.vanishes == ()
    assert found.cosine_peak == (near(0.25), 0.0, PI)


def test_a_floor_under_the_slope_is_nowhere_weak() -> None:
    """psi falls like ExpFace's down to r = 1, from there like the cosine: r is exactly 1 on a stretch."""
    start = describe(ExpFace()).weak[0].start

    def floored(theta: Tensor) -> Tensor:
        at = torch.tensor(start, dtype=torch.float64)
        beyond = torch.cos(theta) - torch.cos(at) + ExpFace()(at[None])[0]
        return torch.where(theta < start, ExpFace()(theta), beyond)

    found = describe(floored)
    assert found.monotonic
    assert found.weak == found.turns == found.jumps == ()


def test_jumps_of_ones_own_are_found() -> None:
    def steps(theta: Tensor) -> Tensor:
        return torch.cos(theta) - 0.25 * (theta > 1.0) + 0.125 * (theta > 2.0)

    found = describe(steps)
    assert found.jumps == ((near(1.0), near(-0.25)), (near(2.0), near(0.125)))
    assert found.falls == (Interval(0.0, near(2.0)), Interval(near(2.0), PI))
    assert found.cosine_peak == (near(0.25), near(1.0), near(2.0))


def test_a_slope_may_touch_zero_smoothly_or_change_sign_at_a_point_of_the_grid() -> None:
    assert describe(lambda theta: torch.cos(theta) ** 3).vanishes == (near(PI / 2),)
    found = describe(lambda theta: -torch.sin(theta))
    assert found.turns == (near(PI / 2),)
    assert found.falls == (Interval(0.0, near(PI / 2)),)
    assert found.rises == (Interval(near(PI / 2), PI),)


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_a_description_is_plain_json(margin: MarginFunction) -> None:
    found = describe(margin)
    again = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert again == found.as_dict()
    assert again["margin"] == repr(margin)
    assert again["monotonic"] == (again["falls"] == [[0.0, PI]])


@pytest.mark.parametrize(
    ("margin", "error", "words"),
    [
        ("expface", TypeError, "margin: expected a callable"),
        (ExpFace, TypeError, "got the class itself"),
        (lambda theta: 1 / theta, ValueError, r"finite psi on \[0, π\], got inf"),
        (lambda theta: torch.sqrt(1 - theta), ValueError, "got nan"),
        (lambda theta: theta[:, None], ValueError, "margin must return psi of theta's shape"),
        (lambda theta: torch.cos(theta.detach()), ValueError, "through autograd"),
        (lambda theta: -torch.sqrt((theta - PI / 2).abs()), ValueError, "finite slope of psi"),
    ],
)
def test_what_is_no_margin_is_named(margin: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        describe(margin)
