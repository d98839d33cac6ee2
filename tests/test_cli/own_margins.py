"""A margin as a user might write it, with a fault that only finite differences see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Cosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor) -> Tensor:
        ctx.save_for_backward(theta)
        return torch.cos(theta)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (theta,) = ctx.saved_tensors
        return -0.9 * g * torch.sin(theta)


class WrongSlope:
    """cos θ, with nine tenths of its slope."""

    def __call__(self, theta: Tensor) -> Tensor:
        psi: Tensor = _Cosine.apply(theta)
        return psi
