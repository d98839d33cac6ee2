"""Runs a plan: the gate first, then shape by shape the seconds and the memory of each peer.

Where there is a budget of seconds, each shape may take an even share of what is left; what a shape does not
use is there for those after it, so the smallest comes first. Half of a share is for memory.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch

from bench import memory, peers
from bench.cases import Case, Inputs
from bench.gate import check_all, disagreeing_losses, gate_case, inputs_for, tiled_case
from bench.measure import CLOCK, WARM_UPS, Clock, run_step, spinning, time_run
from bench.peers import supported_case
from bench.peers.base import Step, in_a_line, no_room
from bench.peers.heads import Ours
from bench.records import (
    BYTES,
    FAILED,
    MEASURED,
    NO_ROOM,
    NO_TIME,
    ROOFLINE,
    SECONDS,
    SKIPPED,
    UNAVAILABLE,
    WRONG,
    Measurement,
    Run,
    Writer,
)
from expface_kernels.backends import workspace

# Above this, where nothing is timed, heads that hold the logits of all classes are not measured: they take
# minutes of a CPU and 14 GB for one more point of a straight line.
LARGEST_WITH_LOGITS = 1_000_000


@dataclass(frozen=True)
class Shape:
    """Names a case and the peers that are measured there; memory alone where it is not timed."""

    case: Case
    peers: tuple[str, ...]
    timed: bool = True
    memory: bool = True


@dataclass(frozen=True)
class Plan:
    """Says what to measure: of each timed shape so many runs of so many rounds, within `seconds` in all."""

    shapes: tuple[Shape, ...]
    rounds: int
    runs: int = 1
    seconds: float = inf
    spin: bool = False


class Runner:
    """Carries out a plan and hands every record to the writer as soon as it is known."""

    def __init__(self, plan: Plan, writer: Writer, clock: Clock = CLOCK) -> None:
        self.plan, self.writer, self.clock = plan, writer, clock
        self._right: set[tuple[str, str, bool]] = set()
        # What was met at the last shape tells what the next will take.
        self._seconds_per_flop: dict[tuple[str, bool], float] = {}
        self._memory_seconds: dict[str, float] = {}

    def run(self) -> Run:
        """Measure everything; a KeyboardInterrupt leaves what there was in the writer."""
        start = self.clock()
        self._gate()
        for i, shape in enumerate(self.plan.shapes):
            left = start + self.plan.seconds - self.clock()
            share = left / (len(self.plan.shapes) - i)
            note(f"shape {i + 1} of {len(self.plan.shapes)}: {shape.case.describe()}")
            now = self.clock()
            rows = self._time(shape, now + share / 2) if shape.timed else {}
            if shape.memory:
                self._measure_memory(shape, rows, now + share)
        return self.writer.end(self.clock() - start)

    def _gate(self) -> None:
        """Check every peer once for each dtype and direction, at a small size of that kind."""
        kinds: dict[tuple[str, bool], list[Shape]] = {}
        for shape in self.plan.shapes:
            kinds.setdefault((shape.case.dtype, shape.case.backward), []).append(shape)
        for shapes in kinds.values():
            case = gate_case(shapes[0].case)
            names = dict.fromkeys(name for shape in shapes for name in shape.peers)
            able = [n for n in names if peers.get(n).why_not(supported_case(peers.get(n), case)) is None]
            note(f"gate: {len(able)} heads, {case.describe()}")
            largest = max((shape.case for shape in shapes), key=lambda case: case.classes)
            gates = check_all(able, case, tiled=tiled_case(largest))
            self.writer.add(*gates)
            self._right |= {(g.peer, g.dtype, g.backward) for g in gates if g.passed}

    def _time(self, shape: Shape, end: float) -> dict[str, Measurement]:
        """Time the peers of a shape and return a record of each: its last run's, or why there is none."""
        give_memory_back(shape.case.device)
        found = {name: self._why_not(SECONDS, name, shape.case) for name in shape.peers}
        able = [name for name, row in found.items() if row is None]
        alone = [name for name in able if _crowded(name, able, shape.case)]
        together = [name for name in able if name not in alone]
        rows = {name: row for name, row in found.items() if row is not None}
        self.writer.add(*rows.values())
        if able:
            inputs = shape.case.inputs()
            groups = [group for group in (together, *([name] for name in alone)) if group]
            for i, group in enumerate(groups):
                now = self.clock()
                part = self._take_turns(group, inputs, now + (end - now) / (len(groups) - i))
                self.writer.add(*part)
                rows |= {row.peer: row for row in part}
                inputs.drop_gradients()
                give_memory_back(shape.case.device)
        self.writer.add(*self._rooflines(rows))
        return rows

    def _take_turns(self, names: list[str], inputs: Inputs, end: float) -> list[Measurement]:
        """Warm the peers up and let them take turns; return each one's seconds of each run, or why not."""
        steps, lost = self._warmed_up(names, inputs, end)
        one_round = sum(self._expected(name, inputs.case) for name in steps)
        runs: list[dict[str, list[float]]] = []

        def failed(name: str, error: Exception) -> None:
            lost[name] = failure(SECONDS, name, inputs.case, error)

        with spinning(self.plan.spin):
            for _ in range(self.plan.runs):
                steps = {name: step for name, step in steps.items() if name not in lost}
                runs.append(
                    time_run(
                        steps,
                        inputs,
                        self.plan.rounds,
                        go_on=lambda: self.clock() + one_round < end,
                        clock=self.clock,
                        failed=failed,
                    )
                )
        # Runs are compared with one another: whoever fails in a later one leaves those before it too.
        timed = [
            row(SECONDS, name, inputs.case, values=tuple(seconds), run=i)
            for i, run in enumerate(runs, 1)
            for name, seconds in run.items()
            if name not in lost
        ]
        return [*lost.values(), *timed]

    def _warmed_up(
        self, names: Sequence[str], inputs: Inputs, end: float
    ) -> tuple[dict[str, Step], dict[str, Measurement]]:
        """Make steps that have run WARM_UPS times with time left to be timed; say of the others why not."""
        steps: dict[str, Step] = {}
        losses: dict[str, tuple[Case, float]] = {}
        lost: dict[str, Measurement] = {}
        # The fastest first: what they leave of their even shares goes to the slow ones.
        order = sorted(names, key=lambda name: self._expected(name, inputs.case))
        for i, name in enumerate(order):
            own, expected = inputs_for(name, inputs), self._expected(name, inputs.case)
            if (WARM_UPS + 1) * expected > (end - self.clock()) / (len(order) - i):
                why = "no time was left" + (f" for a step of about {expected:.1g} s" if expected else "")
                lost[name] = row(SECONDS, name, inputs.case, status=NO_TIME, why=why)
                continue
            try:
                step = peers.get(name).step(own)
                for _ in range(WARM_UPS):
                    start = self.clock()
                    losses[name] = own.case, run_step(step, own)
                self._seconds_per_flop[name, own.case.backward] = (self.clock() - start) / own.case.flops
                steps[name] = step
            except Exception as error:  # a peer may raise anything; the others go on
                lost[name] = failure(SECONDS, name, inputs.case, error)
                losses.pop(name, None)
        for name, text in disagreeing_losses(losses).items():
            lost[name] = failure(SECONDS, name, inputs.case, ArithmeticError(text))
            del steps[name]
        return {name: steps[name] for name in names if name in steps}, lost

    def _expected(self, name: str, case: Case) -> float:
        """Predict the seconds of a step from those of the last shape; 0 where it has not been met yet."""
        return self._seconds_per_flop.get((name, case.backward), 0.0) * (
            supported_case(peers.get(name), case).flops
        )

    def _measure_memory(self, shape: Shape, rows: dict[str, Measurement], end: float) -> None:
        for name in shape.peers:
            timed = rows.get(name)
            if timed is not None and timed.status != MEASURED:
                self.writer.add(dataclasses.replace(timed, what=BYTES))
                continue
            self.writer.add(self._why_no_memory(shape, name, end) or self._with_memory(name, shape.case))

    def _why_no_memory(self, shape: Shape, name: str, end: float) -> Measurement | None:
        case = supported_case(peers.get(name), shape.case)
        if (reason := memory.unavailable(case.device)) is not None:
            return row(BYTES, name, case, status=SKIPPED, why=reason)
        if not shape.timed and case.classes > LARGEST_WITH_LOGITS and _holds_logits(name, case):
            why = f"it holds as much as the logits of all classes: measured to {LARGEST_WITH_LOGITS:,} only"
            return self._why_not(BYTES, name, case) or row(BYTES, name, case, status=SKIPPED, why=why)
        process = self._memory_seconds.get(name, 0.0)  # at a smaller shape
        if self.clock() + process + memory.STEPS * self._expected(name, case) > end:
            return row(BYTES, name, case, status=NO_TIME, why="no time was left for its memory")
        return None if shape.timed else self._why_not(BYTES, name, case)

    def _with_memory(self, name: str, case: Case) -> Measurement:
        start = self.clock()
        try:
            found = memory.extra_bytes(name, supported_case(peers.get(name), case))
        except Exception as error:  # on a GPU it runs in this process, and may raise anything
            return failure(BYTES, name, case, error)
        finally:
            give_memory_back(case.device)
        self._memory_seconds[name] = self.clock() - start
        return row(BYTES, name, case, values=(found,))

    def _why_not(self, what: str, name: str, case: Case) -> Measurement | None:
        """Return a record that says why the peer cannot be measured at this shape; None where it can."""
        peer = peers.get(name)
        own = supported_case(peer, case)
        if (reason := peer.unavailable(own)) is not None:
            return row(what, name, case, status=UNAVAILABLE, why=reason)
        if (name, own.dtype, own.backward) not in self._right:
            return row(what, name, case, status=WRONG, why="it did not pass the gate")
        needed = peer.needed_bytes(own)
        if (reason := no_room(needed, own.device)) is not None:
            return row(what, name, case, status=NO_ROOM, why=reason, needs_bytes=needed)
        return None

    def _rooflines(self, rows: dict[str, Measurement]) -> list[Measurement]:
        """Return the least time that this card could take for ours, where its rates are known."""
        card = (self.writer.run.header.machine.get("gpu") or {}).get("card")
        ours = {name: peers.get(name) for name, found in rows.items() if found.values}
        found = []
        for name, peer in ours.items():
            case = rows[name].case
            if card is None or not isinstance(peer, Ours) or not case.backward:
                continue
            from bench import model  # needs Triton, which not every system has

            seconds = model.seconds(case, peer.workspace_bytes, card)
            if seconds is not None:
                found.append(row(ROOFLINE, name, case, values=(seconds,)))
        return found


