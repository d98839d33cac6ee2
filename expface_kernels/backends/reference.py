"""The reference as a backend: any device, any floating dtype, all logits in memory, gradients by autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from expface_kernels import reference
from expface_kernels.backends.base import INVALID_TARGET, Forward, OpConfig, compute_dtype

FILTER_TILE_ELEMENTS = 1 << 23
"""Logits that are there at a time while cosines are filtered: 32 MB of float32, a few times over."""


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
        self, x: Tensor, w: Tensor, y: Tensor, class_subset: Tensor | None, config: OpConfig
    ) -> Forward:
        centres = w if class_subset is None else F.embedding(class_subset, w, sparse=config.sparse_grad)
        log_l, theta, negatives = reference.cosine_lse(x, centres, y, config.scale)
        theta = torch.where(y == INVALID_TARGET, torch.nan, theta)
        cos, position = negatives.detach().max(dim=1)
        named = position if class_subset is None else class_subset[position]
        hardest_class = torch.where(cos == -torch.inf, -1, named)
        nothing = log_l.new_empty(0)
        return Forward(log_l, theta, nothing, nothing, cos.double(), hardest_class)

    def forward_filtered(
        self,
        x: Tensor,
        w: Tensor,
        y: Tensor,
        class_subset: Tensor | None,
        scale: float,
        threshold: float,
    ) -> Forward:
        """Do as `forward`, but with logit 0 and no gradient for a class whose cosine is above `threshold`.

        The target is never meant.

        In float32, or float64 where an input is, whatever autocast says. Extra memory: a few tiles of logits,
        O(B·D), w's unit rows, and the subset's centres where there is one.
        """
        dtype = compute_dtype(x, w)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype)
            chosen = (w if class_subset is None else w[class_subset]).to(dtype)
            xn, start, tiles = reference.normalize(x), 0, []
            for centres in chosen.split(max(1, FILTER_TILE_ELEMENTS // max(x.shape[0], 1))):
                # Recomputed in the backward, or autograd would keep every tile's logits.
                arguments = (xn, centres, y - start, threshold, scale)
                options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
                tiles.append(checkpoint(_filtered_lse, *arguments, **options))
                start += centres.shape[0]
            log_l = torch.logsumexp(torch.stack(tiles), 0)
            theta = torch.where(y >= 0, reference.pair_angle(x, chosen[y.clamp_min(0)]), 0.0)
            theta = torch.where(y == INVALID_TARGET, torch.nan, theta)
        nothing = log_l.new_empty(0)
        return Forward(log_l, theta, nothing, nothing, nothing, nothing.long())

    def topk(self, x: Tensor, w: Tensor, k: int) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(x, w)
        cos = reference.normalize(x.to(dtype)) @ reference.normalize(w.to(dtype)).T
        best, classes = cos.topk(k, dim=1)
        return best, classes


def _filtered_lse(xn: Tensor, centres: Tensor, y: Tensor, threshold: float, scale: float) -> Tensor:
    """Return log Σ (B,) float64 over a tile's classes; y is counted from its first, and may lie outside."""
    cos = xn @ reference.normalize(centres).T
    is_target = torch.arange(cos.shape[1], device=y.device) == y[:, None]
    cos = cos.masked_fill(cos > threshold, 0.0).masked_fill(is_target, -torch.inf)
    return torch.logsumexp(scale * cos, 1).double()
