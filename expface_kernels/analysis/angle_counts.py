"""One epoch's angles as counts: everything that AngularMonitor keeps of it, and what can be read off.

bins a side of the 2-D histogram · FINE bins of each angle alone · angles in radians, figures for writers in
degrees
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FINE = 1800  # 0.1 degrees each
# After the histograms: rows, rows left out, rows nearest to their own class, sums of both angles.
TAIL = 5
PERCENTILES = (5, 25, 50, 75, 95)
# For writers that take values instead of counts: this many quantiles stand for the rows.
SAMPLES = 1000


def numel(bins: int) -> int:
    """How many numbers an epoch is."""
    return bins * bins + 2 * FINE + TAIL


@dataclass(frozen=True)
class AngleCounts:
    """The rows of one epoch by their angle to their own class (target) and to the nearest other class.

    counts: (numel(bins),) float64 on the CPU, which holds whole numbers up to 9·10¹⁵ exactly.
    """

    epoch: int
    bins: int
    counts: Tensor

    @property
    def histogram(self) -> Tensor:
        """(bins, bins) int64: rows by target angle (first) and nearest other angle, each of [0, π] / bins."""
        return self.counts[: self.bins**2].view(self.bins, self.bins).long()

    @property
    def target_counts(self) -> Tensor:
        """(1800,) int64: rows by target angle, 0.1 degrees a bin."""
        return self.counts[self.bins**2 : -TAIL][:FINE].long()

    @property
    def nearest_counts(self) -> Tensor:
        """(1800,) int64: rows by the angle to the nearest other class, 0.1 degrees a bin."""
        return self.counts[self.bins**2 : -TAIL][FINE:].long()

    @property
    def rows(self) -> int:
        """Rows counted."""
        return int(self.counts[-5])

    @property
    def left_out(self) -> int:
        """Rows not counted: ignored, not finite, or without another class."""
        return int(self.counts[-4])

    @property
    def accuracy(self) -> float:
        """Share of rows whose nearest class, without any margin, is their own; NaN without rows."""
        return self._mean(self.counts[-3])

    @property
    def target_mean(self) -> float:
        """Mean target angle, radians; NaN without rows."""
        return self._mean(self.counts[-2])

    @property
    def nearest_mean(self) -> float:
        """Mean angle to the nearest other class, radians; NaN without rows."""
        return self._mean(self.counts[-1])

    def _mean(self, total: Tensor) -> float:
        return float(total) / self.rows if self.rows else math.nan

    def target_percentiles(self, percents: Sequence[float] = PERCENTILES) -> list[float]:
        """Radians, each within 0.1 degrees of that of the rows themselves; NaN without rows."""
        return _percentiles(self.target_counts, percents)

    def nearest_percentiles(self, percents: Sequence[float] = PERCENTILES) -> list[float]:
        """The same of the angle to the nearest other class."""
        return _percentiles(self.nearest_counts, percents)

    def __add__(self, other: AngleCounts) -> AngleCounts:
        """Both together; they must be of one epoch and have as many bins."""
        if (self.epoch, self.bins) != (other.epoch, other.bins):
            raise ValueError(
                f"other: expected epoch {self.epoch} in {self.bins} bins, "
                f"got epoch {other.epoch} in {other.bins}"
            )
        return AngleCounts(self.epoch, self.bins, self.counts + other.counts)

    def write(self, writer: Any, tag: str = "angles") -> None:
        """Scalars and two histograms, in degrees, with the epoch as the step.

        writer: anything with `add_scalar`, and `add_histogram_raw` (preferred: it gets the counts) or
        `add_histogram`, as torch.utils.tensorboard.SummaryWriter has them; else TypeError. Without rows only
        their number is written.
        """
        raw = getattr(writer, "add_histogram_raw", None)
        if not hasattr(writer, "add_scalar") or not (raw or hasattr(writer, "add_histogram")):
            raise TypeError(
                "writer: expected add_scalar and add_histogram_raw or add_histogram, "
                f"got {type(writer).__name__}"
            )
        writer.add_scalar(f"{tag}/rows", self.rows, self.epoch)
        if not self.rows:
            return
        writer.add_scalar(f"{tag}/accuracy", self.accuracy, self.epoch)
        both = (
            ("target", self.target_counts, self.target_mean),
            ("nearest_other", self.nearest_counts, self.nearest_mean),
        )
        for name, counts, mean in both:
            writer.add_scalar(f"{tag}/{name}_mean", math.degrees(mean), self.epoch)
            for percent, angle in zip(PERCENTILES, _percentiles(counts, PERCENTILES), strict=True):
                writer.add_scalar(f"{tag}/{name}_p{percent:02d}", math.degrees(angle), self.epoch)
            if raw:
                raw(f"{tag}/{name}", **_raw_histogram(counts, math.degrees(mean)), global_step=self.epoch)
            else:
                percents = [100 * (i + 0.5) / SAMPLES for i in range(SAMPLES)]
                values = torch.tensor(_percentiles(counts, percents), dtype=torch.float64, device="cpu")
                writer.add_histogram(f"{tag}/{name}", torch.rad2deg(values), self.epoch)


def _percentiles(counts: Tensor, percents: Sequence[float]) -> list[float]:
    """Where the cumulated counts (FINE,) pass each percent, linear inside a bin; radians."""
    total = int(counts.sum())
    if not total:
        return [math.nan] * len(percents)
    wanted = torch.tensor(percents, dtype=torch.float64, device=counts.device)
    if not bool(((wanted >= 0) & (wanted <= 100)).all()):
        raise ValueError(f"percents: expected numbers in [0, 100], got {list(percents)}")
    cumulated = counts.cumsum(0).double()
    wanted = wanted / 100 * total
    # At 0 the first row, not the first bin.
    at = torch.searchsorted(cumulated, wanted.clamp_min(0.5)).clamp_max(len(counts) - 1)
    inside = 1 - (cumulated[at] - wanted) / counts[at]
    return ((at + inside) * (math.pi / FINE)).tolist()


def _raw_histogram(counts: Tensor, mean: float) -> dict[str, Any]:
    """Arguments of add_histogram_raw: one bucket a degree; degrees."""
    per_degree = counts.view(180, -1).sum(1)
    limits = torch.arange(1, 181, dtype=torch.float64, device=counts.device)
    total = int(counts.sum())
    filled = torch.nonzero(counts)[:, 0]
    return {
        "min": float(filled[0]) * 180 / FINE,
        "max": float(filled[-1] + 1) * 180 / FINE,
        "num": total,
        "sum": mean * total,
        "sum_squares": float((per_degree * (limits - 0.5) ** 2).sum()),
        "bucket_limits": limits.tolist(),
        "bucket_counts": per_degree.tolist(),
    }
