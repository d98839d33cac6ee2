"""How near is near enough: the policy by which losses and gradients are judged, and its only numbers.

An error is the norm of the difference over the norm of the float64 truth. It may be at most
max(3 × the error that eager PyTorch makes in the same dtype, 1e-6), and never above the cap of its dtype:
where every row is learnt eager float32 is 36-99% wrong, so the ratio alone would pass a gradient of zeros.

R rows · the last dimension of a (R, D) tensor is a row's features
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CAPS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
EAGER_RATIO = 3.0
FLOOR = 1e-6
# Smaller values (losses and gradients of rows learnt beyond all doubt) near float32's end, 1e-38: they are
# not compared, they must only be as small.
SMALLEST = {torch.float32: 1e-30, torch.float64: 1e-290, torch.bfloat16: 1e-30, torch.float16: 0.0}
SMALLEST_ROW = 1e-30


FINITE_DIFFERENCES = 1e-6
"""Relative: a float64 gradient against differences of its own loss, whose rounding sets the bound."""


@dataclass(frozen=True)
class Verdict:
    """An error, the limit that holds for it, and whether it is within."""

    error: float
    limit: float
    passed: bool


@dataclass(frozen=True)
class RowVerdict(Verdict):
    """The same of the worst row; `errors` (R,) float64 are all rows', 0 for those too faint to judge."""

    row: int
    """−1 where there are no rows."""
    errors: Tensor
    what: str
    """What is wrong, in words; empty where nothing is."""


def row_cap(scale: float, dtype: torch.dtype = torch.float32) -> float:
    """Cap of one row: that of the dtype; a logit s·cos carries s roundings, so twice from s = 128 on."""
    return CAPS[dtype] * (2 if scale >= 128 else 1)


def smallest_row(dtype: torch.dtype) -> float:
    """A row that stays below it is not judged: below it the dtype has no digits, or float32 none to spare."""
    return torch.finfo(dtype).tiny if dtype == torch.float16 else SMALLEST_ROW


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """|actual − truth| / |truth| in float64; NaN where there is any; a truth of 0 gives 0 for 0, else inf."""
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    actual, truth = actual.detach().double(), truth.detach().double()
    if actual.isnan().any() or truth.isnan().any():
        return float("nan")
    if truth.numel() == 0:
        return 0.0
    largest = truth.abs().max()
    if largest == 0:
        return 0.0 if bool((actual == 0).all()) else float("inf")
    # Divided first, so that squares of 1e-200 do not vanish.
    difference = torch.linalg.vector_norm((actual - truth) / largest)
    return float(difference / torch.linalg.vector_norm(truth / largest))


def judge(
    actual: Tensor,
    truth: Tensor,
    *,
    eager: Tensor | float | None = None,
    dtype: torch.dtype,
    absolute: float = 0.0,
) -> Verdict:
    """Whether `actual` is as near to the float64 `truth` as the policy wants of `dtype`, the one computed in.

    eager: what same-dtype PyTorch got, or the error it made; NaN is no measure, then only the cap holds.
    absolute: a bound on each element that suffices where the truth is exactly zero.
    """
    actual, truth = actual.detach(), truth.detach()
    error = relative_error(actual, truth)
    limit = CAPS[dtype]
    if eager is not None:
        eager_error = relative_error(eager, truth) if isinstance(eager, Tensor) else eager
        if not math.isnan(eager_error):
            limit = min(limit, max(EAGER_RATIO * eager_error, FLOOR))
    largest = float(truth.abs().max()) if truth.numel() else 0.0
    reached = float(actual.abs().max()) if actual.numel() else 0.0
    vanishing = 0 < largest < SMALLEST[dtype] and reached <= 2 * SMALLEST[dtype]
    excused = vanishing or (error == math.inf and reached <= absolute)
    return Verdict(error, limit, excused or error <= limit)


def assert_close(
    actual: Tensor,
    truth: Tensor,
    *,
    eager: Tensor | float | None = None,
    dtype: torch.dtype,
    absolute: float = 0.0,
    what: str = "",
) -> None:
    """AssertionError, which names `what`, where `judge` turns `actual` down."""
    verdict = judge(actual, truth, eager=eager, dtype=dtype, absolute=absolute)
    assert verdict.passed, (
        f"{what or 'value'}: error {verdict.error:.3g} against the truth, at most {verdict.limit:.3g} allowed"
    )


def judge_rows(actual: Tensor, truth: Tensor, *, cap: float, smallest: float = SMALLEST_ROW) -> RowVerdict:
    """Whether every row (R, D), or element (R,), is within `cap` of its own truth's norm.

    Rows whose truth stays below `smallest` must stay below twice it: they cannot be judged more closely.
    """
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    rows = actual.shape[0]
    actual = actual.detach().double().reshape(rows, -1)
    truth = truth.detach().double().reshape(rows, -1)
    if not rows:
        return RowVerdict(0.0, cap, True, -1, truth.new_zeros(0), "")
    largest = truth.abs().amax(dim=1, keepdim=True)
    if not bool(torch.isfinite(largest).all()):
        return RowVerdict(math.nan, cap, False, -1, largest[:, 0], "the truth itself is not finite")
    faint = largest[:, 0] <= smallest
    unit = torch.where(faint[:, None], 1.0, largest)
    norm = torch.linalg.vector_norm(truth / unit, dim=1)
    errors = torch.linalg.vector_norm((actual - truth) / unit, dim=1) / torch.where(faint, 1.0, norm)
    stray = faint & ~(actual.abs().amax(dim=1) <= 2 * smallest)
    errors = torch.where(faint, torch.where(stray, torch.inf, 0.0), errors)
    wrong = ~(errors <= cap)  # NaN counts as wrong
    row = int(errors.nan_to_num(nan=math.inf, posinf=math.inf).argmax())
    return RowVerdict(
        float(errors[row]), cap, not bool(wrong.any()), row, errors, _wrong_rows(wrong, errors, stray, cap)
    )


def _wrong_rows(wrong: Tensor, errors: Tensor, stray: Tensor, cap: float) -> str:
    if not bool(wrong.any()):
        return ""
    if bool(stray.any()):
        return "rows that should vanish do not"
    rows = wrong.nonzero()[:, 0].tolist()
    return (
        f"{len(rows)} rows off by up to {float(errors[wrong].max()):.3g}, at most {cap:.3g} allowed; "
        f"first rows {rows[:5]}"
    )


def assert_rows_close(actual: Tensor, truth: Tensor, *, cap: float, what: str = "") -> None:
    """AssertionError, which names `what` and rows, where `judge_rows` turns `actual` down."""
    verdict = judge_rows(actual, truth, cap=cap)
    assert verdict.passed, f"{what or 'value'}: {verdict.what}"
