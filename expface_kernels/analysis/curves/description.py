"""A margin in a few numbers: where psi falls, where it penalises most, where its exact gradient goes weak.

theta, angles: radians · grid (N,) angles 1/20 of a degree apart · r the pull, docs/math.md section 4
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expface_kernels.analysis.curves import functions, search
from expface_kernels.checks import check_margin
from expface_kernels.margins import MarginFunction

POINTS = 3601
# Coarse enough for a margin that computes in float32.
JUMP = 1e-6  # of psi, between neighbouring floats
NO_EXCESS = 1e-6  # of r·sin θ over sin θ
UNIFORM = 1e-6  # penalties that differ by less are the same: ExpFace's floor alone makes 1e-7
NO_SLOPE = 1e-12
VANISHES = 1e-9  # a slope that comes this near 0 without changing sign
NOTICEABLE = 1e-9  # a difference between neighbouring penalties
GROWS = 1e-8  # a derivative of a penalty

Curve = Callable[[MarginFunction, Tensor], Tensor]


class Interval(NamedTuple):
    """From `start` to `end`, radians."""

    start: float
    end: float


class Peak(NamedTuple):
    """The largest penalty, and the first and last angle of the stretch that has it; mostly one angle."""

    size: float
    start: float
    end: float


class Jump(NamedTuple):
    """psi changes by `size` at `angle`."""

    angle: float
    size: float


@dataclasses.dataclass(frozen=True)
class Description:
    """What `describe` finds; all angles in radians."""

    margin: str
    """What it is called: a function's name, else its repr."""
    falls: tuple[Interval, ...]
    """Where psi strictly decreases: the domain of monotonicity. One interval (0, π) is what one wants."""
    rises: tuple[Interval, ...]
    """Where psi increases: there the exact gradient pushes rows away from their own centre."""
    jumps: tuple[Jump, ...]
    """Where psi is not continuous."""
    cosine_peak: Peak
    """The largest cos θ − psi, cosine units."""
    angular_peak: Peak
    """The largest φ − θ, radians, φ the angle as which the row is treated."""
    weak: tuple[Interval, ...]
    """Where the exact slope is below the push of the other classes: r < 1."""
    turns: tuple[float, ...]
    """Where the exact slope changes sign."""
    vanishes: tuple[float, ...]
    """Where the exact slope is 0 and does not change sign, strictly inside (0, π)."""

    @property
    def monotonic(self) -> bool:
        """psi strictly decreases on all of (0, π)."""
        return self.falls == (Interval(0.0, math.pi),)

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and dicts, as JSON takes them; radians."""
        return {
            "margin": self.margin,
            "monotonic": self.monotonic,
            "falls": [list(interval) for interval in self.falls],
            "rises": [list(interval) for interval in self.rises],
            "jumps": [jump._asdict() for jump in self.jumps],
            "cosine_peak": self.cosine_peak._asdict(),
            "angular_peak": self.angular_peak._asdict(),
            "weak": [list(interval) for interval in self.weak],
            "turns": list(self.turns),
            "vanishes": list(self.vanishes),
        }


def describe(margin: MarginFunction) -> Description:
    """Look at `margin` on a grid of 1/20 of a degree, and find to float64 precision what happens between.

    What begins and ends within 1/20 of a degree is not seen. Takes some tenths of a second and a few MB.
    Raises TypeError or ValueError for what is no margin, or not finite (psi on [0, π], its slope on (0, π)).
    """
    check_margin(margin)
    grid = torch.linspace(0, math.pi, POINTS, dtype=torch.float64, device="cpu")
    grid[-1] = math.pi
    jumps = _jumps(margin, grid)
    sides = [side for low, high, _ in jumps for side in (low, high)]
    grid = torch.unique(torch.cat([grid, grid.new_tensor(sides)]))
    falls, rises, turns = _monotonicity(margin, grid, jumps)
    return Description(
        margin=functions.label(margin),
        falls=falls,
        rises=rises,
        jumps=tuple(Jump(high, size) for _, high, size in jumps),
        cosine_peak=_peak(grid, functions.cosine_penalty, _cosine_growth, margin),
        angular_peak=_peak(grid, functions.angular_penalty, _angular_growth, margin),
        weak=_weak(margin, grid),
        turns=turns,
        vanishes=_vanishes(margin, grid, turns),
    )


def _jumps(margin: MarginFunction, grid: Tensor) -> list[tuple[float, float, float]]:
    """(last angle before, first angle after, change of psi) of each jump."""

    def psi(theta: Tensor) -> Tensor:
        return functions.similarity(margin, theta)

    low, high = search.steepest(psi, grid[:-1], grid[1:])
    size = psi(high) - psi(low)
    there = size.abs() > JUMP
    return list(zip(*(values[there].tolist() for values in (low, high, size)), strict=True))


def _signs(value: search.Function, grid: Tensor, nothing: float) -> list[tuple[int, float, float]]:
    """(sign, from, to) of the stretches of `value` over (0, π); up to `nothing` it counts as 0."""
    inner = grid[1:-1]
    values = value(inner)
    zero = values.abs() <= nothing
    zero[1:-1] &= zero[:-2] | zero[2:]  # what only touches 0 is no stretch of it
    known = zero | (values.abs() > nothing)
    states = torch.where(zero, 0, torch.sign(values))
    return search.stretches(inner[known], states[known], lambda theta: torch.sign(value(theta)), 0.0, math.pi)


def _monotonicity(
    margin: MarginFunction, grid: Tensor, jumps: list[tuple[float, float, float]]
) -> tuple[tuple[Interval, ...], tuple[Interval, ...], tuple[float, ...]]:
    """(falls, rises, turns): from the sign of the slope, and the jumps that go against it."""
    infinite = ~torch.isfinite(functions.slope(margin, grid[1:-1]))
    if infinite.any():
        at = float(grid[1:-1][infinite][0])
        raise ValueError(f"margin: expected a finite slope of psi on (0, π), got none at theta = {at:.6g}")
    found = _signs(lambda theta: functions.slope(margin, theta), grid, NO_SLOPE)
    pieces: dict[int, list[Interval]] = {-1: [], 0: [], 1: []}
    for sign, start, end in found:
        against = [low for low, _, size in jumps if size * sign < 0 and start < low < end]
        bounds = zip([start, *against], [*against, end], strict=True)
        pieces[sign].extend(Interval(*bound) for bound in bounds)
    turns = tuple(end for (sign, _, end), (after, _, _) in itertools.pairwise(found) if sign * after < 0)
    return tuple(pieces[-1]), tuple(pieces[1]), turns


def _weak(margin: MarginFunction, grid: Tensor) -> tuple[Interval, ...]:
    """Where r < 1."""
    # (r − 1)·sin θ: unlike r itself it is as exact near 0 and π as elsewhere.
    found = _signs(lambda theta: _cosine_growth(margin, theta), grid, NO_EXCESS)
    return tuple(Interval(start, end) for sign, start, end in found if sign < 0)


def _vanishes(margin: MarginFunction, grid: Tensor, turns: tuple[float, ...]) -> tuple[float, ...]:
    """Where the slope touches 0."""

    def size(theta: Tensor) -> Tensor:
        return functions.slope(margin, theta).abs()

    inner = grid[1:-1]
    sizes = size(inner)
    least = 1 + torch.nonzero((sizes[1:-1] <= sizes[:-2]) & (sizes[1:-1] < sizes[2:]))[:, 0]
    if not len(least):
        return ()
    at = search.minimum(size, inner[least - 1], inner[least + 1])
    at = at[size(at) < VANISHES]
    step = math.pi / (POINTS - 1)
    return tuple(angle for angle in at.tolist() if all(abs(angle - turn) > step for turn in turns))


def _cosine_growth(margin: MarginFunction, theta: Tensor) -> Tensor:
    """Derivative of the cosine penalty, sin θ·(r − 1)."""
    return -torch.sin(theta) - functions.slope(margin, theta)


def _angular_growth(margin: MarginFunction, theta: Tensor) -> Tensor:
    """Derivative of the angular penalty; not finite where psi is 1 less a whole multiple of 2."""
    return -functions.slope(margin, theta) / torch.sin(functions.effective_angle(margin, theta)).abs() - 1


def _peak(grid: Tensor, penalty: Curve, growth: Curve, margin: MarginFunction) -> Peak:
    """The largest penalty: where its growth ends, or the stretch of the grid that has it."""
    sizes = penalty(margin, grid)
    first = last = int(sizes.argmax())
    size = float(sizes[first])
    if size - float(sizes.min()) < UNIFORM:
        return Peak(size, 0.0, math.pi)
    if 0 < first < len(grid) - 1:
        low, high = grid[first - 1 : first], grid[first + 1 : first + 2]
        if growth(margin, low) > GROWS and growth(margin, high) < -GROWS:
            top, _ = search.bisect(lambda theta: growth(margin, theta) > 0, low, high)
            return Peak(float(penalty(margin, top)), float(top), float(top))
    as_large = sizes >= size - NOTICEABLE
    while first > 0 and as_large[first - 1]:
        first -= 1
    while last < len(grid) - 1 and as_large[last + 1]:
        last += 1
    return Peak(size, float(grid[first]), float(grid[last]))
