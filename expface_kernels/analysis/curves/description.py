"""A margin in a few numbers: where psi falls, where it penalizes most, where its exact gradient goes weak.

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

from expface_kernels.analysis.curves import functions
from expface_kernels.checks import check_margin
from expface_kernels.margins import MarginFunction

POINTS = 3601
HALVINGS = 32
"""From 1/20 of a degree to 1e-13 radians."""
NOTHING = 1e-6
"""Jumps, differences of penalties and of pulls up to here are rounding: a margin may compute in float32."""
FLAT = 1e-9
"""Slopes, and differences of neighboring penalties, up to here count as none."""

Function = Callable[[Tensor], Tensor]
"""Maps (N,) angles to (N,) values."""


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
    """Sample `margin` at angles 1/20 of a degree apart, and refine what happens between two of them.

    What begins and ends within 1/20 of a degree is not seen. Takes some tenths of a second and a few MB.
    Raises TypeError or ValueError for what is no margin, or not finite (psi on [0, π], its slope on (0, π)).
    """
    check_margin(margin)

    def psi(theta: Tensor) -> Tensor:
        return functions.similarity(margin, theta)

    def slope(theta: Tensor) -> Tensor:
        return functions.slope(margin, theta)

    def excess(theta: Tensor) -> Tensor:
        """Return (r − 1)·sin θ, which unlike r itself is as exact near 0 and π as elsewhere."""
        return -torch.sin(theta) - slope(theta)

    grid = torch.linspace(0, math.pi, POINTS, dtype=torch.float64, device="cpu").clamp_max(math.pi)
    before, after, jumps = _jumps(psi, grid)
    grid = torch.unique(torch.cat([grid, before, after]))
    infinite = ~torch.isfinite(slope(grid[1:-1]))
    if infinite.any():
        at = float(grid[1:-1][infinite][0])
        raise ValueError(f"margin: expected a finite slope of psi on (0, π), got none at theta = {at:.6g}")
    signs = _signs(slope, grid, FLAT)
    turns = tuple(end for (sign, (_, end)), (other, _) in itertools.pairwise(signs) if sign * other < 0)
    return Description(
        margin=functions.label(margin),
        falls=_monotonic(signs, -1, jumps),
        rises=_monotonic(signs, 1, jumps),
        jumps=jumps,
        cosine_peak=_peak(lambda theta: functions.cosine_penalty(margin, theta), grid),
        angular_peak=_peak(lambda theta: functions.angular_penalty(margin, theta), grid),
        weak=tuple(interval for sign, interval in _signs(excess, grid, NOTHING) if sign < 0),
        turns=turns,
        vanishes=_touches(slope, grid, turns),
    )


def _jumps(psi: Function, grid: Tensor) -> tuple[Tensor, Tensor, tuple[Jump, ...]]:
    """Return the angles just before and just after each jump, and the jumps.

    Of each halving the half is kept over which psi changes more.
    """
    low, high = grid[:-1], grid[1:]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        left = (psi(middle) - psi(low)).abs() >= (psi(high) - psi(middle)).abs()
        low, high = torch.where(left, low, middle), torch.where(left, middle, high)
    size = psi(high) - psi(low)
    there = size.abs() > NOTHING
    low, high, size = low[there], high[there], size[there]
    return low, high, tuple(itertools.starmap(Jump, zip(high.tolist(), size.tolist(), strict=True)))


def _signs(value: Function, grid: Tensor, nothing: float) -> list[tuple[int, Interval]]:
    """Return the stretches of one sign of `value` over (0, π); up to `nothing` it counts as 0."""
    inner = grid[1:-1]
    values = value(inner)
    signs = torch.where(values.abs() <= nothing, 0, torch.sign(values)).int()
    alone = (signs == 0) & (signs.roll(1) != 0) & (signs.roll(-1) != 0)  # only touches 0
    inner, signs = inner[~alone], signs[~alone]
    last = torch.nonzero(signs[1:] != signs[:-1])[:, 0]
    edges: list[float] = []
    if len(last):  # a function need not take an empty tensor
        low, high = inner[last], inner[last + 1]
        at_low = torch.sign(value(low))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            same = torch.sign(value(middle)) == at_low
            low, high = torch.where(same, middle, low), torch.where(same, high, middle)
        edges = ((low + high) / 2).tolist()
    bounds = itertools.pairwise([0.0, *edges, math.pi])
    kinds = [*signs[last].tolist(), int(signs[-1])]
    return [(sign, Interval(*bound)) for sign, bound in zip(kinds, bounds, strict=True)]


def _monotonic(signs: list[tuple[int, Interval]], sign: int, jumps: tuple[Jump, ...]) -> tuple[Interval, ...]:
    """Return the stretches whose slope has that sign, cut at the jumps that go against it."""
    found: list[Interval] = []
    for _, (start, end) in (stretch for stretch in signs if stretch[0] == sign):
        against = [jump.angle for jump in jumps if jump.size * sign < 0 and start < jump.angle < end]
        found.extend(Interval(*bound) for bound in itertools.pairwise([start, *against, end]))
    return tuple(found)


def _lowest(value: Function, low: Tensor, high: Tensor) -> Tensor:
    """Return where `value` is least between low and high, if it falls and then rises there."""
    for _ in range(2 * HALVINGS):  # two thirds are kept
        first, second = low + (high - low) / 3, high - (high - low) / 3
        left = value(first) < value(second)
        low, high = torch.where(left, low, first), torch.where(left, second, high)
    return (low + high) / 2


def _touches(slope: Function, grid: Tensor, turns: tuple[float, ...]) -> tuple[float, ...]:
    """Return where the slope comes to 0 without a change of sign."""
    sizes = slope(grid[1:-1]).abs()
    left, here, right = sizes[:-2], sizes[1:-1], sizes[2:]
    least = 2 + torch.nonzero((left > FLAT) & (here <= left) & (here < right))[:, 0]
    if not len(least):
        return ()
    at = _lowest(lambda theta: slope(theta).abs(), grid[least - 1], grid[least + 1])
    at = at[slope(at).abs() < FLAT]
    step = math.pi / (POINTS - 1)
    return tuple(angle for angle in at.tolist() if all(abs(angle - turn) > step for turn in turns))


def _peak(penalty: Function, grid: Tensor) -> Peak:
    """Return the largest penalty: one angle, or the stretch of the grid that has it."""
    sizes = penalty(grid)
    size, top = float(sizes.max()), int(sizes.argmax())
    if size - float(sizes.min()) < NOTHING:
        return Peak(size, 0.0, math.pi)
    smaller = torch.nonzero(sizes < size - FLAT)[:, 0]
    first = int(smaller[smaller < top].max()) + 1 if (smaller < top).any() else 0
    last = int(smaller[smaller > top].min()) - 1 if (smaller > top).any() else len(grid) - 1
    if first == last and 0 < top < len(grid) - 1:
        at = _lowest(lambda theta: -penalty(theta), grid[top - 1 : top], grid[top + 1 : top + 2])
        return Peak(float(penalty(at)), float(at), float(at))
    return Peak(size, float(grid[first]), float(grid[last]))
