"""Paired differences over seeds, and their confidence intervals.

n seeds. Two heads trained from one seed share the initial network, the order of images and the noisy samples;
in the difference of their scores all of that cancels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

CONFIDENCE = 0.95
LEAST_SEEDS = 3
RESAMPLES = 2000  # at most; where there are fewer, all of them
_SAMPLES = 20_000  # for the calibration


@dataclass(frozen=True)
class Difference:
    """Holds the mean over `n` seeds of a − b, and its interval, which is None with fewer than two seeds."""

    n: int
    mean: float
    low: float | None
    high: float | None

    @property
    def higher(self) -> str | None:
        """Which is higher, "a" or "b"; None where the interval contains 0 or there are too few seeds.

        Two seeds decide nothing: where they agree by chance their interval is a point.
        """
        if self.n < LEAST_SEEDS or self.low is None or self.high is None:
            return None
        return "a" if self.low > 0 else "b" if self.high < 0 else None

    def decided(self, widest: float) -> bool:
        """Return whether the interval is known and no wider than ± `widest`."""
        if self.n < LEAST_SEEDS or self.low is None or self.high is None:
            return False
        return (self.high - self.low) / 2 <= widest


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
    """Compare a − b over the seeds that both have (seed -> score); None where they share no seed."""
    seeds = sorted(set(a) & set(b))
    if not seeds:
        return None
    values = np.array([a[seed] - b[seed] for seed in seeds])
    low, high = bootstrap_interval(values) if len(values) > 1 else (None, None)
    return Difference(len(values), float(values.mean()), low, high)


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the percentile bootstrap of the mean of values (n,), n ≥ 2, calibrated to cover 95%.

    With few values a plain bootstrap covers far less (three: about 75%), so it is stretched around the mean
    by the factor with which it covers the mean of n normal values in 95% of samples.
    """
    if len(values) < 2:
        raise ValueError(f"values: expected at least 2, got {len(values)}")
    low, high = _quantiles(values[None, :])[0]
    mean, factor = float(values.mean()), stretch(len(values))
    return mean + factor * (float(low) - mean), mean + factor * (float(high) - mean)


@cache
def stretch(n: int) -> float:
    """Return the factor of `bootstrap_interval`: the 95% quantile of what normal samples of n would need."""
    samples = np.random.default_rng(0).standard_normal((_SAMPLES, n))
    mean = samples.mean(axis=1)
    low, high = np.concatenate([_quantiles(part) for part in np.array_split(samples, 20)]).T
    needed = np.where(mean > 0, mean / (mean - low), mean / (mean - high))
    return float(np.quantile(needed, CONFIDENCE))


def _quantiles(samples: np.ndarray) -> np.ndarray:
    """Return (R, 2): the lower and upper quantile of the resampled means of samples (R, n)."""
    means = samples @ _weights(samples.shape[1]).T
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(means, (tail, 1 - tail), axis=1).T


@cache
def _weights(n: int) -> np.ndarray:
    """Return (resamples, n): how often each of n values is drawn, divided by n."""
    if n**n <= RESAMPLES:
        drawn = np.indices((n,) * n).reshape(n, -1).T
    else:
        drawn = np.random.default_rng(1).integers(n, size=(RESAMPLES, n))
    return (drawn[:, :, None] == np.arange(n)).mean(axis=1)
