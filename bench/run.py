"""One run of the benchmark: gate, timing, memory, result."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass

from bench import allocator, machine, memory, peers
from bench.cases import Case
from bench.gate import check_all, gate_case, in_terms_of, tiled_case
from bench.measure import WARM_UPS, run_step, time_run
from bench.peers.base import terms
from bench.result import Memory, Result
from bench.show import Progress
from bench.spin import spinning


@dataclass(frozen=True)
class Plan:
    """What to measure. Memory is measured for each of `memory_peers` at each of `memory_cases`."""

    case: Case
    peers: tuple[str, ...]
    rounds: int
    runs: int
    memory_peers: tuple[str, ...]
    memory_cases: tuple[Case, ...]
    spin: bool
    keep_memory: bool
    command: str

    @property
    def every_peer(self) -> list[str]:
        """All that is timed or whose memory is measured, once each."""
        return list(dict.fromkeys([*self.peers, *self.memory_peers]))


def run(plan: Plan, progress: Progress) -> Result:
    """Everything in the plan that the gate lets through."""
    described = machine.describe(plan.case.device)
    if plan.keep_memory:
        allocator.keep_freed()
    small = gate_case(plan.case)
    able = [name for name in plan.every_peer if _why_not(name, small) is None]
    gates = check_all(able, small, _task(progress, "gate", len(able)), tiled=tiled_case(plan.case))
    reasons = {name: _why_not(name, plan.case) for name in plan.peers}
    right = [gate.peer for gate in gates if gate.passed and reasons.get(gate.peer, "") is None]
    return Result(
        case=plan.case,
        spin=plan.spin,
        keep_memory=plan.keep_memory,
        rounds=plan.rounds,
        gates=gates,
        skipped={name: reason for name, reason in reasons.items() if reason is not None},
        runs=_time(plan, right, progress) if right else (),
        memory=_memory(plan, {gate.peer for gate in gates if not gate.passed}, progress),
        machine=described,
        command=plan.command,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def _why_not(name: str, case: Case) -> str | None:
    peer = peers.get(name)
    return peer.why_not(terms(peer, case))


def _time(plan: Plan, names: list[str], progress: Progress) -> tuple[dict[str, list[float]], ...]:
    inputs = plan.case.inputs()
    steps = {name: peers.get(name).step(in_terms_of(name, inputs)) for name in names}
    advance = _task(progress, "warm-up", len(names) * WARM_UPS)
    for step in steps.values():
        for _ in range(WARM_UPS):
            run_step(step, inputs)
            advance()
    advance = _task(progress, "timing", len(names) * plan.rounds * plan.runs)
    with spinning(plan.spin):
        return tuple(time_run(steps, inputs, plan.rounds, advance) for _ in range(plan.runs))


def _memory(plan: Plan, wrong: set[str], progress: Progress) -> tuple[Memory, ...]:
    names = [name for name in plan.memory_peers if name not in wrong]
    advance = _task(progress, "memory", len(plan.memory_cases))
    entries: list[Memory] = []
    for case in plan.memory_cases:
        entries += memory.measure_all(names, case)
        advance()
    return tuple(entries)


def _task(progress: Progress, description: str, total: int) -> Callable[[], None]:
    advance = progress.task(description, total)
    return lambda: advance(1)
