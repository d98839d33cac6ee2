"""A sweep over shapes within a time budget: gate first, then shape by shape seconds and memory of each peer.

The smallest shape comes first. What its steps took tells what larger ones will take, so that a peer which
would not end in time is left out, with its reason, instead of breaking the budget.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from bench import machine, memory, peers
from bench.budget import CLOCK, Budget, Clock, Costs, rounds_within
from bench.cases import Case, Inputs
from bench.gate import check_all, gate_case, odd_ones_out, tiled_case
from bench.measure import Step, run_step, time_run
from bench.peers.base import in_a_line, memory_reason, terms
from bench.peers.ours import Ours
from bench.result import Gate
from bench.show import Progress
from bench.sweep_result import NO_TIME, NOT_RIGHT, OUT_OF_MEMORY, Axis, Point, Sweep
from expface_kernels.backends import workspace

# Of a shape's time: for the forward's rounds, both directions' rounds, and memory.
FORWARD_WEIGHT, BACKWARD_WEIGHT, MEMORY_WEIGHT = 2.0, 4.0, 4.0
# A first step shorter than this part of what is left is followed by another to warm up.
SHORT = 1 / 40
# Of the time that follows FLOPs, what is shared out evenly as well: starting processes, compiling.
EVEN = 2 / 3
# Resident memory is measured this often where time is left: one sample may be some MB off.
MEMORY_ROUNDS = 3


@dataclass(frozen=True)
class Stop:
    """A shape, and the peers that are measured there."""

    case: Case
    peers: tuple[str, ...]

    @property
    def weight(self) -> float:
        """FLOPs of the peers that may run."""
        able = [
            name for name in self.peers if peers.get(name).why_not(terms(peers.get(name), self.case)) is None
        ]
        return float(self.case.flops * max(len(able), 1))


@dataclass(frozen=True)
class Plan:
    """What to measure. `directions` holds False for forwards alone, True for forward and backward."""

    stops: tuple[Stop, ...]
    axes: tuple[Axis, ...]
    directions: tuple[bool, ...]
    rounds: int
    seconds: float
    """The budget of all, in seconds."""
    command: str

    @property
    def peers(self) -> list[str]:
        """All that are measured somewhere, once each."""
        return list(dict.fromkeys(name for stop in self.stops for name in stop.peers))


@dataclass
class Run:
    """A sweep under way. `save` is given what there is after each shape."""

    plan: Plan
    progress: Progress
    save: Callable[[Sweep], None] = lambda sweep: None
    clock: Clock = CLOCK
    costs: Costs = field(default_factory=Costs)
    gates: tuple[Gate, ...] = ()
    points: list[Point] = field(default_factory=list)

    def run(self) -> Sweep:
        """The whole sweep, or what there was when it was interrupted from the keyboard."""
        self._machine = machine.describe(self.plan.stops[0].case.device)
        self._start = self.clock()
        self._date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self._whole = Budget(self.plan.seconds, self.clock)
        try:
            self._gate()
            self._stops()
        except KeyboardInterrupt:
            return self._found(complete=False)
        return self._found(complete=True)

    def _found(self, *, complete: bool) -> Sweep:
        return Sweep(
            axes=self.plan.axes,
            gates=self.gates,
            points=tuple(self.points),
            machine=self._machine,
            command=self.plan.command,
            date=self._date,
            budget_seconds=self.plan.seconds,
            took_seconds=self.clock() - self._start,
            complete=complete,
        )

    def _gate(self) -> None:
        by_dtype: dict[str, list[Case]] = {}
        for stop in self.plan.stops:
            by_dtype.setdefault(stop.case.dtype, []).append(stop.case)
        advance = self.progress.task("gate", len(self.plan.peers) * len(by_dtype) * len(self.plan.directions))
        for cases in by_dtype.values():
            case, largest = gate_case(cases[0]), max(cases, key=lambda case: case.classes)
            able = [
                name
                for name in self.plan.peers
                if peers.get(name).cannot(terms(peers.get(name), case)) is None
            ]
            for backward in self.plan.directions:
                small = dataclasses.replace(case, backward=backward)
                tiled = tiled_case(dataclasses.replace(largest, backward=backward))
                self.gates += check_all(able, small, lambda: advance(1), tiled=tiled)
                advance(len(self.plan.peers) - len(able))

    def _stops(self) -> None:
        weights = parts(self.plan.stops)
        advance = self.progress.task("sweep", sum(weights))
        for i, stop in enumerate(self.plan.stops):
            case = stop.case
            self.progress.note(
                f"shape {i + 1} of {len(weights)}: B={case.rows:,}, C={case.classes:,}, D={case.features:,}, "
                f"{case.dtype}; "
                f"{self._whole.left:.0f} s of {self.plan.seconds:.0f} s left"
            )
            self.points += self._stop(stop, self._whole.share(weights[i], sum(weights[i:])))
            advance(weights[i])
            self.save(self._found(complete=False))

    def _stop(self, stop: Stop, budget: Budget) -> list[Point]:
        """A point of each peer and direction."""
        points: list[Point] = []
        weight_left = MEMORY_WEIGHT + sum(map(_weight, self.plan.directions))
        asked = [self._asked(stop, backward) for backward in self.plan.directions]
        able = [[point for point in some if point.reason is None and not point.error] for some in asked]
        inputs = stop.case.inputs() if any(able) else None
        for some, backward in zip(asked, self.plan.directions, strict=True):
            share = budget.share(_weight(backward), weight_left)
            weight_left -= _weight(backward)
            points += some if inputs is None else self._timed_in_groups(some, inputs, share)
        del inputs
        _give_back(stop.case.device)
        return self._weighed(points, stop.case, budget)

    def _asked(self, stop: Stop, backward: bool) -> list[Point]:
        """Every peer's point, with a reason where it cannot run this shape."""
        _give_back(stop.case.device)
        case = dataclasses.replace(stop.case, backward=backward)
        kind = (case.dtype, backward)
        right = {gate.peer for gate in self.gates if gate.passed and (gate.dtype, gate.backward) == kind}
        points = []
        for name in stop.peers:
            peer = peers.get(name)
            own = terms(peer, case)
            point = Point(name, peer.label(own), own, reason=peer.cannot(own))
            if point.reason is None and name not in right:
                point = dataclasses.replace(point, reason=NOT_RIGHT)
            if point.reason is None:
                needed = peer.needed_bytes(own)
                beside = needed + held_by_others(name, stop.peers, case)
                if (reason := memory_reason(needed, case.device)) is not None:
                    point = dataclasses.replace(point, reason=reason, needs_bytes=needed)
                elif memory_reason(beside, case.device) is not None:
                    point = dataclasses.replace(point, apart=True)
            points.append(point)
        return points

    def _timed_in_groups(self, points: list[Point], inputs: Inputs, budget: Budget) -> list[Point]:
        """All in turns that have room beside one another; then, of each that has none, its rounds alone."""
        groups = [[p for p in points if not p.apart], *([p] for p in points if p.apart)]
        rounds = [sum(self._step_seconds(p) for p in group if p.reason is None) for group in groups]
        found: dict[str, Point] = {}
        for i, group in enumerate(groups):
            share = budget.share(rounds[i], sum(rounds[i:])) if rounds[i] else budget
            found |= {point.peer: point for point in self._timed(group, inputs, share)}
            if len(groups) > 1:
                _give_back(inputs.case.device)
        return [found[point.peer] for point in points]

    def _timed(self, points: list[Point], inputs: Inputs, budget: Budget) -> list[Point]:
        """The points with seconds; what would not end within the budget, or fails, says so."""
        found = {point.peer: point for point in points}
        steps = self._steps(found, inputs, budget)
        a_round = sum(self._step_seconds(found[name]) for name in steps)
        # Compiling and whatever was not known may have used up this shape's time. One round may take some of
        # the other shapes', but not most of it.
        for name in reversed(list(steps)):
            if a_round > max(budget.left, self._whole.left / 2):
                a_round -= self._step_seconds(found[name])
                del steps[name]
                found[name] = dataclasses.replace(found[name], reason=NO_TIME)
        if steps:
            inputs = inputs.of(next(found[name].case for name in steps))

            def failed(name: str, error: Exception) -> None:
                found[name] = _failed(found[name], error)

            once = {name: self._step_seconds(found[name]) for name in steps}
            seconds = time_run(
                steps,
                inputs,
                rounds_within(once, budget.left, self.plan.rounds),
                go_on=lambda name: budget.left > once[name],
                clock=self.clock,
                failed=failed,
            )
            for name, values in seconds.items():
                found[name] = dataclasses.replace(found[name], seconds=tuple(values))
        inputs.drop_gradients()
        return list(found.values())

    def _steps(self, found: dict[str, Point], inputs: Inputs, budget: Budget) -> dict[str, Step]:
        """Steps that have warmed up, with time left for a round of them; `found` gets the others' reasons."""
        steps: dict[str, Step] = {}
        losses: dict[str, float] = {}
        a_round = 0.0
        for name, point in found.items():
            if point.reason is not None:
                continue
            one = self._step_seconds(point)
            if a_round + self.costs.once(_key(point)) + 2 * one > budget.left:
                reason = f"{NO_TIME} for a step of about {one:.1g} s" if one else NO_TIME
                found[name] = dataclasses.replace(point, reason=reason)
                continue
            try:
                steps[name], losses[name] = self._warmed_up(point, inputs.of(point.case), budget)
            except Exception as error:  # a peer may raise anything; the others go on
                found[name] = _failed(point, error)
                continue
            a_round += self._step_seconds(point)
        for name, text in odd_ones_out(
            {name: (found[name].case, loss) for name, loss in losses.items()}
        ).items():
            found[name] = dataclasses.replace(found[name], error=text)
            del steps[name]
        return steps

    def _step_seconds(self, point: Point) -> float:
        return self.costs.step(_key(point), point.case.flops)

    def _warmed_up(self, point: Point, inputs: Inputs, budget: Budget) -> tuple[Step, float]:
        """A step that has run once or twice, and its loss; what it took is learnt."""
        start = self.clock()
        step = peers.get(point.peer).step(inputs)
        loss = run_step(step, inputs)
        first = last = self.clock() - start
        if peers.get(point.peer).compiles or first < SHORT * budget.left:
            start = self.clock()
            run_step(step, inputs)
            last = self.clock() - start
        once = first - last if peers.get(point.peer).compiles else 0.0
        self.costs.learn(_key(point), point.case.flops, last, once)
        return step, loss

    def _weighed(self, points: list[Point], case: Case, budget: Budget) -> list[Point]:
        """The points with memory, and their roofline, where they have seconds."""
        if (reason := memory.unavailable(case.device)) is not None:
            return [_noted(point, reason) for point in points]
        names = list(dict.fromkeys(point.peer for point in points if point.seconds))
        # Forwards alone come last, where time is short.
        order = sorted(range(len(points)), key=lambda i: not points[i].case.backward)
        points = list(points)
        with memory.Meter(case, names) as meter:
            # torch's allocator counts exactly, resident memory does not.
            for _ in range(1 if case.device == "cuda" else MEMORY_ROUNDS):
                for i in order:
                    points[i] = self._with_memory(points[i], meter, budget)
        return points

    def _with_memory(self, point: Point, meter: memory.Meter, budget: Budget) -> Point:
        if not point.seconds or point.error:
            return point
        point = dataclasses.replace(point, roofline_seconds=self._roofline(point))
        key = (*_key(point), "memory")
        steps = memory.STEPS + peers.get(point.peer).compiles
        step_seconds = max(point.seconds)
        if self.costs.once(key) + steps * step_seconds > budget.left:
            return point if point.memory_samples else _noted(point, f"its memory: {NO_TIME}")
        start = self.clock()
        try:
            point = point.with_memory(meter.extra_bytes(point.peer, point.case))
        except Exception as error:  # as above
            point = _failed(point, error)
        once = self.clock() - start - steps * step_seconds
        self.costs.learn(key, point.case.flops, step_seconds, once)
        return point

    def _roofline(self, point: Point) -> float | None:
        peer = peers.get(point.peer)
        if point.case.device != "cuda" or not isinstance(peer, Ours) or not point.case.backward:
            return None
        from bench import roofline  # needs Triton, which not every system has

        return roofline.seconds(point.case, peer.workspace_bytes, self._machine["gpu"]["card"])


