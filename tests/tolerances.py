"""Bounds of the tests, by name; the policy itself is `expface_kernels.testing.policy`, imported from here."""

from __future__ import annotations

import math

import torch

from expface_kernels.testing.policy import (  # noqa: F401
    CAPS,
    EAGER_RATIO,
    FLOOR,
    assert_close,
    assert_rows_close,
    relative_error,
    row_cap,
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
LOG_SUM = 4e-7  # times s: of log l, where every logit is off by a float32 rounding of a cosine
PROBABILITY_SUM = 6e-7  # root of the mean square, of rows whose log l is kept in float64
SUM_ORDER = 1e-6  # relative: the same float32 terms, summed in another order
SAME_TRAINING = 1e-3  # relative: two runs of one seed, which threads sum in different orders
CLOSED_FORM = 1e-12  # relative: a float64 formula against another way to write it
CENTRAL_DIFFERENCE = 1e-6, 1e-8  # of a float64 curve over 1e-6: relative, absolute
SIX_DIGITS = 1e-5  # relative: what is kept with six digits
BOOTSTRAP_COVERAGE = 0.02  # of 95% over 1,500 samples, whose own deviation is 0.006
CHI_SQUARE_3 = 16.3  # 3 degrees of freedom: exceeded once in 1,000
PLAIN_TF32 = 5e-2  # relative: gradients whose products keep 11 bits, at s = 64; what is asked for, not a goal
# Relative: gradients of a baseline with bfloat16 cosines, at s = 64. Rounding moves one logit by up to 0.13.
ROUNDED_COSINES = 5e-2
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
# A plan against what was measured.
PLANNED_MEMORY = 0.15  # relative, of resident bytes at the peak of a step
PLANNED_SECONDS = (
    2.0  # a factor either way, of a step's and the rates' best times on a machine that others use
)
EXTRAPOLATED = 1e-4  # relative, of costs counted from a part of the classes

# Of one thing each, where nothing of the above is meant.
RANKS_LOSS, RANKS_GRADIENT = 1e-5, 1e-4  # relative, float32 elements: two ranks against one process
CLIPPED = 1e-4  # relative: the square of a float32 norm after clipping
FLOAT32_QUOTIENT = 1e-6  # relative
DRAWN_30_000, DRAWN_64_000 = 0.03, 0.02  # relative: the deviation of so many normal draws, 7 of its own
STORED_ANGLE = 1e-6  # radians: of float32 rows, which rounding moves by some 1e-7
WORST_DEGREES, WORST_NEAR = 1e-3, 1e-3  # the same as a report tells it: degrees; relative, at 1e-3 radians
PAIR_ANGLE = 1e-12, 2e-16  # a float64 angle at both ends: relative, absolute
MIDDLE_RATE = 1e-4  # of a learning rate half a step from its middle
PICTURED_COSINE = 1e-5  # a float32 cosine as a picture has it
TEN_DIGITS = 1e-9  # against a number that was published with ten, or a line as a picture has it
OPPOSITE_ROW = 1e-4  # of a loss of 154, at 3e-4 radians from its antipode
ROUND_TRIP = 1e-15  # relative: 1/(1/s)
PERCENTILE = 0.1  # degrees: one bin
FOUND_ANGLE = 1e-6  # radians, or the cosine there: what a search found
ADAMAX_EPS = 1e-7  # of a fresh state that Adamax keeps above its eps
