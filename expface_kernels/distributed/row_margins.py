"""A margin that knows more of a row than its angle, over the ranks of a group.

B rows of this rank · N rows of all ranks, by rank
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from expface_kernels.distributed.group import Group, telling
from expface_kernels.margins import MarginFunction, target_similarity
from expface_kernels.options import LossOptions


def row_similarity(
    margin: MarginFunction, theta: Tensor, rows: list[int], options: LossOptions, group: Group
) -> Tensor:
    """psi (N,) of the angles (N,) of all ranks' rows, each computed on the row's own rank.

    One all_gather of psi, and of its slope where the gradient is exact. The gradient of what the margin holds
    of its rows is multiplied by options.grad_scale.
    """
    where = group.own_slice(rows)
    exact = options.target_gradient == "exact" and torch.is_grad_enabled()
    refuse = functools.partial(group.refuse_gather, 2 if exact else 1, rows)
    with telling(None if options.equal_rows else refuse):
        own_psi, sent = _own_similarity(theta[where].detach(), margin, exact)
    gather = group.gather if options.equal_rows else group.gather_or_refuse
    gathered = gather(sent, rows)
    psi = gathered[:, 0]
    if exact:
        psi = psi + gathered[:, 1] * (theta - theta.detach())
    else:
        cos = torch.cos(theta)
        psi = psi + cos - cos.detach()
    # The value stands; this adds the gradient to what the margin holds of its own rows.
    own = options.grad_scale(group.size) * (own_psi - own_psi.detach())
    return psi + F.pad(own, (where.start, theta.shape[0] - where.stop))


def _own_similarity(angle: Tensor, margin: MarginFunction, exact: bool) -> tuple[Tensor, Tensor]:
    """psi (B,) of this rank's angles (B,), and (B, 1) float64 of its values, or (B, 2) with its slopes."""
    angle = angle.requires_grad_(exact)
    psi = target_similarity(margin, angle, "exact")
    sent = [psi.detach()]
    if exact:
        slope = torch.zeros_like(angle)
        if psi.requires_grad:
            found = torch.autograd.grad(psi.sum(), angle, retain_graph=True, allow_unused=True)[0]
            slope = slope if found is None else found
        sent.append(slope)
    return psi, torch.stack([values.to(angle.dtype) for values in sent], 1)
