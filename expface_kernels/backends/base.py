"""The protocol of a backend, and the configuration that it gets.

B rows · C classes that take part (the subset's size where one is given) · D features
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from expface_kernels.reference import NORM_EPS, PAIR_EPS

NO_TARGET = -1
"""Label of a row whose target is not on this shard, or that is ignored."""
INVALID_TARGET = -2
"""Label of a row whose own label was out of range where that could not be raised: its loss is NaN."""


@dataclass(frozen=True)
class OpConfig:
    """Says what one call of the op asks for; nothing in it depends on a tensor's values."""

    scale: float
    keep: bool
    """A backward will come: save what it needs."""
    workspace_bytes: int
    """How much of the exponentials the forward may keep for it."""
    find_hardest: bool
    product_dtype: torch.dtype | None
    """What autocast wants the matrix products in; None outside autocast."""
    sparse_grad: bool = False
    """dw has only the subset's rows, in its order: (S, D) in place of (C_all, D)."""


class Forward(NamedTuple):
    """Holds the op's results, eqs. 2 to 4 of docs/math.md; what was not asked for has size 0."""

    log_l: Tensor  # (B,) float64
    theta: Tensor  # (B,) float64, radians
    workspace: Tensor  # backend's own
    tile_sums: Tensor  # room for sums by groups of classes
    hardest_cos: Tensor  # (B,) float64
    hardest_class: Tensor  # (B,) int64, a row of w (not a position in the subset); −1 where none


class Backend(Protocol):
    """The first half of the loss on one kind of device.

    x (B, D) and w (C_all, D) floating point; y (B,) int64 in [0, C), NO_TARGET or INVALID_TARGET;
    class_subset (C,) sorted int64 or None.
    """

    name: str

    def unavailable(self) -> str | None:
        """Return why this backend cannot run on this machine at all; None where it can."""

    def why_not(self, x: Tensor, w: Tensor) -> str | None:
        """Return why it cannot take these inputs; None where it can."""

    def forward(
        self, x: Tensor, w: Tensor, y: Tensor, class_subset: Tensor | None, config: OpConfig
    ) -> Forward:
        """Compute the op's outputs."""

    def topk(self, x: Tensor, w: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest cosines (B, k), descending, and their classes (B, k) int64."""


class OpBackend(Backend, Protocol):
    """A backend behind the custom op: autograd does not see into it, so it brings its own backward."""

    def workspace_numel(self, x: Tensor, w: Tensor, classes: int, config: OpConfig) -> int:
        """Return how many elements of compute_dtype the workspace has that forward returns for `keep`.

        x and w may be without data, and `config.scale` is not the real one.
        """

    def effective_workspace_bytes(self, workspace_bytes: int, scale: float) -> int:
        """Return how many of the bytes the forward has a use for at this scale; the op gets that number."""

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
        config: OpConfig,
        need_dx: bool,
        need_dw: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (dx, dw) in the dtypes and shapes of x and w, from G and H (B,) float64 (eqs. 10 and 11).

        With `config.sparse_grad`, dw is (S, D), the rows of the subset; O(S·D) time and memory.
        """


def compute_dtype(x: Tensor, w: Tensor) -> torch.dtype:
    """Return float64 where either input is, else float32, in which 16-bit inputs are accumulated."""
    return torch.float64 if torch.float64 in (x.dtype, w.dtype) else torch.float32


class TargetGeometry:
    """Computes the target path in float64, from rows x (B, D) and their labels' centers (eqs. 4 and 5).

    Rows without a target are paired with themselves: their angle is 0 and they have no direction.
    """

    def __init__(self, x: Tensor, w: Tensor, y: Tensor, class_subset: Tensor | None) -> None:
        has_target = (y >= 0)[:, None]
        classes = y.clamp_min(0)
        x = x.double()
        own = w[classes if class_subset is None else class_subset[classes]].double()
        self.y = y
        self.x_norm, self.xn = norms_and_units(x)
        w_norm, wn = norms_and_units(own)
        self.w_norm = torch.where(has_target, w_norm, 1.0)
        self.wn = torch.where(has_target, wn, self.xn)

    def theta(self) -> Tensor:
        """Return the angles (B,) in radians; 0 without a target, NaN for an invalid one."""
        apart = torch.linalg.vector_norm(self.xn - self.wn, dim=1)
        together = torch.linalg.vector_norm(self.xn + self.wn, dim=1)
        theta = torch.where(self.y >= 0, 2 * torch.atan2(apart, together), 0.0)
        return torch.where(self.y == INVALID_TARGET, torch.nan, theta)

    def tangents(self) -> tuple[Tensor, Tensor]:
        """Return unit tangents (u, v), (B, D), at xn towards wn and at wn towards xn; 0 where none is."""
        facing = (self.xn * self.wn).sum(1, keepdim=True) >= 0
        d = torch.where(facing, self.wn - self.xn, self.wn + self.xn)
        alive = (self.x_norm >= NORM_EPS) & (self.w_norm >= NORM_EPS)
        alive &= torch.linalg.vector_norm(d, dim=1, keepdim=True) > PAIR_EPS
        u = _unit_tangent(d, self.xn, alive)
        v = _unit_tangent(torch.where(facing, -d, d), self.wn, alive)
        return u, v


def norms_and_units(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return |v| (B, 1) and v / max(|v|, eps) (B, D) (eq. 1)."""
    norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return norm, v / norm.clamp_min(NORM_EPS)


def _unit_tangent(d: Tensor, at: Tensor, alive: Tensor) -> Tensor:
    tangent = d - (d * at).sum(1, keepdim=True) * at
    length = torch.linalg.vector_norm(tangent, dim=1, keepdim=True)
    return torch.where(alive & (length > 0), tangent / length, 0.0)
