"""The tolerances can fail: each policy turns down the mutations that a kernel test must notice.

B rows · C classes · D features
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from expface_kernels import ExpFace, margin_cross_entropy
from expface_kernels.backends import cpu
from expface_kernels.backends.base import TargetGeometry
from tests.cases import batch, eager, leaves, truth
from tests.tolerances import CAPS, assert_close, assert_rows_close, relative_error, row_cap

F32 = torch.float32
SHAPE = (24, 65, 16)


def _gradients(kind: str) -> tuple[Tensor, Tensor]:
    x, w, y = batch(kind, *SHAPE)
    a, b = leaves(x, w)
    margin_cross_entropy(a, b, y, reduction="sum", workspace_bytes=0, backend="cpu").backward()
    return a.grad, b.grad


def _assert_kernel_is_right(kind: str, with_eager: bool = True) -> None:
    """A kernel test in small: both gradients against the truth, under both policies."""
    x, w, y = batch(kind, *SHAPE)
    got, want = _gradients(kind), truth(x, w, y, reduction="sum")[1:]
    _, *beside = eager(x, w, y, ExpFace(), dtype=F32, reduction="sum") if with_eager else (None, None, None)
    for name, actual, right, other in zip(("dx", "dw"), got, want, beside, strict=True):
        assert_close(actual, right, eager=other, dtype=F32, what=name)
    assert_rows_close(got[0], want[0], cap=row_cap(64.0), what="dx")


@pytest.mark.parametrize("kind", ["random", "learnt", "mixed"])
def test_the_unmutated_kernel_passes(kind: str, small_tiles: int) -> None:
    _assert_kernel_is_right(kind)


def _zero_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu._input_gradient
    monkeypatch.setattr(cpu, "_input_gradient", lambda *args: torch.zeros_like(right(*args)))


def _zero_rows_that_are_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu._input_gradient

    def mutated(*args: Tensor) -> Tensor:
        dx = right(*args)
        return torch.where(dx.abs().amax(1, keepdim=True) < 1e-6, 0.0, dx)

    monkeypatch.setattr(cpu, "_input_gradient", mutated)


def _shifted_label(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.Kernels.backward_tile
    monkeypatch.setattr(
        cpu.Kernels,
        "backward_tile",
        lambda self, dots, inv, scale, y, log2_l: right(self, dots, inv, scale, y + 1, log2_l),
    )


def _dropped_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    right, start = cpu.TilePlan.tiles, cpu._WeightGradient.__init__

    def start_at_zero(self: cpu._WeightGradient, *args: object) -> None:
        start(self, *args)
        self.dw.zero_()  # a fresh buffer may hold the right gradient of an earlier test

    monkeypatch.setattr(cpu._WeightGradient, "__init__", start_at_zero)
    monkeypatch.setattr(cpu.TilePlan, "tiles", lambda self: list(right(self))[1:])


def _dropped_tangent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TargetGeometry, "tangents", lambda self: (torch.zeros_like(self.xn),) * 2)


def _half_tangent_to_the_centres(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu._tangent_sums
    monkeypatch.setattr(cpu, "_tangent_sums", lambda *a: (right(*a)[0], right(*a)[1] / 2))


def _forgotten_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled_only(self: cpu.Kernels, acc: Tensor, w: Tensor, inv: Tensor, factor: float) -> None:
        acc *= factor

    monkeypatch.setattr(cpu.Kernels, "project", scaled_only)


@pytest.mark.parametrize("kind", ["random", "learnt"])
@pytest.mark.parametrize(
    "mutate",
    [
        _zero_gradient,
        _shifted_label,
        _dropped_tile,
        _dropped_tangent,
        _half_tangent_to_the_centres,
        _forgotten_projection,
    ],
)
def test_a_mutated_kernel_is_turned_down(
    mutate: Callable[[pytest.MonkeyPatch], None],
    kind: str,
    small_tiles: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        _assert_kernel_is_right(kind)


def test_losing_only_the_learnt_rows_is_seen_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, y = batch("mixed", *SHAPE)
    right = truth(x, w, y, reduction="sum")[1]
    _zero_rows_that_are_learnt(monkeypatch)
    dx = _gradients("mixed")[0]
    assert_close(dx, right, dtype=F32)  # by its norm nothing is missing
    with pytest.raises(AssertionError, match="rows off"):
        assert_rows_close(dx, right, cap=2e-5)


def test_where_eager_is_all_wrong_the_cap_still_turns_down_zeros() -> None:
    x, w, y = batch("learnt", 64, 1031, 512)
    right = truth(x, w, y, reduction="sum")[1]
    beside = eager(x, w, y, ExpFace(), dtype=F32, reduction="sum")[1]
    assert relative_error(beside, right) > 0.3  # three times that would let a zero gradient pass
    with pytest.raises(AssertionError):
        assert_close(torch.zeros_like(right), right, eager=beside, dtype=F32)


def test_an_error_past_three_times_eager_fails_below_the_cap() -> None:
    right = torch.ones(100, dtype=torch.float64)
    assert_close(right + 2.9e-6, right, eager=right + 1e-6, dtype=F32)
    with pytest.raises(AssertionError):
        assert_close(right + 3.1e-6, right, eager=right + 1e-6, dtype=F32)
    assert_close(right + 0.9e-6, right, eager=right, dtype=F32)
    with pytest.raises(AssertionError):
        assert_close(right + 1.1e-6, right, eager=right, dtype=F32)


@pytest.mark.parametrize("dtype", CAPS)
def test_no_eager_error_excuses_more_than_the_cap(dtype: torch.dtype) -> None:
    right, cap = torch.ones(10, dtype=torch.float64), CAPS[dtype]
    for yardstick in (None, right * 2, right * torch.nan):
        assert_close(right * (1 + 0.9 * cap), right, eager=yardstick, dtype=dtype)
        with pytest.raises(AssertionError):
            assert_close(right * (1 + 1.1 * cap), right, eager=yardstick, dtype=dtype)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_never_pass(bad: float) -> None:
    right = torch.ones(4, 3, dtype=torch.float64)
    wrong = right.clone()
    wrong[2, 1] = bad
    for actual, expected in ((wrong, right), (right, wrong), (wrong, wrong)):
        with pytest.raises(AssertionError):
            assert_close(actual, expected, dtype=F32)
        with pytest.raises(AssertionError):
            assert_rows_close(actual, expected, cap=2e-5)


def test_a_truth_of_zero_wants_zero_or_a_stated_bound() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert_close(zero, zero, dtype=F32)
    assert_close(zero + 1e-9, zero, dtype=F32, absolute=1e-8)
    with pytest.raises(AssertionError):
        assert_close(zero + 1e-38, zero, dtype=F32)
    with pytest.raises(AssertionError):
        assert_close(zero + 1e-7, zero, dtype=F32, absolute=1e-8)


def test_values_below_float32_must_stay_small_and_no_more() -> None:
    faint = torch.full((4,), 1e-60, dtype=torch.float64)
    assert_close(torch.zeros(4), faint, dtype=F32)
    assert_rows_close(torch.zeros(4, 1), faint[:, None], cap=2e-5)
    with pytest.raises(AssertionError):
        assert_close(torch.full((4,), 1e-20), faint, dtype=F32)
    with pytest.raises(AssertionError):
        assert_rows_close(torch.full((4, 1), 1e-20), faint[:, None], cap=2e-5)


def test_another_shape_is_no_match() -> None:
    with pytest.raises(AssertionError):
        assert_close(torch.ones(3, 1), torch.ones(3), dtype=F32)
    with pytest.raises(AssertionError):
        assert_rows_close(torch.ones(3, 1), torch.ones(1, 3), cap=1.0)
