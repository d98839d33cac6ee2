"""Stand-ins for the margin objects of InsightFace and of ExpFace's authors, and an eager head around them.

Each is called as theirs are, with cosines (N, C) and labels (N,), −1 where a row's target is elsewhere, and
returns logits. The target's cosine gets another value; its slope stays that of cos θ.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Theirs(nn.Module):
    def value(self, theta: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, cosines: Tensor, labels: Tensor) -> Tensor:
        rows = (labels >= 0).nonzero()[:, 0]
        own = cosines[rows, labels[rows]]
        shift = (self.value(own.detach().clamp(-1, 1).acos()) - own).detach()
        return self.s * cosines.index_put((rows, labels[rows]), own + shift)


class ArcFace(_Theirs):
    def __init__(self, s: float = 64.0, margin: float = 0.5) -> None:
        super().__init__()
        self.s, self.margin = s, margin

    def value(self, theta: Tensor) -> Tensor:
        return torch.cos(theta + self.margin)


class CosFace(_Theirs):
    def __init__(self, s: float = 64.0, m: float = 0.4) -> None:
        super().__init__()
        self.s, self.m = s, m

    def value(self, theta: Tensor) -> Tensor:
        return torch.cos(theta) - self.m


class CombinedMarginLoss(_Theirs):
    def __init__(
        self, s: float, m1: float, m2: float, m3: float, interclass_filtering_threshold: float = 0
    ) -> None:
        super().__init__()
        self.s, self.m1, self.m2, self.m3 = s, m1, m2, m3
        self.interclass_filtering_threshold = interclass_filtering_threshold

    def value(self, theta: Tensor) -> Tensor:
        return torch.cos(theta) - self.m3 if self.m3 > 0 else torch.cos(theta + self.m2)

    def forward(self, cosines: Tensor, labels: Tensor) -> Tensor:
        if self.interclass_filtering_threshold > 0:
            others = torch.arange(cosines.shape[1]) != labels[:, None]
            cosines = torch.where(others & (cosines > self.interclass_filtering_threshold), 0.0, cosines)
        return super().forward(cosines, labels)


class PowerFace(_Theirs):
    def __init__(self, s: float = 64.0, m: float = 0.6) -> None:
        super().__init__()
        self.s, self.m = s, m

    def value(self, theta: Tensor) -> Tensor:
        return torch.cos(math.pi * (theta / math.pi) ** self.m)


class SphereFace(_Theirs):
    def __init__(self, s: float = 30.0, m: float = 1.5) -> None:
        super().__init__()
        self.s, self.m = s, m

    def value(self, theta: Tensor) -> Tensor:
        turns = torch.floor(self.m * theta / math.pi)
        return torch.where(turns % 2 == 0, 1.0, -1.0) * torch.cos(self.m * theta) - 2 * turns


class ExpFaceAuthorsArcFace(ArcFace):
    """The same class under InsightFace's name, but with `m` for `margin`; see the next line."""

    def __init__(self, s: float = 64.0, m: float = 0.5) -> None:
        super().__init__(s, m)
        del self.margin
        self.m = m

    def value(self, theta: Tensor) -> Tensor:
        return torch.cos(theta + self.m)


ExpFaceAuthorsArcFace.__name__ = "ArcFace"


def eager(margin_loss: nn.Module, x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dw) of one process that makes all logits, in x's dtype; cut off nowhere."""
    x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    loss = _cross_entropy(margin_loss(F.normalize(x) @ F.normalize(w).T, y), y)
    loss.backward()
    return loss.detach(), x.grad, w.grad


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """The mean; in float64, where it is the truth, without the difference that cancels in learnt rows."""
    if logits.dtype != torch.float64:
        return F.cross_entropy(logits, y)
    own = F.one_hot(y, logits.shape[1]).bool()
    others = torch.logsumexp(logits.masked_fill(own, -torch.inf), 1)
    return torch.logaddexp(others - logits[own], torch.zeros(len(y), dtype=torch.float64)).mean()
