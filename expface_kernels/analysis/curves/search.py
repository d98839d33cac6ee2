"""Where something happens to a function of the angle: bisection and its relatives, many places at once.

Functions map (N,) float64 angles to (N,) values, row by row. N places · low, high (N,) the ends of each
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

# Enough to come from a hundredth of a degree to neighbouring floats, at any angle above 1e-18.
HALVINGS = 60


def bisect(state_at: Function, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring floats (low, high) where the state (bool or whole numbers) stops being that at low."""
    at_low = state_at(low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        same = state_at(middle) == at_low
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    return low, high


def steepest(f: Function, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring floats found by keeping, of each halving, the half over which f changes more.

    Where f jumps they stand on both sides of the jump; elsewhere f hardly differs between them.
    """
    at_low, at_high = f(low), f(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        at_middle = f(middle)
        left = (at_middle - at_low).abs() >= (at_high - at_middle).abs()
        low, at_low = torch.where(left, low, middle), torch.where(left, at_low, at_middle)
        high, at_high = torch.where(left, middle, high), torch.where(left, at_middle, at_high)
    return low, high


def minimum(f: Function, low: Tensor, high: Tensor) -> Tensor:
    """Where f is least between low and high, if it falls and then rises there; kinks are welcome."""
    for _ in range(2 * HALVINGS):  # of two thirds
        first, second = low + (high - low) / 3, high - (high - low) / 3
        left = f(first) < f(second)
        low, high = torch.where(left, low, first), torch.where(left, second, high)
    return (low + high) / 2


def stretches(
    grid: Tensor, states: Tensor, state_at: Function, start: float, end: float
) -> list[tuple[int, float, float]]:
    """(state, from, to) of each stretch of one state from `start` to `end`, its edges found by bisection.

    states (N,) whole numbers on grid (N,), rising; `state_at` tells them at any angle between.
    """
    last = torch.nonzero(states[1:] != states[:-1])[:, 0]
    edges = []
    if len(last):  # a function need not take an empty tensor
        low, high = bisect(state_at, grid[last], grid[last + 1])
        edges = ((low + high) / 2).tolist()
    kinds = [*states[last].int().tolist(), int(states[-1])]
    return list(zip(kinds, [start, *edges], [*edges, end], strict=True))
