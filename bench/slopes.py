"""How seconds and extra memory grow with the number of classes."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from bench.sweep_result import Axis, Sweep

FROM, TO = 100_000, 4_000_000
"""The classes between which growth is judged."""
FLAT_PEER = "ours@0"
"""The peer whose memory is claimed not to grow: ours without a workspace."""


@dataclass(frozen=True)
class Slopes:
    """A power of C by least squares of the logarithms: 1 is linear, 0 is flat; and what a class adds."""

    peer: str
    backward: bool
    first: int
    last: int
    """Classes."""
    seconds_exponent: float
    memory_exponent: float | None
    bytes_a_class: float | None
    """Extra memory of the last point less the first's, over the classes between."""


def rounded(value: float, digits: int) -> str:
    """Without the minus that a small number's 0 would have."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def exponent(values: list[tuple[int, float]]) -> float:
    """Slope of log y over log x."""
    logs = [math.log(x) for x, _ in values], [math.log(y) for _, y in values]
    return statistics.linear_regression(*logs).slope


def slopes(sweep: Sweep, axis: Axis, peer: str, *, backward: bool) -> Slopes | None:
    """Of the peer along the classes from FROM to TO, or all if none are there; None below two points.

    Memory's growth is known only where it was measured at the first and the last of them.
    """
    line = sweep.line(axis, peer, backward=backward)
    timed = [(c, p.median) for c, p in line if p.median is not None]
    within = [(c, y) for c, y in timed if FROM <= c <= TO]
    timed = within if len(within) > 1 else timed
    if len(timed) < 2:
        return None
    first, last = timed[0][0], timed[-1][0]
    held = [(c, p.extra_bytes) for c, p in line if first <= c <= last and p.extra_bytes is not None]
    known = {first, last} <= {c for c, _ in held} and all(y > 0 for _, y in held)
    return Slopes(
        peer=peer,
        backward=backward,
        first=first,
        last=last,
        seconds_exponent=exponent(timed),
        memory_exponent=exponent([(c, float(y)) for c, y in held]) if known else None,
        bytes_a_class=(held[-1][1] - held[0][1]) / (held[-1][0] - held[0][0]) if known else None,
    )
