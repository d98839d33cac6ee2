"""What a margin does to the target angle: its similarity, penalties, slope, decision boundary, and a summary.

All for any margin, ours or your own, a callable `theta (N,) float64 radians -> psi (N,)`; computed in float64
on the CPU, O(N) memory. Derivations: docs/curves.md.

N angles · theta (N,) target angle in [0, π], radians · psi (N,) similarity, cosine units
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from expface_kernels.checks import check_target_gradient
from expface_kernels.margins import MarginFunction, target_similarity

# psi may pass ±1 by rounding without leaving the range of the cosine.
ROUNDING = 1e-12


def label(margin: MarginFunction) -> str:
    """What to call a margin in a table or a legend: a function's name, else its repr in one line."""
    name = getattr(margin, "__name__", None)
    return name if isinstance(name, str) else " ".join(repr(margin).split())


def similarity(margin: MarginFunction, theta: Tensor) -> Tensor:
    """psi(theta) (N,) float64: what takes the place of cos θ in the target's logit.

    Raises TypeError or ValueError for angles outside [0, π], and for a margin that returns another shape,
    another kind of number, or anything not finite. The same holds for all functions here.
    """
    theta = _angles(theta)
    with torch.no_grad():
        return _finite(target_similarity(margin, theta, "exact"), theta)


def slope(margin: MarginFunction, theta: Tensor, target_gradient: str = "exact") -> Tensor:
    """dpsi/dθ (N,) as training sees it: that of psi ("exact"), or that of cos θ, −sin θ ("detached").

    Raises ValueError also where psi does not depend on theta through autograd.
    """
    return _derivatives(margin, theta, target_gradient, order=1)


def curvature(margin: MarginFunction, theta: Tensor) -> Tensor:
    """d²psi/dθ² (N,); at a kink of the slope, that of the side which the margin's own formula takes."""
    return _derivatives(margin, theta, "exact", order=2)


def pull(margin: MarginFunction, theta: Tensor, target_gradient: str = "exact") -> Tensor:
    """r = dpsi/dcos θ = −slope/sin θ (N,): the target's pull as a multiple of all other classes' push.

    Per unit of s·g·q the negatives' cosines are pushed with 1 altogether and the target's is pulled with r
    (docs/math.md, section 4). Detached, r is 1 everywhere. NaN at θ = 0 and π, where sin θ is 0.
    """
    sin = torch.sin(_angles(theta))
    return -slope(margin, theta, target_gradient) / torch.where(sin > ROUNDING, sin, torch.nan)


def cosine_penalty(margin: MarginFunction, theta: Tensor) -> Tensor:
    """cos θ − psi (N,), cosine units: how much less similar the target is made to look."""
    return torch.cos(_angles(theta)) - similarity(margin, theta)


def effective_angle(margin: MarginFunction, theta: Tensor) -> Tensor:
    """φ (N,), radians: the angle at which a plain cosine would be psi(θ), as if the row lay there.

    arccos psi; outside [−1, 1] the cosine is continued as SphereFace does it, decreasing by 2 in each π, so
    that φ > π for psi < −1 and φ < 0 for psi > 1. psi is rounded to 1e-16, hence φ to 1e-16/|sin φ|: 1e-12
    or better down to 1e-4 from 0 and π, 1e-8 at them.
    """
    psi = similarity(margin, theta)
    k = torch.floor((1 - psi) / 2)
    return k * math.pi + torch.arccos((psi + 2 * k).clamp(-1, 1))


def angular_penalty(margin: MarginFunction, theta: Tensor) -> Tensor:
    """φ − θ (N,), radians: how much farther out the row is treated to lie (see `effective_angle`)."""
    return effective_angle(margin, theta) - _angles(theta)


def decision_boundary(margin: MarginFunction, theta: Tensor) -> Tensor:
    """Angle θ2 (N,) to another class at which a row at theta from its own class just satisfies the margin.

    The row's own class wins where cos θ2 < psi(θ1), that is for θ2 above arccos psi(θ1); without a margin
    that is θ2 > θ1. NaN where psi < −1: no θ2 is far enough; 0 where psi > 1: every θ2 is.
    """
    psi = similarity(margin, theta)
    return torch.where(psi < -1 - ROUNDING, torch.nan, torch.arccos(psi.clamp(-1, 1)))


def _angles(theta: Tensor) -> Tensor:
    """theta as float64, after a look at it."""
    if not isinstance(theta, Tensor):
        raise TypeError(f"theta: expected a tensor (N,), got {type(theta).__name__}")
    if not theta.is_floating_point() or theta.dim() != 1:
        raise ValueError(
            f"theta: expected floating point of shape (N,), got {theta.dtype} of shape {tuple(theta.shape)}"
        )
    theta = theta.detach().double()
    outside = ~((theta >= 0) & (theta <= math.pi))  # NaN is outside
    if outside.any():
        raise ValueError(f"theta: expected radians in [0, π], got {float(theta[outside][0]):.6g}")
    return theta


def _finite(psi: Tensor, theta: Tensor) -> Tensor:
    """psi as float64, if all of it is finite."""
    wrong = ~torch.isfinite(psi)
    if wrong.any():
        value, at = (float(values.detach()[wrong][0]) for values in (psi, theta))
        raise ValueError(f"margin: expected a finite psi on [0, π], got {value} at theta = {at:.6g}")
    return psi.double()


def _derivatives(margin: MarginFunction, theta: Tensor, target_gradient: str, order: int) -> Tensor:
    check_target_gradient(target_gradient)
    theta = _angles(theta).clone().requires_grad_()
    with torch.enable_grad():
        value = _finite(target_similarity(margin, theta, target_gradient), theta)
        for n in range(order):
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value.sum(), theta, create_graph=True, allow_unused=True)
            else:
                gradient = None
            if gradient is None and n == 0:
                raise ValueError(
                    "margin: psi does not depend on theta through autograd; expected plain torch"
                )
            value = torch.zeros_like(theta) if gradient is None else gradient
    return value.detach()
