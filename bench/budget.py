"""Time that may be spent: shared out among what is to be measured, and known before it is spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Clock = Callable[[], float]
CLOCK: Clock = time.perf_counter


class Budget:
    """So many seconds from now on."""

    def __init__(self, seconds: float, clock: Clock = CLOCK) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        """Seconds; below 0 where more were spent."""
        return self._end - self._clock()

    def share(self, weight: float, weight_left: float) -> Budget:
        """A part of what is left: `weight` of the `weight_left` that it has to last for."""
        return Budget(self.left * weight / weight_left, self._clock)


def rounds_within(step_seconds: Mapping[str, float], seconds: float, most: int) -> dict[str, int]:
    """How often each may step, at least once: what the fast leave of their even shares goes to the slow."""
    found: dict[str, int] = {}
    for name in sorted(step_seconds, key=lambda name: step_seconds[name]):
        one = step_seconds[name]
        share = seconds / (len(step_seconds) - len(found))
        found[name] = max(1, int(min(most, share / one)) if one else most)
        seconds -= found[name] * one
    return found


@dataclass
class Cost:
    """What one thing has taken so far: seconds once, and for each FLOP of a step."""

    once: float
    per_flop: float


class Costs:
    """Learns what steps take, to tell what larger ones will: a step's time grows with its FLOPs."""

    def __init__(self) -> None:
        self._known: dict[object, Cost] = {}

    def learn(self, key: object, flops: int, step_seconds: float, once: float = 0.0) -> None:
        """The last measurement counts for a FLOP's time, the longest for what comes once."""
        longest = max(once, self._known[key].once) if key in self._known else once
        self._known[key] = Cost(max(longest, 0.0), step_seconds / flops)

    def step(self, key: object, flops: int) -> float:
        """Seconds that a step of so many FLOPs will take; what is not known counts as the slowest that is."""
        if key in self._known:
            return self._known[key].per_flop * flops
        return max((cost.per_flop for cost in self._known.values()), default=0.0) * flops

    def once(self, key: object) -> float:
        """Seconds before the first step."""
        return self._known[key].once if key in self._known else 0.0
