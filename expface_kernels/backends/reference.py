"""The reference as a backend: any device, any floating dtype, all logits in memory, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from expface_kernels import reference
from expface_kernels.backends.base import INVALID_TARGET, Forward, Request, compute_dtype


class ReferenceBackend:
    """Wraps `expface_kernels.reference.cosine_lse`; (B, C) logits in several copies."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def why_not(self, x: Tensor, w: Tensor) -> str | None:
        return None

    def workspace_numel(self, batch: int, classes: int, dtype: torch.dtype, request: Request) -> int:
        return 0

    def forward(
        self, x: Tensor, w: Tensor, y: Tensor, class_subset: Tensor | None, request: Request
    ) -> Forward:
        centres = w if class_subset is None else w[class_subset]
        log_l, theta, negatives = reference.cosine_lse(x, centres, y, request.scale)
        theta = torch.where(y == INVALID_TARGET, torch.nan, theta)
        nothing = x.new_empty(0, dtype=torch.float64)
        hardest_cos, hardest_class = nothing, y.new_empty(0)
        if request.find_hardest:
            cos, position = negatives.max(dim=1)
            named = position if class_subset is None else class_subset[position]
            hardest_cos, hardest_class = cos.double(), torch.where(cos == -torch.inf, -1, named)
        workspace = x.new_empty(0, dtype=compute_dtype(x, w))
        return Forward(log_l, theta, workspace, nothing.clone(), hardest_cos, hardest_class)

    def backward(
        self,
        x: Tensor,
        w: Tensor,
        y: Tensor,
        class_subset: Tensor | None,
        log_l: Tensor,
        workspace: Tensor,
        g_log_l: Tensor,
        g_theta: Tensor,
        request: Request,
        need_dx: bool,
        need_dw: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        idle = (g_log_l == 0) & ((g_theta == 0) | (y < 0))
        with torch.enable_grad():
            x = x.detach().requires_grad_(need_dx)
            w = w.detach().requires_grad_(need_dw)
            live_x = torch.where(idle[:, None], 0.0, x)  # padding may hold NaN
            centres = w if class_subset is None else w[class_subset]
            log_l, theta, _ = reference.cosine_lse(live_x, centres, y, request.scale)
            wanted = [tensor for tensor, need in ((x, need_dx), (w, need_dw)) if need]
            grads = iter(torch.autograd.grad([log_l, theta], wanted, [g_log_l, g_theta]))
        return (next(grads) if need_dx else None), (next(grads) if need_dw else None)

    def topk(self, x: Tensor, w: Tensor, k: int) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(x, w)
        cos = reference.normalize(x.to(dtype)) @ reference.normalize(w.to(dtype)).T
        best, classes = cos.topk(k, dim=1)
        return best, classes
