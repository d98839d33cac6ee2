"""One run of the benchmark: gate, timing, memory, result."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from dataclasses import dataclass

from bench import allocator, machine, memory, peers
from bench.cases import Case, Inputs
from bench.gate import check_all, gate_case, in_terms_of, odd_ones_out, tiled_case
from bench.measure import WARM_UPS, run_step, time_run
from bench.peers.base import Step, in_a_line, terms
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
    runs, failed = _time(plan, right, progress) if right else ((), {})
    return Result(
        case=plan.case,
        spin=plan.spin,
        keep_memory=plan.keep_memory,
        rounds=plan.rounds,
        gates=tuple(dataclasses.replace(gate, label=_label(gate.peer, plan.case)) for gate in gates),
        skipped={name: reason for name, reason in reasons.items() if reason is not None},
        runs=runs,
        memory=_memory(plan, {gate.peer for gate in gates if not gate.passed}, progress),
        machine=described,
        command=plan.command,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        failed=failed,
    )


def _label(name: str, case: Case) -> str:
    """At the size that is timed: the gate's may have another chunk."""
    peer = peers.get(name)
    return peer.label(terms(peer, case))


def _why_not(name: str, case: Case) -> str | None:
    peer = peers.get(name)
    return peer.why_not(terms(peer, case))


def _time(
    plan: Plan, names: list[str], progress: Progress
) -> tuple[tuple[dict[str, list[float]], ...], dict[str, str]]:
    """Seconds of each run, and what was raised by the peers that are in none of them."""
    inputs = plan.case.inputs()
    failed: dict[str, str] = {}

    def note(name: str, error: Exception) -> None:
        failed[name] = in_a_line(error)

    steps = _warmed_up(names, inputs, note, _task(progress, "warm-up", len(names) * WARM_UPS))
    advance = _task(progress, "timing", len(steps) * plan.rounds * plan.runs)
    runs: list[dict[str, list[float]]] = []
    with spinning(plan.spin):
        for _ in range(plan.runs if steps else 0):
            runs.append(time_run(steps, inputs, plan.rounds, advance, failed=note))
            steps = {name: step for name, step in steps.items() if name not in failed}
            if not steps:
                break
    # Runs are compared with one another: whoever fails in a later one leaves those before it too.
    return tuple({name: run[name] for name in steps} for run in runs if steps), failed


def _warmed_up(
    names: list[str], inputs: Inputs, failed: Callable[[str, Exception], None], advance: Callable[[], None]
) -> dict[str, Step]:
    """Steps that have run WARM_UPS times; a peer that raises, or has another loss, is handed to `failed`."""
    steps: dict[str, Step] = {}
    losses: dict[str, tuple[Case, float]] = {}
    for name in names:
        own = in_terms_of(name, inputs)
        try:
            step = peers.get(name).step(own)
            for _ in range(WARM_UPS):
                losses[name] = own.case, run_step(step, inputs)
                advance()
        except Exception as error:  # a peer may raise anything; the others go on
            failed(name, error)
            losses.pop(name, None)
        else:
            steps[name] = step
    for name, text in odd_ones_out(losses).items():
        failed(name, ArithmeticError(text))
        del steps[name]
    return steps


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
