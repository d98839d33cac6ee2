"""Which labels are wrong: samples that lie nearer to another class's centre than to their own.

N samples of the training set · B rows of a batch · angles in radians
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expface_kernels.analysis.checks import check_keys, check_state_tensor, check_stats
from expface_kernels.checks import INTEGERS, LARGEST_TENSOR, as_integer, check_integer, check_number
from expface_kernels.stats import BatchStats

# Batches that wait on their device before they are read in one go.
WAITING = 64


class RankingQuality(NamedTuple):
    """How well a ranking finds the samples that are known to be noisy."""

    auc: float
    """Probability that a noisy sample ranks before a clean one; ties count half."""
    precision: float
    """Share of noisy samples among the first k."""
    k: int


class LabelNoiseRanker:
    """A score for every sample, over epochs: the angle to its own centre less that to the nearest other one.

        ranker = LabelNoiseRanker(len(dataset))
        for indices, x, y in …:
            loss, stats = head(net(x), y, return_stats=True)
            ranker.update(indices, stats)
        ranker.suspects(100)                  # sample indices; ranker.likely_class says where they belong

    A positive score says "another class is nearer". Each new observation of a sample counts 1 and each older
    one `smoothing` times the one after it. Kept on the CPU by sample index, 24 bytes each; an update takes no
    part in autograd, and waits for no device (statistics are read back 64 batches at a time, or when asked
    for results).

    Args:
        num_samples: N; indices are 0 to N − 1.
        smoothing: 0 (the last observation alone) up to, not including, 1.
    """

    def __init__(self, num_samples: int, *, smoothing: float = 0.5) -> None:
        num_samples = as_integer("num_samples", num_samples, least=1, most=LARGEST_TENSOR)
        check_number("smoothing", smoothing)
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing: expected a number in [0, 1), got {smoothing}")
        self.num_samples = num_samples
        self.smoothing = float(smoothing)
        self._weighted = torch.zeros(num_samples, dtype=torch.float64, device="cpu")
        self._weight = torch.zeros(num_samples, dtype=torch.float64, device="cpu")
        self._likely = torch.full((num_samples,), -1, device="cpu")
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, indices: Tensor, stats: BatchStats) -> None:
        """Take the batch whose rows are the samples `indices` (B,), any integer dtype, best on the CPU.

        Rows that were ignored, are not finite or have no other class are left out; a sample that is there
        twice counts twice, in order. TypeError, ValueError, and nothing is taken, for indices out of range or
        statistics of another number of rows.
        """
        indices = self._checked(indices)
        check_stats(stats, rows=len(indices))
        nearest = torch.arccos(stats.hardest_negative_cos.double().clamp(-1, 1))
        self._waiting.append((indices, stats.target_angle - nearest, stats.hardest_negative_class))
        if len(self._waiting) >= WAITING:
            self._settle()

    @property
    def scores(self) -> Tensor:
        """(N,) float64, radians in −π to π, high where the label looks wrong; NaN where never seen."""
        self._settle()
        return self._weighted / self._weight

    @property
    def likely_class(self) -> Tensor:
        """(N,) int64: the nearest other class when the sample was last seen; −1 where it never was."""
        self._settle()
        return self._likely.clone()

    def ranking(self) -> Tensor:
        """Indices of the samples seen, the most suspicious first; equal scores by index."""
        scores = self.scores
        seen = torch.nonzero(~scores.isnan())[:, 0]
        return seen[torch.argsort(scores[seen], descending=True, stable=True)]

    def suspects(self, k: int) -> Tensor:
        """The first k of `ranking()`. ValueError for fewer than k samples seen."""
        check_integer("k", k, least=1)
        ranking = self.ranking()
        if k > len(ranking):
            raise ValueError(f"k: expected at most the {len(ranking)} samples seen, got {k}")
        return ranking[:k]

    def evaluate(self, is_noisy: Tensor, k: int | None = None) -> RankingQuality:
        """Hold the ranking of the samples seen against the truth, `is_noisy` (N,) bool.

        k: for the precision; by default as many as are noisy. ValueError for another shape, or where not both
        noisy and clean samples were seen.
        """
        if not isinstance(is_noisy, Tensor) or is_noisy.dtype != torch.bool:
            got = is_noisy.dtype if isinstance(is_noisy, Tensor) else type(is_noisy).__name__
            raise TypeError(f"is_noisy: expected a bool tensor ({self.num_samples},), got {got}")
        if tuple(is_noisy.shape) != (self.num_samples,):
            raise ValueError(f"is_noisy: expected shape ({self.num_samples},), got {tuple(is_noisy.shape)}")
        ranking = self.ranking()
        is_noisy = is_noisy.cpu()
        noisy = is_noisy[ranking]
        count = int(noisy.sum())
        if not 0 < count < len(noisy):
            raise ValueError(
                f"is_noisy: expected both noisy and clean among the {len(noisy)} samples seen, "
                f"got {count} noisy"
            )
        k = count if k is None else k
        precision = float(is_noisy[self.suspects(k)].double().mean())
        scores = self.scores[ranking]
        clean = scores[~noisy].sort().values
        below = torch.searchsorted(clean, scores[noisy], side="left")
        up_to = torch.searchsorted(clean, scores[noisy], side="right")
        return RankingQuality(float((below + up_to).double().mean() / 2 / len(clean)), precision, k)

    def merge(self, other: LabelNoiseRanker) -> None:
        """Add what another ranker, of another rank, saw of the same samples.

        Scores become the mean by weight, likely classes those of the one with more weight. ValueError, and
        nothing added, where sizes or smoothing differ.
        """
        if not isinstance(other, LabelNoiseRanker):
            raise TypeError(f"other: expected a LabelNoiseRanker, got {type(other).__name__}")
        self._check_same(other.num_samples, other.smoothing, "other")
        self._settle()
        other._settle()
        self._likely = torch.where(other._weight > self._weight, other._likely, self._likely)
        self._weighted += other._weighted
        self._weight += other._weight

    def state_dict(self) -> dict[str, Any]:
        """Numbers and CPU tensors."""
        self._settle()
        return {
            "num_samples": self.num_samples,
            "smoothing": self.smoothing,
            "weighted": self._weighted.clone(),
            "weight": self._weight.clone(),
            "likely_class": self._likely.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state_dict.

        ValueError, and nothing changed, where size or smoothing differ, a key is missing or a tensor has
        another shape or dtype.
        """
        check_keys(state, ("num_samples", "smoothing", "weighted", "weight", "likely_class"))
        self._check_same(state["num_samples"], state["smoothing"], "state")
        check_state_tensor("weighted", state["weighted"], self._weighted)
        check_state_tensor("weight", state["weight"], self._weight)
        check_state_tensor("likely_class", state["likely_class"], self._likely)
        self._waiting.clear()
        self._weighted = state["weighted"].clone()
        self._weight = state["weight"].clone()
        self._likely = state["likely_class"].clone()

    def _check_same(self, num_samples: int, smoothing: float, name: str) -> None:
        if (num_samples, smoothing) != (self.num_samples, self.smoothing):
            raise ValueError(
                f"{name}: expected num_samples {self.num_samples} and smoothing {self.smoothing}, "
                f"got {num_samples} and {smoothing}"
            )

    def _checked(self, indices: Any) -> Tensor:
        """indices (B,) as int64 on the CPU."""
        if not isinstance(indices, Tensor) or indices.dtype not in INTEGERS:
            got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(f"indices: expected an integer tensor (B,), got {got}")
        if indices.dim() != 1:
            raise ValueError(f"indices: expected shape (B,), got {tuple(indices.shape)}")
        indices = indices.detach().cpu().long().clone()
        outside = (indices < 0) | (indices >= self.num_samples)
        if outside.any():
            raise ValueError(f"indices: expected 0 to {self.num_samples - 1}, got {int(indices[outside][0])}")
        return indices

    def _settle(self) -> None:
        """Bring in the batches that wait."""
        waiting, self._waiting = self._waiting, []
        for indices, scores, classes in waiting:
            scores, classes = scores.cpu(), classes.cpu()
            counted = torch.isfinite(scores) & (classes >= 0)
            indices, scores, classes = indices[counted], scores[counted], classes[counted]
            while len(indices):
                now = _first_of_each(indices)
                self._observe(indices[now], scores[now], classes[now])
                indices, scores, classes = indices[~now], scores[~now], classes[~now]

    def _observe(self, indices: Tensor, scores: Tensor, classes: Tensor) -> None:
        self._weighted[indices] = self.smoothing * self._weighted[indices] + scores
        self._weight[indices] = self.smoothing * self._weight[indices] + 1
        self._likely[indices] = classes


def _first_of_each(indices: Tensor) -> Tensor:
    """(B,) bool: no equal index stands earlier."""
    ordered, places = torch.sort(indices, stable=True)
    first = torch.ones_like(indices, dtype=torch.bool)
    first[places[1:]] = ordered[1:] != ordered[:-1]
    return first
