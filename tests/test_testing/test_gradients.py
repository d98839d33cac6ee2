"""The gradient check passes what is right and names what is wrong.

B rows · C classes · D features
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from expface_kernels import ArcFace, ExpFace, SphereFace, margin_cross_entropy
from expface_kernels.margins import MarginFunction
from expface_kernels.testing import KINDS, GradientReport, assert_gradients, batch, check_gradients, policy
from expface_kernels.testing.gradients import DEFAULT_KINDS
from tests.cases import MARGINS
from tests.test_cli.own_margins import OfATable, SlopeInFloat64, WrongSlope
from tests.tolerances import WORST_DEGREES, WORST_NEAR

SMALL = {"rows": 12, "classes": 65, "features": 16}


def _failed(report: GradientReport) -> set[tuple[str, str]]:
    """(batch, quantity) of what did not pass."""
    return {(one.kind, q.name) for one in report.batches for q in one.quantities if not q.passed}


@pytest.mark.parametrize("target_gradient", ["exact", "detached"])
def test_margins_pass_on_every_batch(target_gradient: str) -> None:
    for margin in MARGINS[:: 5 if target_gradient == "exact" else 7]:
        assert_gradients(margin, target_gradient=target_gradient, kinds=KINDS, **SMALL)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_passes(dtype: torch.dtype) -> None:
    report = check_gradients(dtype=dtype, workspace_bytes=0, **SMALL)
    assert report, report.failures()
    by_name = {q.name: q.limit for q in report.batches[0].quantities}
    assert by_name["dx"] == policy.CAPS[dtype] or dtype != torch.float64
    # A loss is float32 whatever its inputs are, and judged as such.
    assert by_name["loss"] <= policy.CAPS[torch.promote_types(dtype, torch.float32)]


@pytest.mark.parametrize("scale", [1.0, 70.0, 256.0])
def test_every_scale_passes(scale: float) -> None:
    assert_gradients(scale=scale, backend="cpu", **SMALL)


def test_the_reference_is_eager_itself_and_judged_by_the_cap() -> None:
    report = check_gradients(backend="reference", **SMALL)
    assert report, report.failures()
    assert {q.eager_error for q in report.batches[0].quantities[:3]} == {None}
    assert report.batches[0].quantities[1].limit == policy.CAPS[torch.float32]


def test_one_row_and_one_class_pass() -> None:
    assert_gradients(rows=1, classes=1, features=8)
    assert_gradients(rows=1, classes=2, features=2)


@pytest.mark.parametrize("margin", [OfATable(), SlopeInFloat64()], ids=["value", "slope"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_margin_that_takes_float64_alone_is_judged_in_every_dtype(
    margin: MarginFunction, dtype: torch.dtype
) -> None:
    report = check_gradients(margin, dtype=dtype, backend="cpu", **SMALL)
    assert report, report.failures()
    assert report.setting["eager_psi"] == "float64"
    # And eager is there to judge by.
    assert all(q.eager_error is not None and q.eager_error < 1 for q in report.batches[0].quantities[:3])


def test_any_other_margin_is_eager_in_the_dtype_itself() -> None:
    assert check_gradients(kinds=["random"], dtype=torch.bfloat16, **SMALL).setting["eager_psi"] == "bfloat16"


def test_what_is_reported() -> None:
    report = check_gradients(ArcFace(0.4), target_gradient="detached", seed=3, **SMALL)
    assert report.setting["margin"] == "ArcFace(m=0.4, boundary='none')"
    assert report.setting["backend"] == "cpu"
    assert [one.kind for one in report.batches] == ["random", "near_centre", "opposite", "learnt", "spread"]
    angles = {}
    for one in report.batches:
        quantities = {q.name: q for q in one.quantities}
        assert list(quantities) == [
            "loss",
            "dx",
            "dw",
            "loss, worst row",
            "dx, worst row",
            "finite differences",
        ]
        worst = quantities["dx, worst row"]
        assert worst.row in range(SMALL["rows"])
        assert worst.error >= quantities["dx"].error / 2  # no norm is worse than its worst row's, by far
        angles[one.kind] = math.degrees(worst.angle or 0.0)
    assert angles["near_centre"] < 0.1
    assert angles["opposite"] > 179.9
    assert angles["learnt"] == pytest.approx(35, abs=WORST_DEGREES)


def test_where_eager_loses_the_gradient_the_cap_holds() -> None:
    report = check_gradients(kinds=["learnt"], rows=12, classes=65, features=256)
    dx = report.batches[0].quantities[1]
    assert dx.eager_error is not None
    assert dx.eager_error > 0.3  # three times that would let a zero gradient pass
    assert dx.limit == policy.CAPS[torch.float32]


def test_json_has_no_nan_in_it() -> None:
    """Eager float32 gives NaN at θ = 0."""
    plain = check_gradients(kinds=["near_centre"], **SMALL).to_dict()
    text = json.dumps(plain, allow_nan=False)
    assert json.loads(text)["batches"][0]["quantities"][1]["eager_error"] == "nan"
    assert plain["passed"] is True


# Losses with a fault each: what the check is given, and what it must find.


def _right(x: Tensor, w: Tensor, y: Tensor, margin: MarginFunction, **options: Any) -> Tensor:
    loss = margin_cross_entropy(x, w, y, margin, **options)
    assert isinstance(loss, Tensor)
    return loss


class _Scaled(torch.autograd.Function):
    """Its input, with `factor` times its gradient."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return v.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * g, None


