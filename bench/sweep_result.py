"""What a sweep found, and its JSON. Seconds and bytes throughout."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from typing import Any

from bench.cases import Case
from bench.measure import Spread
from bench.peers import baseline
from bench.result import Gate

KIND, SCHEMA = "sweep", 1
"""What the JSON says it is, and the version of its fields."""
AXES = ("classes", "rows", "features")
# Reasons why a point has no number.
NO_TIME = "no time was left"
OUT_OF_MEMORY = "it ran out of memory"
NOT_RIGHT = "it did not pass the gate"


@dataclass(frozen=True)
class Point:
    """One peer at one case, in its own terms; what is missing has a reason."""

    peer: str
    label: str
    case: Case
    seconds: tuple[float, ...] = ()
    """Of each round."""
    extra_bytes: int | None = None
    """Peak memory of a step beside inputs and gradients: the median of its samples."""
    memory_samples: tuple[int, ...] = ()
    """In bytes, of each round."""
    apart: bool = False
    """Timed by itself: beside what the others keep between their steps there was no room for it."""
    needs_bytes: int | None = None
    """What it would need in all, where that is more than there is."""
    reason: str | None = None
    """Why it was not tried, or its memory was not."""
    error: str | None = None
    roofline_seconds: float | None = None
    """The least time that the card could take, for ours on a card whose rates are known."""

    def with_memory(self, sample: int) -> Point:
        """With one sample of its memory more, in bytes."""
        samples = (*self.memory_samples, sample)
        return dataclasses.replace(self, memory_samples=samples, extra_bytes=statistics.median_low(samples))

    @property
    def spread(self) -> Spread | None:
        return Spread.of(self.seconds) if self.seconds else None

    @property
    def median(self) -> float | None:
        return Spread.of(self.seconds).median if self.seconds else None


@dataclass(frozen=True)
class Axis:
    """A line of cases: `varies` (of AXES) takes several values, the rest is as in `case`."""

    varies: str
    case: Case

    def at(self, value: int, *, backward: bool) -> Case:
        changes: dict[str, Any] = {self.varies: value, "backward": backward}
        return dataclasses.replace(self.case, **changes)


@dataclass(frozen=True)
class Sweep:
    """All points, in the order in which they were measured."""

    axes: tuple[Axis, ...]
    gates: tuple[Gate, ...]
    points: tuple[Point, ...]
    machine: dict[str, Any]
    command: str
    date: str
    budget_seconds: float
    took_seconds: float
    complete: bool
    """False where it was stopped before its end."""

    @property
    def ok(self) -> bool:
        """All peers were right, and what was tried went through."""
        return all(gate.passed for gate in self.gates) and not any(point.error for point in self.points)

    def at(self, case: Case) -> dict[str, Point]:
        """Points of this shape and direction, by peer; each in its own terms."""
        return {point.peer: point for point in self.points if _same_shape(point.case, case)}

    def values(self, axis: Axis) -> list[int]:
        """Of the axis, sorted: those that have a point."""
        found = {getattr(point.case, axis.varies) for point in self.points}
        return sorted(v for v in found if any(self.at(axis.at(v, backward=b)) for b in (True, False)))

    def line(self, axis: Axis, peer: str, *, backward: bool) -> list[tuple[int, Point]]:
        """(value, point) of the peer along the axis."""
        found = ((v, self.at(axis.at(v, backward=backward)).get(peer)) for v in self.values(axis))
        return [(value, point) for value, point in found if point is not None]

    def ratio(self, point: Point) -> float | None:
        """How many times as fast as its baseline at the same shape; None where one of them has no time."""
        base = self.at(point.case).get(baseline(point.peer))
        if base is None or base.median is None or point.median is None:
            return None
        return base.median / point.median

    def to_json(self) -> str:
        """The fields, and for readers without this code each point's median and quartiles."""
        fields = dataclasses.asdict(self)
        for entry, point in zip(fields["points"], self.points, strict=True):
            entry["summary"] = None if point.spread is None else dataclasses.asdict(point.spread)
        return json.dumps({"kind": KIND, "schema": SCHEMA, **fields}, indent=1) + "\n"

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Sweep:
        """From the JSON's object; ValueError for another schema."""
        found = data.get("kind"), data.get("schema")
        if found != (KIND, SCHEMA):
            raise ValueError(f"schema: expected {KIND} {SCHEMA}, got {found[0]} {found[1]!r}")
        names = [field.name for field in dataclasses.fields(cls)]
        fields = {name: data[name] for name in names}
        fields["axes"] = tuple(Axis(axis["varies"], Case(**axis["case"])) for axis in data["axes"])
        fields["gates"] = tuple(Gate(**(gate | {"errors": tuple(gate["errors"])})) for gate in data["gates"])
        fields["points"] = tuple(_point(entry) for entry in data["points"])
        return cls(**fields)


def _point(entry: dict[str, Any]) -> Point:
    fields = {name: value for name, value in entry.items() if name != "summary"}
    fields["case"] = Case(**entry["case"])
    for samples in ("seconds", "memory_samples"):
        fields[samples] = tuple(entry.get(samples, ()))
    return Point(**fields)


def _same_shape(a: Case, b: Case) -> bool:
    return _shape(a) == _shape(b)


def _shape(case: Case) -> tuple[object, ...]:
    """What all peers of a stop have in common; the rest may be in their own terms."""
    return case.rows, case.classes, case.features, case.dtype, case.backward
