"""A float64 gradient against finite differences of the loss it belongs to.

Along random directions, by the sixth-order central difference. A loss has a cone at a row's own centre and at
its antipode, so a row is moved by a small share of its distance from both, and not at all close to one.

B rows · C classes · D features · x (B, D) · w (C, D) · y (B,)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from expface_kernels import reference
from expface_kernels.margins import MarginFunction

DIRECTIONS = 4
# f'(0)·h = Σ weight·f(k·h) over k → weight, exact for polynomials up to degree 6.
STENCIL = {-3: -1 / 60, -2: 9 / 60, -1: -45 / 60, 1: 45 / 60, 2: -9 / 60, 3: 1 / 60}
LARGEST_STEP = 1e-3
"""Radians."""
LOGIT_STEP = 1 / 150
"""Most that a step may change a logit s·cos: truncation and rounding are then about equally small."""
CONE_SHARE = 1 / 40
"""Of a row's distance from a cone, the most that a step may move it."""
NEAREST = 1e-4
"""Radians from a cone within which a row stays where it is: steps there would be lost in rounding."""

Loss = Callable[[Tensor, Tensor, MarginFunction], Tensor]
"""(x, w, margin) → the summed loss () float64, whose slope in theta is the margin's own."""


def frozen(margin: MarginFunction, x: Tensor, w: Tensor, y: Tensor) -> MarginFunction:
    """The margin whose own slope is the "detached" one at x and w: psi's value there, the slope of cos θ."""
    theta = reference.pair_angle(x, w[y]).detach()
    psi = margin(theta).detach()
    return lambda moved: psi + torch.cos(moved) - torch.cos(theta)


def difference_error(
    loss: Loss, x: Tensor, w: Tensor, y: Tensor, margin: MarginFunction, dx: Tensor, dw: Tensor, scale: float
) -> float | None:
    """The worst error of dx and dw along random directions, over the length of what was looked at.

    All float64 on the CPU; None where every row is at a cone.
    """
    theta = reference.pair_angle(x, w[y]).detach()
    gap = torch.minimum(theta, math.pi - theta)
    step = min(LARGEST_STEP, LOGIT_STEP / scale)
    row_steps = torch.where(gap < NEAREST, 0.0, (gap * CONE_SHARE).clamp_max(step))
    class_steps = torch.full((w.shape[0],), step, dtype=torch.float64)
    class_steps.scatter_reduce_(0, y, row_steps, "amin")
    if not bool((row_steps > 0).any()):
        return None
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(DIRECTIONS):
        along = _direction(x, row_steps, generator)
        errors.append(_error([loss(x + k * along, w, margin) for k in STENCIL], along, dx))
        along = _direction(w, class_steps, generator)
        errors.append(_error([loss(x, w + k * along, margin) for k in STENCIL], along, dw))
    return float(torch.stack(errors).max())  # NaN if there is any


def _error(losses: list[Tensor], along: Tensor, gradient: Tensor) -> Tensor:
    """() |differences − gradient·along| over the length of that product's terms, one a row."""
    found = torch.stack([weight * loss for weight, loss in zip(STENCIL.values(), losses, strict=True)]).sum()
    size = torch.linalg.vector_norm(gradient.norm(dim=1) * along.norm(dim=1))
    off = (found - (gradient * along).sum()).abs()
    return torch.where(off == 0, 0.0, off / size)


def _direction(at: Tensor, steps: Tensor, generator: torch.Generator) -> Tensor:
    """Random moves of the rows (R, D) of `at`, as long as `steps` (R,) radians seen from the origin."""
    v = torch.randn(at.shape, generator=generator, dtype=torch.float64)
    length = steps * at.norm(dim=1) / v.norm(dim=1)
    return v * length[:, None]