def _no_dx(x: Tensor, w: Tensor, *others: Any, **options: Any) -> Tensor:
    return _right(_Scaled.apply(x, 0.0), w, *others, **options)


def _dx_off_by_a_thousandth(x: Tensor, w: Tensor, *others: Any, **options: Any) -> Tensor:
    return _right(_Scaled.apply(x, 1.001), w, *others, **options)


def _dw_off_by_a_thousandth(x: Tensor, w: Tensor, *others: Any, **options: Any) -> Tensor:
    return _right(x, _Scaled.apply(w, 1.001), *others, **options)


def _shifted_label(x: Tensor, w: Tensor, y: Tensor, *others: Any, **options: Any) -> Tensor:
    return _right(x, w, (y + 1) % w.shape[0], *others, **options)


def _loss_off_by_a_thousandth(*args: Any, **options: Any) -> Tensor:
    loss = _right(*args, **options)
    return loss + 1e-3 * loss.detach()


def _no_dx_of_row_one(x: Tensor, w: Tensor, *others: Any, **options: Any) -> Tensor:
    rows = torch.arange(x.shape[0]) == 1
    return _right(torch.where(rows[:, None], x.detach(), x), w, *others, **options)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (_no_dx, {"dx", "dx, worst row", "finite differences"}),
        (_dx_off_by_a_thousandth, {"dx", "dx, worst row", "finite differences"}),
        (_dw_off_by_a_thousandth, {"dw", "finite differences"}),
        (_loss_off_by_a_thousandth, {"loss", "loss, worst row", "finite differences"}),
    ],
)
def test_a_fault_is_found_in_what_it_spoils_and_nowhere_else(function: Any, expected: set[str]) -> None:
    found = _failed(check_gradients(function=function, **SMALL))
    for kind in DEFAULT_KINDS:
        assert {name for of, name in found if of == kind} == expected, kind


def test_a_shifted_label_is_found_everywhere_but_in_its_own_derivative() -> None:
    found = _failed(check_gradients(function=_shifted_label, kinds=["random", "learnt"], **SMALL))
    for kind in ("random", "learnt"):
        assert {name for of, name in found if of == kind} == {
            "loss",
            "dx",
            "dw",
            "loss, worst row",
            "dx, worst row",
        }


def test_the_worst_row_is_named_with_its_angle() -> None:
    report = check_gradients(function=_no_dx_of_row_one, kinds=["near_centre"], **SMALL)
    worst = {q.name: q for q in report.batches[0].quantities}["dx, worst row"]
    assert (worst.row, worst.passed) == (1, False)
    assert worst.angle == pytest.approx(1e-3, rel=WORST_NEAR)  # the second of the angles near a centre
    assert any("row 1 at 0.0573 degrees" in line for line in report.failures())
    with pytest.raises(AssertionError, match="near_centre: dx, worst row"):
        assert_gradients(function=_no_dx_of_row_one, kinds=["near_centre"], **SMALL)


def test_a_margin_with_a_wrong_slope_is_found_by_differences_alone() -> None:
    """Truth and eager run the same margin, and are wrong with it."""
    found = _failed(check_gradients(WrongSlope(0.99), **SMALL))
    assert found == {
        (kind, what) for kind in DEFAULT_KINDS for what in ("finite differences", "margin's slope")
    }
    assert not _failed(check_gradients(WrongSlope(0.99), target_gradient="detached", **SMALL))


