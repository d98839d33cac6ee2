"""Angular margins: plain differentiable maps from the target angle to the target's similarity.

A margin is any callable `theta (B,) float64, radians -> psi (B,)` in plain torch; psi takes the place of
cos(theta) in the target logit, s·psi(theta). No kernel knows any margin, so one of your own is as fast as
these. Parameters are floats or (B,) tensors (one value per row: gradients flow to them), and may be
assigned between steps.

B rows · theta target angle in [0, π], radians · psi similarity, cosine units
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

MarginFunction = Callable[[Tensor], Tensor]
Parameter = float | Tensor

# Below this angle the slope of (theta/π)^m, which is infinite at 0 for m < 1, is taken as 0.
THETA_FLOOR = 1e-7


class Margin:
    """Base of the margins here: checks the range of each parameter whenever it is assigned."""

    # name -> (low, high, low is allowed, high is allowed)
    ranges: ClassVar[dict[str, tuple[float, float, bool, bool]]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.ranges:
            _check_parameter(type(self).__name__, name, value, *self.ranges[name])
            if not isinstance(value, (int, float, Tensor)):
                value = float(value)  # numpy's, whose product with a tensor is an array
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={_show(value)}" for name, value in vars(self).items())
        return f"{type(self).__name__}({inside})"

    def __call__(self, theta: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no __call__(theta): a margin maps (B,) radians to (B,)")


def _show(value: Any) -> str:
    return f"<tensor {tuple(value.shape)}>" if isinstance(value, Tensor) else repr(value)


def _check_parameter(
    owner: str, name: str, value: Any, low: float, high: float, low_in: bool, high_in: bool
) -> None:
    """Raise TypeError or ValueError for a parameter of another type or out of its range.

    The values of a tensor are looked at on the CPU only: on a GPU that would wait for the device.
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.dim() > 1:
            raise ValueError(
                f"{owner}: {name} as a tensor must be floating point of shape (B,) or (), "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
        if value.device.type == "cpu" and value.numel() and not torch.compiler.is_compiling():
            for extreme in value.detach().aminmax():
                _check_parameter(owner, name, float(extreme), low, high, low_in, high_in)
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{owner}: {name} must be a float or a (B,) tensor, got {type(value).__name__}")
    number = float(value)
    above = number >= low if low_in else number > low
    below = number <= high if high_in else number < high
    if not (above and below):
        left, right = ("[" if low_in else "("), ("]" if high_in else ")")
        hint = ""
        if high == math.pi and number >= math.pi:
            hint = f"; it is in radians, not degrees ({value} degrees are {math.radians(number):.4g} radians)"
        raise ValueError(f"{owner}: {name} must be in {left}{low:.6g}, {high:.6g}{right}, got {value}{hint}")


def as_tensor(value: Parameter, like: Tensor) -> Tensor:
    """Return a float as a () tensor of like's dtype and device, a tensor as it is.

    As a product, since that is what torch.compile keeps symbolic: with the bare float in a power or a
    cosine, a schedule that assigns it at every step would compile at every step.
    """
    if not isinstance(value, Tensor):
        return like.new_ones(()) * value
    if value.dim() == 1 and value.shape != like.shape:
        raise ValueError(
            f"margin: expected a parameter of shape {tuple(like.shape)}, one value a row, "
            f"got {tuple(value.shape)}"
        )
    return value


class ExpFace(Margin):
    """psi = cos(π·(θ/π)^m): strictly decreasing; no penalty at 0 and π, the largest at θ = π·m^(1/(1−m)).

    m: 0 < m ≤ 1, no unit; m = 1 is no margin. The slope is bounded for m ≥ 1/2 and finite below it,
    since θ is floored at 1e-7. Source: arXiv 2509.19753.
    """

    ranges: ClassVar = {"m": (0.0, 1.0, False, True)}

    def __init__(self, m: Parameter = 0.7) -> None:
        self.m = m

    def __call__(self, theta: Tensor) -> Tensor:
        return torch.cos(math.pi * (theta.clamp_min(THETA_FLOOR) / math.pi) ** as_tensor(self.m, theta))


class ArcFace(Margin):
    """psi = cos(θ + m).

    m: radians, 0 ≤ m < π. Past θ = π − m, where cos(θ + m) rises again, `boundary` says what holds:
    "none" cos(θ + m) as published, "monotonic" cos θ − m·sin m (which falls for m < 2.33), "easy"
    cos θ wherever θ ≥ π/2. Source: arXiv 1801.07698.
    """

    ranges: ClassVar = {"m": (0.0, math.pi, True, False)}
    boundaries = ("none", "monotonic", "easy")

    def __init__(self, m: Parameter = 0.5, boundary: str = "none") -> None:
        self.m = m
        self.boundary = boundary

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "boundary" and value not in self.boundaries:
            raise ValueError(f"ArcFace: boundary must be one of {self.boundaries}, got {value!r}")
        super().__setattr__(name, value)

    def __call__(self, theta: Tensor) -> Tensor:
        m = as_tensor(self.m, theta)
        inside = torch.cos(theta + m)
        if self.boundary == "none":
            return inside
        if self.boundary == "easy":
            return torch.where(theta < math.pi / 2, inside, torch.cos(theta))
        return torch.where(theta + m <= math.pi, inside, torch.cos(theta) - m * torch.sin(m))


class CosFace(Margin):
    """psi = cos θ − m.

    m: cosine units, 0 ≤ m ≤ 2. Source: arXiv 1801.09414.
    """

    ranges: ClassVar = {"m": (0.0, 2.0, True, True)}

    def __init__(self, m: Parameter = 0.35) -> None:
        self.m = m

    def __call__(self, theta: Tensor) -> Tensor:
        return torch.cos(theta) - as_tensor(self.m, theta)


class SphereFace(Margin):
    """psi = (−1)^k·cos(m·θ) − 2k with k = ⌊m·θ/π⌋: decreasing, its slope vanishes at θ = kπ/m.

    m: a factor of the angle, m ≥ 1, whole or not. Source: arXiv 1704.08063.
    """

    ranges: ClassVar = {"m": (1.0, math.inf, True, False)}

    def __init__(self, m: Parameter = 1.5) -> None:
        self.m = m

    def __call__(self, theta: Tensor) -> Tensor:
        angle = as_tensor(self.m, theta) * theta
        k = torch.floor((angle / math.pi).detach())
        sign = 1 - 2 * torch.remainder(k, 2)
        return sign * torch.cos(angle) - 2 * k


class CombinedMargin(Margin):
    """psi = cos(m1·θ + m2) − m3; all three always count.

    m1: a factor, m1 > 0. m2: radians, 0 ≤ m2 < π. m3: cosine units, 0 ≤ m3 ≤ 2. The default equals
    ArcFace(0.5). Source: arXiv 1801.07698, section 2.
    """

    ranges: ClassVar = {
        "m1": (0.0, math.inf, False, False),
        "m2": (0.0, math.pi, True, False),
        "m3": (0.0, 2.0, True, True),
    }

    def __init__(self, m1: Parameter = 1.0, m2: Parameter = 0.5, m3: Parameter = 0.0) -> None:
        self.m1 = m1
        self.m2 = m2
        self.m3 = m3

    def __call__(self, theta: Tensor) -> Tensor:
        m1, m2, m3 = (as_tensor(m, theta) for m in (self.m1, self.m2, self.m3))
        return torch.cos(m1 * theta + m2) - m3


class NormFace(Margin):
    """psi = cos θ: normalised softmax without a margin. Source: arXiv 1704.06369."""

    def __call__(self, theta: Tensor) -> Tensor:
        return torch.cos(theta)


def row_parameters(margin: MarginFunction) -> dict[str, Tensor]:
    """Return name → value of what a margin holds one value per row of: attributes that are (B,) tensors.

    Of an nn.Module these are its plain attributes; a parameter or a buffer is the same for all rows. A margin
    of your own with other 1-d tensors says so with an attribute `per_row = False`.
    """
    if not getattr(margin, "per_row", True):
        return {}
    held = getattr(margin, "__dict__", {})
    return {name: value for name, value in held.items() if isinstance(value, Tensor) and value.dim() == 1}


def is_per_row(margin: MarginFunction) -> bool:
    """Tell whether psi of a row depends on more than its angle: only the row's own rank can compute it then.

    A margin of your own that looks at its rows in another way says so with an attribute `per_row = True`.
    """
    return bool(getattr(margin, "per_row", False)) or bool(row_parameters(margin))


def describe(margin: MarginFunction) -> str:
    """Describe the margin in text that is the same in every process; values of rows are left out."""
    if isinstance(margin, Margin):
        inside = ", ".join(
            f"{name}={'one a row' if isinstance(value, Tensor) and value.dim() else value}"
            for name, value in vars(margin).items()
        )
        return f"{type(margin).__name__}({inside})"
    return getattr(margin, "__qualname__", type(margin).__qualname__)


TARGET_GRADIENTS = ("exact", "detached")


def target_similarity(margin: MarginFunction, theta: Tensor, target_gradient: str) -> Tensor:
    """Return psi (B,) of theta (B,), with the slope that `target_gradient` names (docs/math.md eq. 8).

    "exact" differentiates psi; "detached" keeps its value and takes the slope of cos θ, as the published
    ExpFace code does. Either way the margin's own parameters keep their gradient.
    """
    exact = target_gradient == "exact"
    psi = margin(theta if exact else theta.detach())
    if not isinstance(psi, Tensor) or psi.shape != theta.shape:
        got = tuple(psi.shape) if isinstance(psi, Tensor) else type(psi).__name__
        raise ValueError(f"margin must return psi of theta's shape {tuple(theta.shape)}, got {got}")
    if not psi.is_floating_point():
        raise ValueError(f"margin must return floating point psi, got {psi.dtype}")
    if exact:
        return psi
    cos = torch.cos(theta)
    return psi + cos - cos.detach()
