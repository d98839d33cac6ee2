"""Margins as a user might write them: one with a fault that only finite differences see, two in float64."""

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


class OfATable:
    """cos θ less a polynomial of θ, whose float64 coefficients multiply no other dtype."""

    def __init__(self) -> None:
        self.table = torch.tensor([0.0, 0.1, 0.02], dtype=torch.float64)

    def __call__(self, theta: Tensor) -> Tensor:
        powers = torch.stack([theta**k for k in range(3)], dim=1)
        return torch.cos(theta) - powers @ self.table


class _OnlyFloat64(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor) -> Tensor:
        ctx.save_for_backward(theta)
        return torch.cos(theta)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (theta,) = ctx.saved_tensors
        if theta.dtype != torch.float64:
            raise TypeError(f"expected float64 angles, got {theta.dtype}")
        return -g * torch.sin(theta)


class SlopeInFloat64:
    """cos θ, whose slope alone takes no other dtype."""

    def __call__(self, theta: Tensor) -> Tensor:
        psi: Tensor = _OnlyFloat64.apply(theta)
        return psi
