"""One small step of the function, for its tests.

B rows · C classes · D features · x (B, D) embeddings · w (C, D) class centres · y (B,) labels
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expface_kernels import margin_cross_entropy
from tests.cases import batch
from tests.tolerances import assert_close

WIDE = torch.float64


def small(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x (8, 16), w (20, 16), y (8,), float64, with losses that are neither 0 nor saturated at s = 16."""
    return batch("random", 8, 20, 16, seed)


def step(x: Tensor, w: Tensor, y: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dw) in the dtypes of x and w."""
    x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    loss = margin_cross_entropy(x, w, y, *args, **options)
    loss.sum().backward()
    return loss.detach(), x.grad, w.grad


def assert_steps_close(
    actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype = WIDE
) -> None:
    for name, a, b in zip(("loss", "dx", "dw"), actual, expected, strict=True):
        assert_close(a, b, dtype=dtype, what=name)


def differs(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return any(p.shape != q.shape or not torch.equal(p, q) for p, q in zip(a, b, strict=True))
