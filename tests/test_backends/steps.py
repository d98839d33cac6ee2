"""A step over one backend, what it is compared with, and how.

B rows · C classes · D features
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.cases import leaves, loss_on
from tests.tolerances import assert_close

F32 = torch.float32


def run(x: Tensor, w: Tensor, y: Tensor, backend: str, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dw) in float32, from the sum of the losses."""
    a, b = leaves(x, w)
    loss = loss_on(backend, a, b, y, **options)
    loss.sum().backward()
    return loss.detach(), a.grad, b.grad


def assert_true(got: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    for name, actual, expected in zip(("loss", "dx", "dw"), got, right, strict=True):
        assert_close(actual, expected, dtype=F32, what=name)


def is_zero(tensor: Tensor) -> bool:
    return bool((tensor == 0).all())
