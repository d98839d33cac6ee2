"""What a result is held against: the float64 truth, and the naive loss in the result's own dtype.

B rows · C classes · D features · x (B, D) embeddings · w (C, D) class centres · y (B,) int64 labels
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expface_kernels import reference
from expface_kernels.margins import MarginFunction, target_similarity

Results = tuple[Tensor, Tensor, Tensor]
"""Loss, dx (B, D), dw (C, D)."""


def leaves(x: Tensor, w: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return fresh leaf copies of x and w in `dtype` that want gradients."""
    return (
        x.detach().to(dtype, copy=True).requires_grad_(),
        w.detach().to(dtype, copy=True).requires_grad_(),
    )


def backward(loss: Tensor, x: Tensor, w: Tensor, factor: float = 1.0) -> Results:
    """Return the loss, and factor times the gradients of its sum with respect to the leaves x and w.

    Nothing is written to any .grad: a margin's own parameters keep theirs.
    """
    dx, dw = torch.autograd.grad(factor * loss.sum(), (x, w))
    return loss.detach(), dx, dw


def truth(x: Tensor, w: Tensor, y: Tensor, margin: MarginFunction | None = None, **options: Any) -> Results:
    """Return (loss, dx, dw) of the float64 reference, at the values that x and w store."""
    x, w = leaves(x, w, torch.float64)
    loss = reference.margin_cross_entropy(x, w, y, margin, **options)
    assert isinstance(loss, Tensor)
    return backward(loss, x, w)


def naive_loss(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    margin: MarginFunction,
    *,
    scale: float = 64.0,
    reduction: str = "mean",
    target_gradient: str = "exact",
) -> Tensor:
    """Return the loss that everyone writes first: normalize, cosines, arccos, margin, F.cross_entropy.

    In x's dtype. Shares nothing with the package but the margin. Finite only away from cos θ = ±1.
    """
    cos = F.normalize(x) @ F.normalize(w).T
    rows = torch.arange(x.shape[0], device=x.device)
    theta = torch.arccos(cos[rows, y])
    psi = target_similarity(margin, theta, target_gradient).to(cos.dtype)
    return F.cross_entropy(scale * cos.index_put((rows, y), psi), y, reduction=reduction)


def eager_margin(margin: MarginFunction, rows: int, dtype: torch.dtype) -> tuple[MarginFunction, torch.dtype]:
    """Return the margin as the naive loss in `dtype` calls it, with what it then computes psi in.

    The package hands a margin float64 angles alone. One that takes no others, or whose slope does not, is
    given the naive loss's angles in float64. The margin is tried with B = `rows` of them.
    """
    theta = torch.linspace(0.0, torch.pi, rows, dtype=torch.float64, device="cpu").to(dtype).requires_grad_()
    try:
        psi = margin(theta)
        if psi.requires_grad:
            torch.autograd.grad(psi.sum(), theta, allow_unused=True)
    except Exception:  # a user's own code may raise anything
        return lambda angles: margin(angles.double()), torch.float64
    return margin, dtype


def eager(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    margin: MarginFunction,
    *,
    dtype: torch.dtype,
    factor: float = 1.0,
    **options: Any,
) -> Results:
    """Return (loss, dx, dw) of the naive loss in `dtype`: the baseline of `policy.assert_close`."""
    x, w = leaves(x, w, dtype)
    return backward(naive_loss(x, w, y, margin, **options), x, w, factor)
