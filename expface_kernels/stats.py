"""Reduces the loss from rows to a batch, and says what the batch looked like."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BatchStats(NamedTuple):
    """Holds figures of each row of a batch, detached. Ignored rows hold NaN, class −1, correct False.

    B rows, in the order of the embeddings. Angles and cosines are float64.
    """

    target_angle: Tensor
    """(B,) angle between the row and its own class centre, radians."""
    target_cos: Tensor
    """(B,) its cosine."""
    margin_cos: Tensor
    """(B,) psi(target_angle): the cosine that the margin puts in its place."""
    lse: Tensor
    """(B,) log-sum-exp over all logits, the target's with its margin."""
    hardest_negative_cos: Tensor
    """(B,) largest cosine to another class; −inf where there is none."""
    hardest_negative_class: Tensor
    """(B,) int64, that class; −1 where there is none."""
    correct: Tensor
    """(B,) bool: without any margin, the row's own class is the nearest one."""


def reduce_rows(rows: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """Reduce rows to "none" (B,), "sum" () or "mean" () over the counted ones; a mean over none is 0."""
    if reduction == "none":
        return rows
    total = rows.sum()
    return total if reduction == "sum" else total / counted.sum().clamp_min(1)


def batch_stats(
    log_l: Tensor,
    theta: Tensor,
    psi: Tensor,
    counted: Tensor,
    hardest_cos: Tensor,
    hardest: Tensor,
    scale: float,
) -> BatchStats:
    """Make BatchStats from the (B,) results of one batch."""
    log_l, theta, psi = log_l.detach(), theta.detach(), psi.detach()
    nan = torch.where(counted, 0.0, torch.nan).double()
    target_cos = torch.cos(theta)
    hardest_cos = hardest_cos.double()
    none = ~counted | (hardest_cos == -torch.inf)
    return BatchStats(
        target_angle=theta + nan,
        target_cos=target_cos + nan,
        margin_cos=psi + nan,
        lse=torch.logaddexp(log_l, scale * psi) + nan,
        hardest_negative_cos=hardest_cos + nan,
        hardest_negative_class=torch.where(none, -1, hardest),
        correct=counted & (target_cos > hardest_cos),
    )
