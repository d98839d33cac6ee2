"""Gradient checks for a test-suite: is a loss, with a margin and on a backend, as right as it can be?

from expface_kernels.testing import assert_gradients
assert_gradients(MyMargin(), target_gradient="detached")

gradients.py     check_gradients → GradientReport, assert_gradients
policy.py        how near is near enough
batches.py       inputs that hurt
baselines.py     the float64 truth, the naive loss in the same dtype
differences.py   gradients against finite differences
"""

from expface_kernels.testing.baselines import eager, truth
from expface_kernels.testing.batches import KINDS, batch
from expface_kernels.testing.gradients import (
    BatchReport,
    GradientReport,
    Quantity,
    assert_gradients,
    check_gradients,
)
from expface_kernels.testing.policy import assert_close, assert_rows_close, relative_error

__all__ = [
    "KINDS",
    "BatchReport",
    "GradientReport",
    "Quantity",
    "assert_close",
    "assert_gradients",
    "assert_rows_close",
    "batch",
    "check_gradients",
    "eager",
    "relative_error",
    "truth",
]
