"""Steps of the triton backend and how they are judged, for its tests; truth is taken at the values that the
products see.

B rows · C classes · D features
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from expface_kernels import ArcFace, margin_cross_entropy
from expface_kernels.margins import MarginFunction
from tests.cases import INTERPRETED, TRITON_DEVICE, eager, truth
from tests.tolerances import assert_close, relative_error

NEEDS_TRITON = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU, or TRITON_INTERPRET=1"
)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
KEEP = 2**28
"""A workspace for all exponentials."""


def run(
    x: Tensor, w: Tensor, y: Tensor, margin: MarginFunction, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dw) of the sum, back on the CPU."""
    a, b = (t.to(TRITON_DEVICE).detach().requires_grad_() for t in (x, w))
    subset = options.pop("class_subset", None)
    if subset is not None:
        options["class_subset"] = subset.to(TRITON_DEVICE)
    y = y.to(TRITON_DEVICE)
    loss = margin_cross_entropy(a, b, y, margin, reduction="sum", backend="triton", **options)
    loss.backward()
    return loss.detach().cpu(), a.grad.cpu(), b.grad.cpu()


def eager_errors(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    margin: MarginFunction,
    right: Sequence[Tensor],
    orders: int,
    **options: Any,
) -> list[float]:
    """The worst error of loss, dx and dw that eager makes over some orders of the features.

    They have one truth and other roundings. A few learnt rows have the error of a single logit, which
    is nothing or all of s·2⁻²⁴ by luck: one order says little about what float32 does there.
    """
    found = []
    for seed in range(orders):
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))
        loss, dx, dw = eager(x[:, order], w[:, order], y, margin, reduction="sum", **options)
        there = (loss, right[0]), (dx, right[1][:, order]), (dw, right[2][:, order])
        found.append([relative_error(a, b) for a, b in there])
    return torch.tensor(found).amax(0).tolist()  # NaN, wherever it stands, is no measure


def check(
    x: Tensor, w: Tensor, y: Tensor, *, margin: MarginFunction | None = None, orders: int = 1, **options: Any
) -> None:
    """Loss, dx, dw of stored x and w, by the policy; dw also with every centre's gradient made an equal."""
    margin = ArcFace() if margin is None else margin
    got = run(x, w, y, margin, **options)
    options.pop("workspace_bytes", None)
    right = truth(x, w, y, margin, reduction="sum", **options)
    dtype = torch.promote_types(x.dtype, w.dtype)
    errors: list[float | None] = [None] * 3
    if "class_subset" not in options:
        errors[:] = eager_errors(x, w, y, margin, right, orders, dtype=dtype, **options)
    assert_close(got[0], right[0], eager=errors[0] if dtype == F32 else None, dtype=F32, what="loss")
    assert_close(got[1], right[1], eager=errors[1], dtype=x.dtype, what="dx")
    assert_close(got[2], right[2], eager=errors[2], dtype=w.dtype, what="dw")
    lengths = torch.linalg.vector_norm(w.double(), dim=1, keepdim=True)
    assert_close(got[2] * lengths, right[2] * lengths, dtype=dtype, what="dw·|w|")
