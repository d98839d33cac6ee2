"""Two result files of the same kind against one another: what got slower, larger, fails or went missing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import sweep_result
from bench.cases import Case
from bench.report import NONE, describe_case
from bench.result import Result
from bench.show import Output
from bench.sweep_result import Sweep

THRESHOLD = 0.1
# Smaller changes of memory are pages and buffers that libraries take now and then.
LEAST_BYTES = 4e6
SAME_MACHINE = ("cpu", "cores", "instruction_set", "torch_threads", "torch")

Key = tuple[str, str, Case]
"""("seconds" or "bytes", peer, case)"""


@dataclass(frozen=True)
class Change:
    """One number before and after; None after where it was measured no more."""

    what: str
    peer: str
    case: Case
    before: float
    after: float | None
    worse: bool
    error: str | None = None
    """What was raised where the number was to be."""


@dataclass(frozen=True)
class Comparison:
    changes: tuple[Change, ...]
    failed: tuple[str, ...]
    """Of each peer that was right or measured before and does not pass the gate now, one line."""
    warnings: tuple[str, ...]
    threshold: float

    @property
    def regressions(self) -> list[str]:
        """One line each."""
        worse = [
            f"{c.peer}, {c.what}, {describe_case(c.case)}" + (f": {c.error}" if c.error else "")
            for c in self.changes
            if c.worse
        ]
        return [*self.failed, *worse]


def load(path: Path) -> Result | Sweep:
    """A result file; ValueError, in one line, for anything else."""
    try:
        data = json.loads(path.read_text())
        if not isinstance(data, dict):
            raise ValueError("expected a JSON object")
        if data.get("kind") not in (None, sweep_result.KIND):
            raise ValueError(f"schema: expected a single case or a sweep, got {data['kind']!r}")
        return Sweep.from_data(data) if data.get("kind") == sweep_result.KIND else Result.from_data(data)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a result of this program: {type(error).__name__} {error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def compare(before: Result | Sweep, after: Result | Sweep, threshold: float) -> Comparison:
    """ValueError for results of two kinds, or without a common number."""
    if type(before) is not type(after):
        raise ValueError("schema: expected two files of one kind, got a single case and a sweep")
    old, new, errors = _numbers(before), _numbers(after), _errors(after)
    failed = _failed(before, after)
    if not failed and not old.keys() & (new.keys() | errors.keys()):
        raise ValueError("the files have no peer and case in common")
    changes = tuple(
        Change(*key, value, new.get(key), _worse(key, value, new.get(key), threshold))
        if key not in errors
        else Change(*key, value, None, True, errors[key])
        for key, value in old.items()
    )
    return Comparison(changes, failed, _warnings(before, after), threshold)


def _worse(key: Key, before: float, after: float | None, threshold: float) -> bool:
    if after is None:
        return False  # shown as missing: other peers or shapes were asked for, or it could not be tried
    slack = LEAST_BYTES if key[0] == "bytes" else 0.0
    return after > before * (1 + threshold) + slack


def _failed(before: Result | Sweep, after: Result | Sweep) -> tuple[str, ...]:
    right = {(gate.peer, gate.dtype, gate.backward) for gate in before.gates if gate.passed}
    right |= {(peer, case.dtype, case.backward) for _, peer, case in _numbers(before)}
    lines = [
        f"{g.peer}: its answer is wrong now" if g.errors else f"{g.peer}: {g.reason}"
        for g in after.gates
        if not g.passed and (g.peer, g.dtype, g.backward) in right
    ]
    return tuple(dict.fromkeys(lines))


def _numbers(result: Result | Sweep) -> dict[Key, float]:
    """Medians and extra bytes."""
    found: dict[Key, float] = {}
    if isinstance(result, Sweep):
        for point in result.points:
            if point.median is not None:
                found["seconds", point.peer, point.case] = point.median
            if point.extra_bytes is not None:
                found["bytes", point.peer, point.case] = float(point.extra_bytes)
        return found
    if (best := result.best_run) is not None:
        for peer in result.runs[best]:
            found["seconds", peer, result.case] = result.seconds(peer, best).median
    for entry in result.memory:
        if entry.extra_bytes is not None:
            found["bytes", entry.peer, entry.case] = float(entry.extra_bytes)
    return found


def _errors(result: Result | Sweep) -> dict[Key, str]:
    """What was raised in place of a number. What was not tried, for a reason, is not here."""
    if isinstance(result, Sweep):
        return {
            (what, point.peer, point.case): point.error
            for point in result.points
            if point.error is not None
            for what, number in (("seconds", point.median), ("bytes", point.extra_bytes))
            if number is None
        }
    return {("bytes", e.peer, e.case): e.error for e in result.memory if e.error is not None}


def _warnings(before: Result | Sweep, after: Result | Sweep) -> tuple[str, ...]:
    """What makes the seconds of two files hard to compare."""
    first, second = _conditions(before), _conditions(after)
    different = [
        f"{name} {first[name]} against {second[name]}" for name in first if first[name] != second[name]
    ]
    return (f"measured under other conditions: {', '.join(different)}",) if different else ()


def _conditions(result: Result | Sweep) -> dict[str, Any]:
    gpu = result.machine.get("gpu") or {}
    spin = isinstance(result, Result) and result.spin
    return {
        **{name: result.machine.get(name) for name in SAME_MACHINE},
        "card": gpu.get("card"),
        "spin": spin,
        "keep_memory": isinstance(result, Result) and result.keep_memory,
    }


def print_comparison(comparison: Comparison, out: Output) -> None:
    """Every number that both have, the worst first, and what only the first has; last the verdict."""
    for warning in comparison.warnings:
        out.line(warning)
    rows = []
    for change in sorted(comparison.changes, key=_growth, reverse=True):
        scale, unit = (1e-6, "MB") if change.what == "bytes" else (1.0, "s")
        missing = "missing" if change.error is None else "FAILED"
        after = missing if change.after is None else f"{change.after * scale:.4g} {unit}"
        grown = NONE if change.after is None or not change.before else f"{_growth(change) - 1:+.1%}"
        worse = "WORSE" if change.worse else ""
        of = describe_case(change.case) + ("" if change.case.backward else ", forward alone")
        rows.append([f"{change.peer}: {of}", f"{change.before * scale:.4g} {unit}", after, grown, worse])
    out.line(
        f"WORSE marks what failed, is more than {comparison.threshold:.0%} slower, or holds as much more "
        f"memory and {LEAST_BYTES / 1e6:g} MB on top."
    )
    out.table(
        "From the first file to the second",
        ["head and case", "before", "after", "change", ""],
        rows,
        "",
    )
    for line in comparison.regressions:
        out.line(f"REGRESSION: {line}")
    if not comparison.regressions:
        gone = sum(change.after is None for change in comparison.changes)
        out.line("No regression.")
        if gone:
            out.line(f"Not compared: {gone} of {len(comparison.changes)} numbers, missing in the second.")


def _growth(change: Change) -> float:
    if change.after is None or not change.before:
        return 0.0
    return change.after / change.before
