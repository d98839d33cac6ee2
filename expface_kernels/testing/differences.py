"""A float64 gradient against finite differences of the loss it belongs to, a margin's slope against psi's.

The gradient along random directions, by the sixth-order central difference. A loss has a cone at a row's own
centre and at its antipode, so a row is moved by a small share of its distance from both, and not at all close
to one or where psi bends or jumps. The slope at every angle, from both sides: at a bend one of them is right.

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
# f'(0)·h = Σ weight·f(k·h) over k = 0, 1, …, of the same order and from one side.
ONE_SIDED = (-49 / 20, 6.0, -15 / 2, 20 / 3, -15 / 4, 6 / 5, -1 / 6)
LARGEST_STEP = 1e-3
"""Radians."""
LOGIT_STEP = 1 / 150
"""Most that a step may change a logit s·cos: truncation and rounding are then about equally small."""
CONE_SHARE = 1 / 40
"""Of a row's distance from a cone, the most that a step may move it."""
NEAREST = 1e-4
"""Radians from a cone within which a row stays where it is: steps there would be lost in rounding."""
SLOPE_STEP = 5e-5
"""Radians, at most. Two bends of psi closer than 12 of them leave no right side between them."""
SMOOTH = 1e-7
"""Most by which the slopes from both sides differ where psi does not bend."""
GRID = 1024
"""Angles over (0, π) at which a margin's slope is looked at, at least."""
GRID_SHIFT = (math.sqrt(5) - 1) / 2
"""Of the grid, in its distances: no angle is a plain fraction of π, where margins bend."""

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

    All float64 on the CPU; None where every row is at a cone or a bend of psi.
    """
    theta = reference.pair_angle(x, w[y]).detach()
    gap = torch.minimum(theta, math.pi - theta)
    step = min(LARGEST_STEP, LOGIT_STEP / scale)
    row_steps = torch.where(gap < NEAREST, 0.0, (gap * CONE_SHARE).clamp_max(step))
    # Six halves of a step reach as far as the stencil's three.
    after, before = _slopes(margin, theta, row_steps / 2)
    row_steps = torch.where(_apart(after, before) > SMOOTH, 0.0, row_steps)
    class_steps = torch.full((w.shape[0],), step, dtype=torch.float64, device="cpu")
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


def slope_error(margin: MarginFunction, theta: Tensor) -> tuple[float, float]:
    """(error, angle in radians) where autograd's slope of psi is worst: at theta (B,) or on a grid of (0, π).

    theta is float64 on the CPU. The error is relative to the slope, or absolute where that is below 1. The
    margin is asked for B angles at a time, as it may hold a parameter for each row.
    """
    rows = theta.shape[0]
    turns = math.ceil(GRID / rows)
    points = torch.arange(turns * rows, dtype=torch.float64, device="cpu") + GRID_SHIFT
    grid = math.pi * points.reshape(turns, rows) / points.numel()
    angles = torch.cat([theta[None], grid])
    errors = torch.stack([_slope_errors(margin, at) for at in angles])
    worst = int(errors.nan_to_num(nan=math.inf, posinf=math.inf).argmax())
    return float(errors.flatten()[worst]), float(angles.flatten()[worst])


def _slope_errors(margin: MarginFunction, at: Tensor) -> Tensor:
    """(B,) by the side that agrees better with the slope at `at` (B,); 0 too close to 0 or π."""
    leaf = at.clone().requires_grad_()
    psi = margin(leaf)
    slope = torch.zeros_like(at)
    if psi.requires_grad:
        (slope,) = torch.autograd.grad(psi.sum(), leaf, allow_unused=True, materialize_grads=True)
    gap = torch.minimum(at, math.pi - at)
    after, before = _slopes(margin, at, (gap * CONE_SHARE).clamp_max(SLOPE_STEP))
    return torch.where(gap < NEAREST, 0.0, torch.fmin(_apart(slope, after), _apart(slope, before)))


def _slopes(margin: MarginFunction, at: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """psi's slopes (B,) at `at` (B,) from differences with larger angles, and with smaller ones."""

    def found(side: Tensor) -> Tensor:
        values = [weight * margin(at + k * side).detach() for k, weight in enumerate(ONE_SIDED)]
        return torch.stack(values).sum(0) / side

    return found(step), found(-step)


def _apart(slope: Tensor, found: Tensor) -> Tensor:
    """|slope − found|, relative to what was found where that is above 1."""
    return (slope - found).abs() / found.abs().clamp_min(1.0)


def _error(losses: list[Tensor], along: Tensor, gradient: Tensor) -> Tensor:
    """() |differences − gradient·along| over the length of that product's terms, one a row."""
    found = torch.stack([weight * loss for weight, loss in zip(STENCIL.values(), losses, strict=True)]).sum()
    size = torch.linalg.vector_norm(gradient.norm(dim=1) * along.norm(dim=1))
    off = (found - (gradient * along).sum()).abs()
    return torch.where(off == 0, 0.0, off / size)


def _direction(at: Tensor, steps: Tensor, generator: torch.Generator) -> Tensor:
    """Random moves of the rows (R, D) of `at`, as long as `steps` (R,) radians seen from the origin."""
    v = torch.randn(at.shape, generator=generator, dtype=torch.float64, device="cpu")
    length = steps * at.norm(dim=1) / v.norm(dim=1)
    return v * length[:, None]