def _give_back(device: str) -> None:
    """Memory that nobody uses, so that what is free is what the next peer can have."""
    if device == "cuda":
        torch.cuda.empty_cache()
    else:
        workspace.clear()


def parts(stops: Sequence[Stop]) -> list[float]:
    """Of each shape, its part of the time: by its FLOPs, and for what does not depend on them an even one."""
    whole = sum(stop.weight for stop in stops)
    return [stop.weight / whole + EVEN / len(stops) for stop in stops]


def held_by_others(name: str, names: tuple[str, ...], case: Case) -> int:
    """Bytes that other peers at this shape keep between their steps. All of ours share what they keep."""
    ours, others = 0, 0
    for other in names:
        peer = peers.get(other)
        own = terms(peer, case)
        if other == name or peer.why_not(own) is not None:
            continue
        if isinstance(peer, Ours):
            ours = max(ours, peer.held_bytes(own))
        else:
            others += peer.held_bytes(own)
    return others + (0 if isinstance(peers.get(name), Ours) else ours)


def _key(point: Point) -> tuple[str, bool]:
    """What its costs are known by."""
    return point.peer, point.case.backward


def _weight(backward: bool) -> float:
    return BACKWARD_WEIGHT if backward else FORWARD_WEIGHT


def _noted(point: Point, reason: str) -> Point:
    return point if point.reason is not None else dataclasses.replace(point, reason=reason)


def _failed(point: Point, error: Exception) -> Point:
    """Out of memory is a reason, anything else an error."""
    text = in_a_line(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        if point.case.device == "cuda":
            torch.cuda.empty_cache()
        return dataclasses.replace(point, reason=OUT_OF_MEMORY)
    return dataclasses.replace(point, error=text)
