"""Holds two result files against one another: what got slower, larger, fails or went missing.

A number that is there no more counts as lost where the peer failed or had no room or time, and wherever ours
cannot run. Other peers may lack a library here, and a run that was given less time leaves more out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.cases import Case
from bench.peers import is_ours
from bench.records import BYTES, FAILED, NO_ROOM, NO_TIME, SECONDS, UNAVAILABLE, Measurement, Run
from bench.report import NOTHING, print_table

THRESHOLD = 0.1
# Smaller changes of memory are pages and buffers that libraries take now and then.
LEAST_BYTES = 4e6
SAME_MACHINE = ("cpu", "cores", "instruction_set", "torch_threads", "torch")

Key = tuple[str, str, Case]
"""(quantity, peer, case)"""


@dataclass(frozen=True)
class Change:
    """One number before and after; None after where it was measured no more."""

    what: str
    peer: str
    case: Case
    before: float
    after: float | None
    worse: bool
    why: str | None = None
    """Where the number is lost, and that counts: what happened instead."""

    @property
    def growth(self) -> float:
        return 0.0 if self.after is None or not self.before else self.after / self.before


@dataclass(frozen=True)
class Comparison:
    """Holds every number of the first file, and the gates that fail in the second."""

    changes: tuple[Change, ...]
    failed: tuple[str, ...]
    """Of each peer that was right or measured before and does not pass the gate now, one line."""
    warnings: tuple[str, ...]
    threshold: float

    @property
    def regressions(self) -> list[str]:
        """List one line for each."""
        worse = [
            f"{c.peer}, {c.what}, {c.case.describe()}" + (f": {c.why}" if c.why else "")
            for c in self.changes
            if c.worse
        ]
        return [*self.failed, *worse]


def compare(before: Run, after: Run, threshold: float) -> Comparison:
    """Compare all numbers of `before`; ValueError without a common one."""
    old, new, lost = _numbers(before), _numbers(after), _lost(before, after)
    failed = _failed(before, after)
    if not failed and not old.keys() & (new.keys() | lost.keys()):
        raise ValueError("the files have no peer and case in common")
    changes = []
    for key, value in old.items():
        now = new.get(key)
        if now is None:
            changes.append(Change(*key, value, None, key in lost, lost.get(key)))
        else:
            slack = LEAST_BYTES if key[0] == BYTES else 0.0
            changes.append(Change(*key, value, now, now > value * (1 + threshold) + slack))
    return Comparison(tuple(changes), failed, _warnings(before, after), threshold)


def _measurements(run: Run) -> list[Measurement]:
    """List all that counts: of seconds, those of each shape's least disturbed run."""
    timed = [m for case in run.cases() for m in run.at(case).values()]
    return [*timed, *(m for m in run.measurements if m.what != SECONDS)]


def _numbers(run: Run) -> dict[Key, float]:
    return {(m.what, m.peer, m.case): m.value for m in _measurements(run) if m.value is not None}


def _lost(before: Run, after: Run) -> dict[Key, str]:
    """Find what stands in the place of a number and is as bad as a worse one.

    What does not pass the gate is told once, by `_failed`. Where memory alone had no time, or cannot be read
    on this system, the seconds are there and tell whether the peer has become slow.
    """
    hurried = (_budget(after) or float("inf")) < (_budget(before) or float("inf"))
    return {
        (m.what, m.peer, m.case): m.why or m.status
        for m in _measurements(after)
        if m.status in (FAILED, NO_ROOM)
        or (m.what == SECONDS and m.status == NO_TIME and not hurried)
        or (m.status == UNAVAILABLE and is_ours(m.peer))
    }


def _failed(before: Run, after: Run) -> tuple[str, ...]:
    right = {(gate.peer, gate.dtype, gate.backward) for gate in before.gates if gate.passed}
    right |= {(peer, case.dtype, case.backward) for _, peer, case in _numbers(before)}
    lines = [
        f"{g.peer}: its answer is wrong now" if g.errors else f"{g.peer}: {g.reason}"
        for g in after.gates
        if not g.passed and (g.peer, g.dtype, g.backward) in right
    ]
    return tuple(dict.fromkeys(lines))


def _budget(run: Run) -> float | None:
    seconds = run.header.settings.get("seconds")
    return float(seconds) if isinstance(seconds, (int, float)) else None


def _warnings(before: Run, after: Run) -> tuple[str, ...]:
    """Say what makes the seconds of two files hard to compare, or numbers missing."""
    first, second = _conditions(before), _conditions(after)
    different = [
        f"{name} {first[name]} against {second[name]}" for name in first if first[name] != second[name]
    ]
    lines = [f"measured under other conditions: {', '.join(different)}"] if different else []
    for which, run in (("first", before), ("second", after)):
        if not run.complete:
            lines.append(f"the {which} run was stopped before its end")
    return tuple(lines)


def _conditions(run: Run) -> dict[str, Any]:
    machine, settings = run.header.machine, run.header.settings
    return {
        **{name: machine.get(name) for name in SAME_MACHINE},
        "card": (machine.get("gpu") or {}).get("card"),
        **{name: settings.get(name) for name in ("spin", "keep_memory", "seconds")},
    }


def print_comparison(comparison: Comparison) -> None:
    """Print every number that both have, the worst first, and what only the first has; last the verdict."""
    for warning in comparison.warnings:
        print(warning)
    rows = []
    for change in sorted(comparison.changes, key=lambda change: change.growth, reverse=True):
        scale, unit = (1e-6, "MB") if change.what == BYTES else (1.0, "")
        gone = "missing" if change.why is None else "LOST"
        rows.append(
            [
                f"{change.peer}: {change.what}, {change.case.describe()}",
                f"{change.before * scale:.4g} {unit}".strip(),
                gone if change.after is None else f"{change.after * scale:.4g} {unit}".strip(),
                NOTHING if not change.growth else f"{change.growth - 1:+.1%}",
                "WORSE" if change.worse else "",
            ]
        )
    print(
        f"WORSE marks what failed or is lost, is more than {comparison.threshold:.0%} slower, or holds as "
        f"much more memory and {LEAST_BYTES / 1e6:g} MB on top."
    )
    print_table("From the first file to the second", ["head and case", "before", "after", "change", ""], rows)
    for line in comparison.regressions:
        print(f"REGRESSION: {line}")
    if not comparison.regressions:
        missing = sum(change.after is None for change in comparison.changes)
        print("No regression.")
        if missing:
            print(f"Not compared: {missing} of {len(comparison.changes)} numbers, missing in the second.")
