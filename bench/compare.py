"""Two result files of the same kind against one another: what got slower, larger, fails or went missing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import sweep_result
from bench.cases import Case
from bench.memory import NOT_LINUX
from bench.peers.base import NEEDS
from bench.report import NONE, describe_case
from bench.result import Result
from bench.show import Output
from bench.sweep_result import NO_TIME, NOT_RIGHT, OUT_OF_MEMORY, Sweep

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
    why: str | None = None
    """Where the number is lost, and that counts: what was raised, or why it was left out."""


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
            f"{c.peer}, {c.what}, {describe_case(c.case)}" + (f": {c.why}" if c.why else "")
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
        found = Sweep.from_data(data) if data.get("kind") == sweep_result.KIND else Result.from_data(data)
        _read_through(found)
        return found
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a result of this program: {type(error).__name__} {error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_through(result: Result | Sweep) -> None:
    """Raises what a comparison, or a picture's title, would stumble over in a file that is none of ours."""
    _numbers(result)
    _conditions(result)
    _lost(result, result)
    _failed(result, result)
    if isinstance(result, Sweep):
        result.budget_seconds + 0.0  # TypeError for a text
    for name in (*SAME_MACHINE, "commit"):
        result.machine[name]


def compare(before: Result | Sweep, after: Result | Sweep, threshold: float) -> Comparison:
    """ValueError for results of two kinds, or without a common number."""
    if type(before) is not type(after):
        raise ValueError("schema: expected two files of one kind, got a single case and a sweep")
    old, new, lost = _numbers(before), _numbers(after), _lost(before, after)
    failed = _failed(before, after)
    if not failed and not old.keys() & (new.keys() | lost.keys()):
        raise ValueError("the files have no peer and case in common")
    changes = tuple(
        Change(*key, value, new.get(key), _worse(key, value, new.get(key), threshold))
        if key not in lost
        else Change(*key, value, None, True, lost[key])
        for key, value in old.items()
    )
    return Comparison(changes, failed, _warnings(before, after), threshold)


def _worse(key: Key, before: float, after: float | None, threshold: float) -> bool:
    if after is None:
        return False  # shown as missing: other peers or shapes were asked for, or others cannot run here
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
                found["seconds", point.peer, point.case] = float(point.median)
            if point.extra_bytes is not None:
                found["bytes", point.peer, point.case] = float(point.extra_bytes)
        return found
    if (best := result.best_run) is not None:
        for peer in result.runs[best]:
            found["seconds", peer, result.case] = float(result.seconds(peer, best).median)
    for entry in result.memory:
        if entry.extra_bytes is not None:
            found["bytes", entry.peer, entry.case] = float(entry.extra_bytes)
    return found


def _lost(before: Result | Sweep, after: Result | Sweep) -> dict[Key, str]:
    """What stands in the place of a number and is as bad as a worse one.

    That is whatever was raised; that memory or time were too short; and all that keeps ours from running.
    Others may lack a library here, and a sweep that is given less time leaves more out. What does not pass
    the gate is told once, by `_failed`.
    """
    hurried = (
        isinstance(before, Sweep)
        and isinstance(after, Sweep)
        and after.budget_seconds < before.budget_seconds
    )
    found: dict[Key, str] = {}
    for key, (reason, error) in _empty(after).items():
        if error is not None:
            found[key] = error
        elif reason is not None and _counts(reason, key[1], hurried):
            found[key] = reason
    return found


def _counts(reason: str, peer: str, hurried: bool) -> bool:
    """Whether a number that is left out for this reason is lost."""
    if reason.startswith(NO_TIME):
        return not hurried
    if reason in (NOT_RIGHT, NOT_LINUX, f"its memory: {NO_TIME}"):
        return False  # the last one's seconds are there, and tell whether it has become slow
    return _is_ours(peer) or reason.startswith(NEEDS) or reason == OUT_OF_MEMORY


def _is_ours(peer: str) -> bool:
    return peer.partition("@")[0] in ("ours", "ours_sampled")


def _empty(result: Result | Sweep) -> dict[Key, tuple[str | None, str | None]]:
    """(reason, error) of each number that was asked for and is not there."""
    if isinstance(result, Sweep):
        return {
            (what, point.peer, point.case): (point.reason, point.error)
            for point in result.points
            for what, number in (("seconds", point.median), ("bytes", point.extra_bytes))
            if number is None
        }
    found: dict[Key, tuple[str | None, str | None]] = {
        ("bytes", e.peer, e.case): (e.why_not, e.error) for e in result.memory if e.extra_bytes is None
    }
    found |= {("seconds", peer, result.case): (reason, None) for peer, reason in result.skipped.items()}
    return found | {("seconds", peer, result.case): (None, error) for peer, error in result.failed.items()}


def _warnings(before: Result | Sweep, after: Result | Sweep) -> tuple[str, ...]:
    """What makes the seconds of two files hard to compare, or numbers missing."""
    first, second = _conditions(before), _conditions(after)
    different = [
        f"{name} {first[name]} against {second[name]}" for name in first if first[name] != second[name]
    ]
    lines = [f"measured under other conditions: {', '.join(different)}"] if different else []
    for which, result in (("first", before), ("second", after)):
        if isinstance(result, Sweep) and not result.complete:
            lines.append(f"the {which} sweep was stopped before its end")
    return tuple(lines)


def _conditions(result: Result | Sweep) -> dict[str, Any]:
    gpu = result.machine.get("gpu") or {}
    spin = isinstance(result, Result) and result.spin
    return {
        **{name: result.machine.get(name) for name in SAME_MACHINE},
        "card": gpu.get("card"),
        "spin": spin,
        "keep_memory": isinstance(result, Result) and result.keep_memory,
        "budget_seconds": result.budget_seconds if isinstance(result, Sweep) else None,
    }


def print_comparison(comparison: Comparison, out: Output) -> None:
    """Every number that both have, the worst first, and what only the first has; last the verdict."""
    for warning in comparison.warnings:
        out.line(warning)
    rows = []
    for change in sorted(comparison.changes, key=_growth, reverse=True):
        scale, unit = (1e-6, "MB") if change.what == "bytes" else (1.0, "s")
        missing = "missing" if change.why is None else "LOST"
        after = missing if change.after is None else f"{change.after * scale:.4g} {unit}"
        grown = NONE if change.after is None or not change.before else f"{_growth(change) - 1:+.1%}"
        worse = "WORSE" if change.worse else ""
        of = describe_case(change.case) + ("" if change.case.backward else ", forward alone")
        rows.append([f"{change.peer}: {of}", f"{change.before * scale:.4g} {unit}", after, grown, worse])
    out.line(
        f"WORSE marks what failed or is lost, is more than {comparison.threshold:.0%} slower, or holds as "
        f"much more memory and {LEAST_BYTES / 1e6:g} MB on top."
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
