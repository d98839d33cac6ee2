"""The definition of truth: the loss in plain PyTorch, logits in memory, gradients by autograd.

Slow and large on purpose; short enough to be checked by eye. Computes in the wider dtype of its two
inputs, float32 at least (the target path in float64), so float64 inputs give float64 truth.

B rows · C classes · D features · x (B, D) embeddings · w (C, D) class centres · y (B,) label, −1: none here
s scale · theta (B,) target angle, radians · log_l (B,) log Σ_{j≠y} exp(s·cos_bj) · eqs.: docs/math.md
"""

from __future__ import annotations

import torch
from torch import Tensor

from expface_kernels.margins import ExpFace, MarginFunction, target_similarity
from expface_kernels.stats import BatchStats, batch_stats, reduce_rows

NORM_EPS = 1e-12
# Shorter differences of two unit vectors are rounding noise without a direction.
PAIR_EPS = 1e-14


def normalize(v: Tensor) -> Tensor:
    """Return v / max(|v|, eps) over the last dimension (eq. 1); a row below eps gets no gradient."""
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    alive = norm >= NORM_EPS
    return torch.where(alive, v / torch.where(alive, norm, 1.0), v.detach() / NORM_EPS)


def _length(d: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(d, dim=-1)
    return torch.where(length > PAIR_EPS, length, length.detach())


def pair_angle(x: Tensor, w: Tensor) -> Tensor:
    """Return theta (B,) float64, radians, of rows of x and w (B, D): 2·atan2(|xn−wn|, |xn+wn|) (eq. 4).

    No gradient where either is shorter than eps: it has no direction (eq. 5).
    """
    x, w = x.double(), w.double()
    xn, wn = normalize(x), normalize(w)
    theta = 2 * torch.atan2(_length(xn - wn), _length(xn + wn))
    alive = torch.minimum(torch.linalg.vector_norm(x, dim=1), torch.linalg.vector_norm(w, dim=1)) >= NORM_EPS
    return torch.where(alive, theta, theta.detach())


def cosine_lse(x: Tensor, w: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (log_l, theta, cosines of the negatives (B, C), −inf at the target) (eqs. 2 to 4)."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        # Wide before anything is gathered: autograd sums the gradients of repeated rows in that dtype.
        x, w = x.to(dtype), w.to(dtype)
        has_target = y >= 0
        target = y.clamp_min(0)
        is_target = has_target[:, None] & (torch.arange(w.shape[0], device=y.device) == target[:, None])
        cos = normalize(x) @ normalize(w).T
        negatives = cos.masked_fill(is_target, -torch.inf)
        log_l = torch.logsumexp(scale * negatives, dim=1).double()
        theta = torch.where(has_target, pair_angle(x, w[target]), 0.0)
    return log_l, theta, negatives


def margin_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: MarginFunction | None = None,
    *,
    scale: float = 64.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    target_gradient: str = "exact",
    gradient_tolerance: float = 0.0,
    class_subset: Tensor | None = None,
    workspace_bytes: int = 0,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, BatchStats]:
    """Compute the loss of `expface_kernels.margin_cross_entropy`, with its arguments less `backend`.

    Neither `gradient_tolerance` (deprecated) nor `workspace_bytes` changes anything here: the reference holds
    all its logits, (B, C) in several copies. Assumes valid arguments.
    """
    margin = ExpFace() if margin is None else margin
    labels = labels.reshape(-1).long()
    counted = labels != ignore_index
    y = torch.where(counted, labels, -1)
    embeddings = torch.where(counted[:, None], embeddings, 0.0)  # padding may hold NaN
    if class_subset is not None:
        weight = weight[class_subset]
        y = torch.where(counted, torch.searchsorted(class_subset.contiguous(), y.clamp_min(0)), -1)

    log_l, theta, negatives = cosine_lse(embeddings, weight, y, scale)
    psi = target_similarity(margin, theta, target_gradient)
    delta = torch.where(counted, log_l - scale * psi, -torch.inf)
    rows = torch.logaddexp(delta, torch.zeros_like(delta))  # eq. 6
    loss = reduce_rows(rows, counted, reduction).to(negatives.dtype)
    if not return_stats:
        return loss
    hardest_cos, hardest = negatives.detach().max(dim=1)
    if class_subset is not None:
        hardest = class_subset[hardest]
    return loss, batch_stats(log_l, theta, psi, counted, hardest_cos, hardest, scale)