def row(
    what: str,
    name: str,
    case: Case,
    *,
    values: tuple[float, ...] = (),
    run: int = 1,
    status: str = MEASURED,
    why: str | None = None,
    needs_bytes: int | None = None,
) -> Measurement:
    """Make the record of a peer at the case as it supports it."""
    peer = peers.get(name)
    own = supported_case(peer, case)
    return Measurement(what, name, peer.label(own), own, values, run, status, why, needs_bytes)


def failure(what: str, name: str, case: Case, error: Exception) -> Measurement:
    """Make the record of a peer that raised: out of memory is no room, anything else a failure."""
    text = str(error) if isinstance(error, memory.MeasurementError) else in_a_line(error)
    # torch's CPU allocator has no exception of its own.
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return row(what, name, case, status=NO_ROOM, why="it ran out of memory")
    return row(what, name, case, status=FAILED, why=text)


def note(text: str) -> None:
    """Show what is being done, on stderr."""
    print(text, file=sys.stderr, flush=True)


def give_memory_back(device: str) -> None:
    """Free memory that nobody uses, so that what is free is what the next peer can have."""
    if device == "cuda":
        torch.cuda.empty_cache()
    else:
        workspace.clear()


def _crowded(name: str, names: Sequence[str], case: Case) -> bool:
    """Tell whether there is no room beside what the others hold between steps; all of ours share theirs."""
    held = {"ours": 0, "others": 0}
    for other in names:
        if other != name:
            bytes_ = peers.get(other).held_bytes(supported_case(peers.get(other), case))
            if peers.is_ours(other):
                held["ours"] = 0 if peers.is_ours(name) else max(held["ours"], bytes_)
            else:
                held["others"] += bytes_
    peer = peers.get(name)
    own = supported_case(peer, case)
    return no_room(peer.needed_bytes(own) + sum(held.values()), case.device) is not None


def _holds_logits(name: str, case: Case) -> bool:
    """Tell whether it holds as much as the logits of all classes, by its own estimate."""
    if peers.is_ours(name) or case.sample_rate != 1:
        return False
    return peers.get(name).extra_bytes(case) >= case.rows * case.classes * case.itemsize
