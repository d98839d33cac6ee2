"""The head that people have: cosines of all classes in memory, the margin written into the target's column.

B rows · C classes · D features · s scale
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Inputs
from bench.peers.base import Step, memory_reason
from expface_kernels.margins import MarginFunction

# Keeps the slope of arccos finite at x ∥ w, as published heads do; 1 − 1e-7 is a float32 below 1.
COS_LIMIT = 1 - 1e-7


def margin_loss(
    x: Tensor, w: Tensor, labels: Tensor, margin: MarginFunction, scale: float, target_gradient: str
) -> Tensor:
    """Mean loss () of x (B, D), w (C, D), labels (B,), written as the usual published head writes it.

    Indexed and scaled in place, so that no copy of the logits is made that autograd does not need.
    """
    rows = torch.arange(x.shape[0], device=x.device)
    logits = F.linear(F.normalize(x), F.normalize(w)).clamp(-1, 1)
    # "detached": replaced behind autograd's back, as published heads do, so the slope stays the cosine's.
    with torch.set_grad_enabled(target_gradient == "exact"):
        theta = logits[rows, labels].clamp(-COS_LIMIT, COS_LIMIT).acos()
        logits[rows, labels] = margin(theta)
    return F.cross_entropy(logits.mul_(scale), labels)


def extra_bytes(case: Case) -> int:
    """About what this head holds at its peak, beside inputs and gradients, as measured."""
    logits, centres = case.rows * case.classes, case.classes * case.features
    return int(max(4 * logits + centres, 4.5 * centres)) * case.itemsize


class Eager:
    """`margin_loss`, op by op."""

    name = "eager"
    compiles = False

    def label(self, case: Case) -> str:
        return f"eager head ({case.target_gradient})"

    def why_not(self, case: Case) -> str | None:
        return memory_reason(case, extra_bytes(case))

    def step(self, inputs: Inputs) -> Step:
        case, margin = inputs.case, inputs.case.margin_function()

        def step() -> Tensor:
            loss = margin_loss(inputs.x, inputs.w, inputs.labels, margin, case.scale, case.target_gradient)
            loss.backward()
            return loss

        return step
