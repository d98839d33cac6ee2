"""Records each epoch as the head saw it: target angles, and the noisy samples' share of its gradient.

B rows of a step · q = 1 − p_target, the slope of a row's loss · s scale · psi the margin's similarity
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.glyphs.training import EpochRecord, Step
from expface_kernels import MarginSoftmaxHead

from .heads import slope

BIN_DEGREES = 4  # of the histograms, from 0 to 180
PERCENTILES = (5, 25, 50, 75, 95)


class EpochRecorder:
    """Collects the steps of one epoch (26 bytes per sample); `close` summarizes them and starts anew.

    Samples are seen as training sees them: augmented, in training mode, with the weights of their step.
    """

    def __init__(self, is_noisy: Tensor) -> None:
        self._is_noisy = is_noisy
        self._steps: list[tuple[Tensor, ...]] = []
        self._last: dict[str, Any] = {}

    def add(self, step: Step, head: MarginSoftmaxHead) -> None:
        """Add one step; the head must still have the scale and target gradient of that step."""
        stats = step.stats
        target = head.scale * stats.margin_cos - stats.lse  # log p_target
        push = -head.scale * torch.expm1(target)  # s·q
        pull = push * slope(head.margin, stats.target_angle, head.target_gradient).abs()
        angle = torch.rad2deg(stats.target_angle)
        self._steps.append((self._is_noisy[step.rows], angle, push, pull, stats.correct))
        self._last = {"scale": _short(head.scale), "target_gradient": head.target_gradient}

    def close(self, record: EpochRecord) -> dict[str, Any]:
        """Return the epoch as plain numbers: angles in degrees, shares from 0 to 1, None without noise.

        Scale and target gradient are those of its last step.
        """
        columns = [torch.cat(parts).numpy() for parts in zip(*self._steps, strict=True)]
        noisy, angle, push, pull, correct = columns
        self._steps.clear()
        return {
            "epoch": record.epoch,
            "loss": _short(record.loss),
            **self._last,
            "noisy_samples": int(noisy.sum()),
            "gradient_share": _share(pull, noisy),
            "push_share": _share(push, noisy),
            "clean": _group(angle[~noisy], correct[~noisy]),
            "noisy": _group(angle[noisy], correct[noisy]),
        }


def _share(mass: np.ndarray, noisy: np.ndarray) -> float | None:
    """Return the share of the total `mass` that falls on noisy samples."""
    total = float(mass.sum())
    return _short(float(mass[noisy].sum()) / total) if noisy.any() and total > 0 else None


def _group(angle: np.ndarray, correct: np.ndarray) -> dict[str, Any] | None:
    if not len(angle):
        return None
    edges = np.arange(0, 180 + BIN_DEGREES, BIN_DEGREES)
    return {
        "angle_mean": _short(float(angle.mean())),
        "angle_percentiles": [_short(float(value)) for value in np.percentile(angle, PERCENTILES)],
        "accuracy": _short(float(correct.mean())),  # without a margin, of the label as given
        "histogram": np.histogram(angle, edges)[0].tolist(),
    }


def _short(value: float) -> float:
    """Round to six digits: more would be rounding noise, and results are committed."""
    return float(f"{value:.6g}") if math.isfinite(value) else value
