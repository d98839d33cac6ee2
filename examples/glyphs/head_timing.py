"""One step of the same loss head, fused and eager, at many classes: seconds and extra memory, by `bench`.

B rows, C classes, D features. The heads take turns, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from statistics import median

from bench import memory, peers
from bench.cases import Case
from bench.measure import WARM_UPS, run_step, time_run

# What the demo calls them: what bench does.
KINDS = {"fused": "ours", "eager": "eager"}


@dataclass(frozen=True)
class Size:
    """A problem size; `rounds` is how many steps of each head are timed."""

    rows: int = 256
    classes: int = 100_000
    features: int = 512
    rounds: int = 5

    @property
    def case(self) -> Case:
        """ExpFace at the demo's scale and target gradient."""
        return Case(self.rows, self.classes, self.features, scale=32.0, target_gradient="detached")

    @property
    def weight_bytes(self) -> int:
        """Of the centres, and of their gradient, in float32."""
        return self.classes * self.features * 4


@dataclass(frozen=True)
class HeadCost:
    """Timed steps in seconds, median and all; peak memory that a step adds, the gradients apart."""

    seconds: float
    all_seconds: tuple[float, ...]
    extra_bytes: int | None


def measure(size: Size) -> dict[str, HeadCost]:
    """Both heads by name: first the memory of each, then turns of timed steps."""
    held = {
        kind: None if memory.unavailable() else memory.extra_bytes(name, size.case)
        for kind, name in KINDS.items()
    }
    inputs = size.case.inputs()
    steps = {kind: peers.get(name).step(inputs) for kind, name in KINDS.items()}
    for step in steps.values():
        for _ in range(WARM_UPS):
            run_step(step, inputs)
    seconds = time_run(steps, inputs, size.rounds)
    return {kind: HeadCost(median(seconds[kind]), tuple(seconds[kind]), held[kind]) for kind in KINDS}


def as_fields(costs: dict[str, HeadCost]) -> dict[str, dict[str, object]]:
    """For JSON."""
    return {kind: dataclasses.asdict(cost) for kind, cost in costs.items()}