def test_a_margin_that_detaches_its_own_angle_is_not_exact() -> None:
    found = _failed(check_gradients(lambda theta: ExpFace()(theta.detach()), kinds=["random"], **SMALL))
    assert found == {("random", "finite differences"), ("random", "margin's slope")}


class _WrongBetween(torch.autograd.Function):
    """cos θ with −5 times its slope in some range, radians."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(theta)
        ctx.range = (low, high)
        return torch.cos(theta)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (theta,) = ctx.saved_tensors
        low, high = ctx.range
        wrong = (theta > low) & (theta < high)
        return torch.where(wrong, -5.0, 1.0) * -torch.sin(theta) * g, None, None


@pytest.mark.parametrize(("low", "high"), [(0.7, 1.2), (2.0, 3.0), (1e-3, 0.01), (1.2, 1.205), (3.13, 3.14)])
def test_a_slope_that_is_wrong_between_the_angles_of_the_batches_is_found(low: float, high: float) -> None:
    def margin(theta: Tensor) -> Tensor:
        psi: Tensor = _WrongBetween.apply(theta, low, high)
        return psi

    report = check_gradients(margin, **SMALL)
    for kind in DEFAULT_KINDS:
        assert (kind, "margin's slope") in _failed(report)
    worst = [q.angle for one in report.batches for q in one.quantities if q.name == "margin's slope"]
    assert all(low < (angle or 0.0) < high for angle in worst)
    assert any(
        line.startswith("near_centre: margin's slope") and line.endswith(" degrees)")
        for line in report.failures()
    )


def _bent(theta: Tensor) -> Tensor:
    return torch.cos(theta) - 0.2 * (theta - 1.0).clamp_min(0)


def _jumping(theta: Tensor) -> Tensor:
    return torch.where(theta < 2.0, torch.cos(theta), torch.cos(theta) - 0.5 * theta)


@pytest.mark.parametrize("target_gradient", ["exact", "detached"])
@pytest.mark.parametrize(
    "margin",
    [_bent, _jumping, ArcFace(0.8, boundary="easy"), ArcFace(0.8, boundary="monotonic"), SphereFace(4.0)],
)
def test_a_margin_that_bends_or_jumps_passes(margin: MarginFunction, target_gradient: str) -> None:
    """So many rows that some stand closer to it than their steps are long."""
    options = {"rows": 4001, "classes": 5, "features": 4, "target_gradient": target_gradient}
    assert_gradients(margin, kinds=["random", "spread"], **options)


@pytest.mark.parametrize("target_gradient", ["exact", "detached"])
@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_every_margin_passes_as_asked_by_default(margin: MarginFunction, target_gradient: str) -> None:
    assert_gradients(margin, target_gradient=target_gradient, **SMALL)


def test_a_margin_with_a_parameter_a_row_passes() -> None:
    per_row = ArcFace(torch.linspace(0.2, 0.6, SMALL["rows"], dtype=torch.float64))
    assert_gradients(per_row, **SMALL)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"rows": 0}, ValueError, "rows"),
        ({"classes": 1.5}, TypeError, "classes"),
        ({"features": -1}, ValueError, "features"),
        ({"features": 1}, ValueError, "features: expected at least 2"),
        ({"kinds": []}, ValueError, "kinds"),
        ({"kinds": ["hard"]}, ValueError, "hard"),
        ({"dtype": torch.int32}, TypeError, "dtype"),
        ({"backend": "fast"}, ValueError, "backend"),
        ({"scale": 0.0}, ValueError, "scale"),
        ({"target_gradient": "both"}, ValueError, "target_gradient"),
        ({"margin": ExpFace}, TypeError, "margin"),
        ({"seed": "x"}, TypeError, "seed"),
        ({"workspace_bytes": -1}, ValueError, "workspace_bytes"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        check_gradients(**options)


def test_a_check_leaves_a_margins_parameters_alone() -> None:
    class Trained(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
            self.m.grad = torch.tensor(7.0, dtype=torch.float64)

        def forward(self, theta: Tensor) -> Tensor:
            return ExpFace(self.m)(theta)

    margin = Trained()
    check_gradients(margin, rows=6, classes=33, features=16, kinds=("random",))
    assert margin.m.grad == 7


def test_the_default_device_changes_nothing() -> None:
    def made() -> list[Tensor]:
        return [tensor for kind in KINDS for tensor in batch(kind, 8, 5, 4)]

    expected = made()
    torch.set_default_device("meta")
    try:
        got = made()
    finally:
        torch.set_default_device(None)
    assert all(map(torch.equal, got, expected))
