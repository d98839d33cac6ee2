"""What every backend promises of the smallest batches, ignored rows, zeros, extreme lengths and NaN.

B rows · C classes · D features
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expface_kernels.checks import SCALE_RANGE
from tests.cases import SCALES, TARGET_GRADIENTS, batch, loss_on, truth
from tests.test_backends.steps import F32, assert_true, is_zero, run
from tests.tolerances import assert_close, assert_rows_close

F64 = torch.float64


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("filling", [torch.nan, torch.inf, 0.0, 1e30])
def test_ignored_rows_add_nothing_whatever_they_hold(filling: float, reduction: str, backend: str) -> None:
    x, w, y = batch("mixed", 9, 21, 16)
    right = truth(x, w, y, reduction=reduction)
    order = torch.tensor([9, 0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 11])
    padded = torch.cat([x, torch.full((3, 16), filling, dtype=F64)])[order]
    labels = torch.cat([y, torch.full((3,), 255)])[order]
    real = order < 9
    loss, dx, dw = run(padded, w, labels, backend, reduction=reduction, ignore_index=255)
    assert is_zero(dx[~real])
    if reduction == "none":
        assert is_zero(loss[~real])
        loss = loss[real]
    assert_true((loss, dx[real], dw), right)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("filling", [torch.nan, 1.0])
def test_all_rows_ignored_is_loss_0_and_gradients_0(filling: float, reduction: str, backend: str) -> None:
    x, w, _ = batch("random", 4, 21, 16)
    labels = torch.full((4,), -100)
    for value in run(torch.full_like(x, filling), w, labels, backend, reduction=reduction):
        assert is_zero(value)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_batch_is_loss_0_and_gradients_0(reduction: str, backend: str) -> None:
    w = batch("random", 4, 21, 16)[1]
    loss, dx, dw = run(torch.empty(0, 16), w, torch.empty(0, dtype=torch.int64), backend, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert is_zero(loss)
    assert dx.shape == (0, 16)
    assert is_zero(dw)


@pytest.mark.parametrize("target_gradient", TARGET_GRADIENTS)
@pytest.mark.parametrize("kind", ["random", "near_centre", "opposite"])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_single_class_is_loss_0_and_gradients_0(
    rows: int, kind: str, target_gradient: str, backend: str
) -> None:
    x, w, y = batch(kind, rows, 1, 8)
    for scale in (1.0, 64.0, 256.0):
        for value in run(x, w, y, backend, scale=scale, target_gradient=target_gradient):
            assert is_zero(value)


def test_a_shard_that_holds_only_the_target_of_some_rows_is_no_nan(backend: str) -> None:
    x, w, _ = batch("random", 3, 9, 8)
    subset = torch.tensor([4])
    for value in run(x, w, torch.full((3,), 4), backend, class_subset=subset):
        assert is_zero(value)


def test_repeated_labels_add_up(backend: str) -> None:
    x, w, _ = batch("random", 40, 21, 16)
    for y in (torch.full((40,), 7), torch.arange(40) % 2 + 3):
        assert_true(run(x, w, y, backend, reduction="sum"), truth(x, w, y, reduction="sum"))


def _zeroed(x: Tensor, row: int) -> Tensor:
    x = x.clone()
    x[row] = 0
    return x


@pytest.mark.parametrize("scale", SCALES)
def test_a_row_of_zeros_has_no_gradient_and_a_finite_loss(scale: float, backend: str) -> None:
    x, w, y = batch("random", 6, 21, 16)
    x = _zeroed(x, 2)
    right = truth(x, w, y, scale=scale, reduction="sum")
    got = run(x, w, y, backend, scale=scale, reduction="sum")
    assert_true(got, right)
    assert is_zero(got[1][2])
    assert_rows_close(got[1], right[1], cap=4e-5)


@pytest.mark.parametrize("length", [0.0, 1e-13, 9e-13])
def test_a_centre_shorter_than_eps_has_no_gradient(length: float, backend: str) -> None:
    x, w, y = batch("random", 12, 5, 16)
    w = w.clone()
    w[3] *= length / w[3].norm()
    w = w.float().double()
    for labels in (y, torch.full_like(y, 3)):  # as one of the negatives, and as the target
        right = truth(x, w, labels, reduction="sum")
        got = run(x, w, labels, backend, reduction="sum")
        assert_true(got, right)
        assert is_zero(got[2][3])


@pytest.mark.parametrize("workspace_bytes", [0, 2**20])
def test_lengths_of_centres_from_1e_minus_6_to_1e3_mix(workspace_bytes: int, backend: str) -> None:
    x, w, y = batch("mixed", 20, 41, 16)
    lengths = 10 ** torch.linspace(-6, 3, 41, dtype=F64)[torch.randperm(41)]
    w = (w / w.norm(dim=1, keepdim=True) * lengths[:, None]).float().double()
    right = truth(x, w, y, reduction="sum")
    loss, dx, dw = run(x, w, y, backend, reduction="sum", workspace_bytes=workspace_bytes)
    assert_close(loss, right[0], dtype=F32)
    assert_close(dx, right[1], dtype=F32)
    # Short centres have long gradients, which alone would decide the norm: make them equals.
    assert_close(dw * lengths[:, None], right[2] * lengths[:, None], dtype=F32, what="dw·|w|")


@pytest.mark.parametrize("length", [1e-10, 1e-9, 1e-6, 1e4, 1e15])
def test_lengths_of_rows_and_centres_neither_overflow_nor_vanish(length: float, backend: str) -> None:
    x, w, y = batch("random", 12, 21, 16)
    x, w = (
        (length * x / x.norm(dim=1, keepdim=True)).float().double(),
        (length * w / w.norm(dim=1, keepdim=True)).float().double(),
    )
    right = truth(x, w, y, reduction="sum")
    for workspace_bytes in (0, 2**20):
        assert_true(run(x, w, y, backend, reduction="sum", workspace_bytes=workspace_bytes), right)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("whole_row", [False, True])
def test_a_row_with_nan_or_inf_loses_its_own_loss_only(bad: float, whole_row: bool, backend: str) -> None:
    x, w, y = batch("mixed", 9, 21, 16)
    right = truth(x, w, y, reduction="none")
    x = x.clone()
    x[4] = torch.where(torch.arange(16) >= (0 if whole_row else 15), bad, x[4])
    others = torch.arange(9) != 4
    for workspace_bytes in (0, 2**20):
        loss, dx, _ = run(x, w, y, backend, reduction="none", workspace_bytes=workspace_bytes)
        assert loss.isnan().tolist() == (~others).tolist()
        assert_rows_close(loss[others], right[0][others], cap=2e-5, what="loss")
        assert_rows_close(dx[others], right[1][others], cap=2e-5, what="dx")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_centre_with_nan_makes_every_counted_loss_nan(bad: float, backend: str) -> None:
    x, w, y = batch("random", 9, 21, 16)
    w = w.clone()
    w[3, 5] = bad
    y[0], y[1] = -100, 3
    loss, dx, _ = run(x, w, y, backend, reduction="none")
    assert loss.isnan().tolist() == [False, *[True] * 8]
    assert float(loss[0]) == 0
    assert is_zero(dx[0])


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", SCALE_RANGE)
def test_at_both_ends_of_the_scales_nothing_overflows(scale: float, dtype: torch.dtype, backend: str) -> None:
    for kind in ("random", "learnt"):
        x, w, y = batch(kind, 8, 50, 16)
        x, w = x.to(dtype), w.to(dtype)
        right = truth(x, w, y, scale=scale)
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = loss_on(backend, a, b, y, scale=scale)
        loss.backward()
        assert_close(loss.detach(), right[0], dtype=F32, what="loss")
        assert_close(a.grad, right[1], dtype=dtype, what="dx")
        assert_close(b.grad, right[2], dtype=dtype, what="dw")
