"""A margin as a user might write it, with a fault that only finite differences see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Cosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, share: float) -> Tensor:
        ctx.save_for_backward(theta)
        ctx.share = share
        return torch.cos(theta)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (theta,) = ctx.saved_tensors
        return -ctx.share * g * torch.sin(theta), None


class WrongSlope:
    """cos θ, with a share of its slope."""

    def __init__(self, share: float = 0.9) -> None:
        self.share = share

    def __call__(self, theta: Tensor) -> Tensor:
        psi: Tensor = _Cosine.apply(theta, self.share)
        return psi
