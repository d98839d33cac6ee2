"""How near is near enough: the one place with tolerances.

An error is the norm of the difference over the norm of the float64 truth. It may be at most
max(3 × the error that eager PyTorch makes in the same dtype, 1e-6), and never above the cap of its dtype:
where every row is learnt eager float32 is 36-99% wrong, so the ratio alone would pass a gradient of zeros.

R rows · the last dimension of a (R, D) tensor is a row's features
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CAPS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
EAGER_RATIO = 3.0
FLOOR = 1e-6
# Smaller values (losses and gradients of rows learnt beyond all doubt) near float32's end, 1e-38: they are
# not compared, they must only be as small.
SMALLEST = {torch.float32: 1e-30, torch.float64: 1e-290, torch.bfloat16: 1e-30, torch.float16: 0.0}
SMALLEST_ROW = 1e-30


def row_cap(scale: float) -> float:
    """Cap of one float32 row: a logit of s·cos carries s roundings, so twice as much from s = 128 on."""
    return 4e-5 if scale >= 128 else 2e-5


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


def assert_close(
    actual: Tensor,
    truth: Tensor,
    *,
    eager: Tensor | float | None = None,
    dtype: torch.dtype,
    what: str = "",
    absolute: float = 0.0,
) -> None:
    """`actual` is as near to the float64 `truth` as the policy wants of `dtype` (the one computed in).

    eager: what same-dtype PyTorch got, or the error it made; NaN is no measure, then only the cap holds.
    absolute: a bound on each element that suffices where the truth is exactly zero.
    """
    actual, truth = actual.detach(), truth.detach()
    error = relative_error(actual, truth)
    if error == float("inf") and float(actual.abs().max()) <= absolute:
        return
    largest = float(truth.abs().max()) if truth.numel() else 0.0
    if 0 < largest < SMALLEST[dtype] and float(actual.abs().max()) <= 2 * SMALLEST[dtype]:
        return
    limit = CAPS[dtype]
    if eager is not None:
        eager_error = relative_error(eager, truth) if isinstance(eager, Tensor) else eager
        if eager_error == eager_error:
            limit = min(limit, max(EAGER_RATIO * eager_error, FLOOR))
    assert error <= limit, (
        f"{what or 'value'}: error {error:.3g} against the truth, at most {limit:.3g} allowed"
    )


def assert_rows_close(actual: Tensor, truth: Tensor, *, cap: float, what: str = "") -> None:
    """Every row (R, D), or element (R,), is within `cap` of its own truth's norm.

    Rows whose truth stays below 1e-30 must stay below it too: they cannot be judged more closely in float32.
    """
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    actual = actual.detach().double().reshape(actual.shape[0], -1)
    truth = truth.detach().double().reshape(truth.shape[0], -1)
    largest = truth.abs().amax(dim=1, keepdim=True)
    assert torch.isfinite(largest).all(), f"{what or 'value'}: the truth itself is not finite"
    judged = largest[:, 0] > SMALLEST_ROW
    faint = actual[~judged]
    assert bool((faint.abs() <= 2 * SMALLEST_ROW).all()), f"{what or 'value'}: rows that should vanish do not"
    difference = torch.linalg.vector_norm((actual - truth)[judged] / largest[judged], dim=1)
    error = difference / torch.linalg.vector_norm(truth[judged] / largest[judged], dim=1)
    wrong = ~(error <= cap)  # NaN counts as wrong
    if bool(wrong.any()):
        rows = judged.nonzero()[:, 0][wrong].tolist()
        raise AssertionError(
            f"{what or 'value'}: {len(rows)} rows off by up to {float(error.max()):.3g}, at most {cap:.3g} "
            f"allowed; first rows {rows[:5]}"
        )


# A loss, not a gradient: absolute, at s = 64, against the truth of the inputs as they are stored. One logit
# rounded to bf16 alone is off by up to 0.13.
LOSS_OF_16_BIT_INPUTS = 2e-3

# Ranks of a group against one process, norm over norm: sums over classes and rows in another order. In 16
# bit each rank's share of a row's gradient is rounded, and their sum once more.
SHARDED = {torch.float64: 1e-10, torch.float32: 1e-5}
SHARDED_16_BIT = CAPS[torch.bfloat16]

# Outside the policy, since what they bound is not held against a float64 truth. Absolute unless said.
COSINE = 1e-6  # a float32 cosine
UNIT_LENGTH = 1e-14  # of a float64 unit vector; also its product with one orthogonal to it
UNIT_ENTRY = 1e-15  # relative, of a float64 quotient
SUM_ORDER = 1e-6  # relative: the same float32 terms, summed in another order
SAME_TRAINING = 1e-3  # relative: two runs of one seed, which threads sum in different orders
EAGER_LOSS = 1e-5  # relative and absolute: two float32 heads against one another
EAGER_GRADIENT = 1e-4, 1e-5  # the same of their gradients: relative, absolute
CLOSED_FORM = 1e-12  # relative: a float64 formula against another way to write it
CENTRAL_DIFFERENCE = 1e-6, 1e-8  # of a float64 curve over 1e-6: relative, absolute
SIX_DIGITS = 1e-5  # relative: what is kept with six digits
BOOTSTRAP_COVERAGE = 0.02  # of 95% over 1,500 samples, whose own deviation is 0.006
CHI_SQUARE_3 = 16.3  # 3 degrees of freedom: exceeded once in 1,000
PLAIN_TF32 = 5e-2  # relative: gradients whose products keep 11 bits, at s = 64; what is asked for, not a goal
LIBRARY_TEMPORARIES = 2**20  # bytes that torch's own GPU operations (a sort, a sum) hold while they run


def one_rounding(dtype: torch.dtype) -> float:
    """The largest relative error of rounding a right result to `dtype` once."""
    return torch.finfo(dtype).eps / 2


# Curves of margins against closed forms: absolute up to 1, relative above.
CURVE = 1e-12


def effective_angle_error(phi: float) -> float:
    """Of an angle read off a similarity: float64 rounds cos φ by 1e-16, hence φ by 1e-16/|sin φ|."""
    return max(CURVE, 4e-16 / max(abs(math.sin(phi)), 1e-8))


# A mean of angles: the same float64 terms in another order; relative.
ANGLE_MEAN = 1e-12
