"""The head that people have: cosines of all classes in memory, the margin written into the target's column.

B rows · C classes · D features · s scale
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Inputs
from bench.peers.base import Peer, Step, mode, step_of
from expface_kernels.margins import MarginFunction

# Keeps the slope of arccos finite at x ∥ w, as published heads do; 1 − 1e-7 is a float32 below 1.
COS_LIMIT = 1 - 1e-7


def margin_loss(
    x: Tensor, w: Tensor, labels: Tensor, margin: MarginFunction, scale: float, target_gradient: str
) -> Tensor:
    """Mean loss () of x (B, D), w (C, D), labels (B,), written as the usual published head writes it.

    Indexed and scaled in place, so that no copy of the logits is made that autograd does not need; float32
    after the product, as published heads for mixed precision do.
    """
    rows = torch.arange(x.shape[0], device=x.device)
    cos = F.linear(F.normalize(x), F.normalize(w))
    logits = cos.to(torch.promote_types(cos.dtype, torch.float32)).clamp(-1, 1)
    del cos
    # "detached": replaced behind autograd's back, as published heads do, so the slope stays the cosine's.
    with torch.set_grad_enabled(target_gradient == "exact"):
        theta = logits[rows, labels].clamp(-COS_LIMIT, COS_LIMIT).acos()
        logits[rows, labels] = margin(theta).to(logits.dtype)
    return F.cross_entropy(logits.mul_(scale), labels)


def extra_bytes(case: Case) -> int:
    """About what this head holds at its peak, beside inputs and gradients, as measured."""
    logits, centres = case.rows * case.taking_part, case.taking_part * case.features
    itemsize = max(case.itemsize, 4)
    numbers = max(4 * logits + centres, 4.5 * centres) if case.backward else logits + max(logits, centres)
    extra = int(numbers) * itemsize
    # Under autocast the cosines are there in 16 bit as well.
    return extra + (logits * case.product_dtype.itemsize if case.product_dtype.itemsize < itemsize else 0)


class Eager(Peer):
    """`margin_loss`, op by op."""

    name = "eager"

    def label(self, case: Case) -> str:
        return f"eager head ({mode(self, case)})"

    def extra_bytes(self, case: Case) -> int:
        return extra_bytes(case)

    def step(self, inputs: Inputs) -> Step:
        case, margin = inputs.case, inputs.case.margin_function()
        return step_of(
            case,
            lambda: margin_loss(inputs.x, inputs.w, inputs.labels, margin, case.scale, case.target_gradient),
        )
