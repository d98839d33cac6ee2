"""The reference as a backend: any device, any floating dtype, all logits in memory, gradients by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from expface_kernels import reference
from expface_kernels.backends.base import INVALID_TARGET, Forward, Request, compute_dtype


class ReferenceBackend:
    """Wraps `expface_kernels.reference.cosine_lse`; (B, C) logits in several copies.

    Its forward is plain torch and is called outside the op, so that autograd sees all of it.
    """

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def why_not(self, x: Tensor, w: Tensor) -> str | None:
        return None

    def forward(
        self, x: Tensor, w: Tensor, y: Tensor, class_subset: Tensor | None, request: Request
    ) -> Forward:
        centres = w if class_subset is None else F.embedding(class_subset, w, sparse=request.sparse_grad)
        log_l, theta, negatives = reference.cosine_lse(x, centres, y, request.scale)
        theta = torch.where(y == INVALID_TARGET, torch.nan, theta)
        cos, position = negatives.detach().max(dim=1)
        named = position if class_subset is None else class_subset[position]
        hardest_class = torch.where(cos == -torch.inf, -1, named)
        nothing = log_l.new_empty(0)
        return Forward(log_l, theta, nothing, nothing, cos.double(), hardest_class)

    def topk(self, x: Tensor, w: Tensor, k: int) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(x, w)
        cos = reference.normalize(x.to(dtype)) @ reference.normalize(w.to(dtype)).T
        best, classes = cos.topk(k, dim=1)
        return best, classes
