"""A PartialFC_V2 with given centres in one process, a step of it, and the batches that tests share.

B rows · C classes · D features
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expface_kernels.compat.insightface import PartialFC_V2
from tests import cases
from tests.tolerances import assert_close

C, D, B = 23, 16, 12
F64 = torch.float64


def build(margin_loss: Any, w: Tensor, **options: Any) -> PartialFC_V2:
    """A module with the centres w (C, D), of their dtype."""
    module = PartialFC_V2(margin_loss, w.shape[1], w.shape[0], **options).to(w.dtype)
    with torch.no_grad():
        module.weight.copy_(w)
    return module


def step(module: PartialFC_V2, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dw)."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    loss = module(x, y)
    loss.backward()
    return loss.detach(), x.grad, module.weight.grad


def rows(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(x, w, y): "random", "learnt", or "behind", where every target angle is near 3 radians, past π − m."""
    if kind != "behind":
        return cases.batch(kind, B, C, D)
    x, w, y = cases.batch("random", B, C, D)
    return -w[y] / torch.linalg.vector_norm(w[y], dim=1, keepdim=True) + 0.15 * x / D**0.5, w, y


def compare(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype = F64) -> None:
    for what, one, other in zip(("loss", "dx", "dw"), found, expected, strict=True):
        assert_close(one, other, dtype=dtype, what=what)
