"""Results as JSON lines: a header, then one line per gate and per measurement, and a last one at the end.

Every command writes this format, and `compare`, `readme` and the pictures read it. Lines are written as soon
as they are known, so that a run that was stopped leaves what it had; its last line is missing then.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from bench import peers
from bench.cases import Case

SCHEMA = 2
"""Version of the format: raised when a field changes its meaning or goes."""
SECONDS, BYTES, ROOFLINE, FLOPS, MOVED = "seconds", "bytes", "roofline_seconds", "flops", "moved_bytes"
QUANTITIES = (SECONDS, BYTES, ROOFLINE, FLOPS, MOVED)
MEASURED, FAILED, NO_ROOM, NO_TIME, WRONG, UNAVAILABLE, SKIPPED = (
    "measured", "failed", "no room", "no time", "wrong", "unavailable", "skipped",
)  # fmt: skip
STATUSES = (MEASURED, FAILED, NO_ROOM, NO_TIME, WRONG, UNAVAILABLE, SKIPPED)


@dataclass(frozen=True)
class Spread:
    """Holds median and quartiles, in the unit of what went in."""

    median: float
    first_quartile: float
    third_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        first, median, third = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, first, third)


@dataclass(frozen=True)
class Header:
    """Says where, when and how a run was made; `settings` are those of the command."""

    command: str
    date: str | None
    machine: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.machine, dict) or not isinstance(self.settings, dict):
            raise ValueError("header: expected objects as machine and settings")
        if "commit" not in self.machine:
            raise ValueError("header: the machine names no commit")

    @classmethod
    def now(cls, command: str, machine: dict[str, Any], **settings: Any) -> Header:
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return cls(command, date, machine, settings)


@dataclass(frozen=True)
class Gate:
    """Says how far a peer is from float64 truth, and whether that is near enough."""

    peer: str
    label: str
    errors: tuple[float, ...]
    """Relative errors of loss, dx and dw, or of the loss of a forward alone; empty where the peer raised."""
    limit: float
    passed: bool
    reason: str | None = None
    """Why it did not pass."""
    backward: bool = True
    dtype: str = "float32"
    """Of the inputs as they are stored."""
    note: str | None = None
    """What is to be known of one that passed."""

    def __post_init__(self) -> None:
        _check_numbers("errors", self.errors)
        object.__setattr__(self, "errors", tuple(self.errors))


@dataclass(frozen=True)
class Measurement:
    """Holds one quantity of one peer at one case: seconds of each round, or samples of extra bytes.

    `case` is what the peer computed (`bench.peers.supported_case`). Without values, `status` and `why` say
    what happened instead, and `needs_bytes` how much memory there would have to be.
    """

    what: str
    peer: str
    label: str
    case: Case
    values: tuple[float, ...] = ()
    run: int = 1
    status: str = MEASURED
    why: str | None = None
    needs_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("what", QUANTITIES), ("status", STATUSES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {list(allowed)}, got {getattr(self, name)!r}")
        _check_numbers("values", self.values)
        if bool(self.values) != (self.status == MEASURED):
            raise ValueError(f"values: expected some exactly where the status is {MEASURED!r}")
        object.__setattr__(self, "values", tuple(self.values))

    @property
    def value(self) -> float | None:
        """The median counts; of bytes the lower one, which was measured."""
        if not self.values:
            return None
        return statistics.median_low(self.values) if self.what == BYTES else statistics.median(self.values)


Record = Header | Gate | Measurement


@dataclass(frozen=True)
class Run:
    """Everything that one command recorded, in that order."""

    header: Header
    gates: tuple[Gate, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    complete: bool = False
    """False where it was stopped before its end."""
    took_seconds: float | None = None

    @property
    def ok(self) -> bool:
        """All peers were right, and what was to be measured was."""
        return all(gate.passed for gate in self.gates) and not any(
            m.status == FAILED for m in self.measurements
        )

    def cases(self, what: str = SECONDS) -> list[Case]:
        """List one case of every shape that has this quantity, in the order of the records: that of ours.

        Other peers may have another margin, or a sample of the classes.
        """
        found: dict[tuple[object, ...], Case] = {}
        for m in self.measurements:
            if m.what == what:
                first = found.setdefault(m.case.shape, m.case)
                if peers.is_ours(m.peer) and m.case.sample_rate >= first.sample_rate:
                    found[m.case.shape] = m.case
        return list(found.values())

    def at(self, case: Case, what: str = SECONDS, run: int | None = None) -> dict[str, Measurement]:
        """Return each peer's measurement at this shape, in this run or in the least disturbed one."""
        rows = [m for m in self.measurements if m.what == what and m.case.shape == case.shape]
        if what == SECONDS:
            run = least_disturbed_run(rows) if run is None else run
            rows = [m for m in rows if m.run == run or not m.values]
        return {m.peer: m for m in rows}

    def runs(self, case: Case) -> list[int]:
        """List the numbers of the runs that this shape was timed in."""
        rows = self.measurements
        return sorted({m.run for m in rows if m.what == SECONDS and m.values and m.case.shape == case.shape})

    def ratio(self, case: Case, peer: str, run: int | None = None) -> float | None:
        """Divide the baseline's median by the peer's: above 1 the peer is faster. None without both."""
        rows = self.at(case, run=run)
        first, second = (rows[n].value if n in rows else None for n in (peers.baseline(peer), peer))
        return None if first is None or second is None else first / second

    def line(self, case: Case, peer: str, what: str = SECONDS) -> list[tuple[int, Measurement]]:
        """Return (C, measurement) of the peer at the shapes that differ from `case` in the classes alone."""
        found = []
        for c in sorted({m.case.classes for m in self.measurements}):
            rows = self.at(dataclasses.replace(case, classes=c), what)
            if peer in rows:
                found.append((c, rows[peer]))
        return found


def least_disturbed_run(rows: Iterable[Measurement]) -> int | None:
    """Return the run with the least product of its peers' medians, whomever it favors; None without seconds.

    Most of a sum would be the slowest peer's.
    """
    logs: dict[int, float] = {}
    for m in rows:
        if m.value is not None:
            logs[m.run] = logs.get(m.run, 0.0) + math.log(m.value)
    return min(logs, key=lambda run: logs[run], default=None)


class Writer:
    """Writes the records of one run to a file and collects them; ValueError where the file cannot be written.

    `option` is what the command line calls the path.
    """

    def __init__(self, path: Path | None, header: Header, option: str = "json") -> None:
        self.run = Run(header)
        self._file: TextIO | None = None
        if path is not None:
            self._file = open_for_writing(option, path)
        self._write({"record": "header", "schema": SCHEMA, **dataclasses.asdict(header)})

    def add(self, *records: Gate | Measurement) -> None:
        for record in records:
            if isinstance(record, Gate):
                self.run = dataclasses.replace(self.run, gates=(*self.run.gates, record))
            else:
                self.run = dataclasses.replace(self.run, measurements=(*self.run.measurements, record))
            self._write({"record": type(record).__name__.lower(), **dataclasses.asdict(record)})

    def end(self, took_seconds: float | None = None) -> Run:
        """Write the last line and close the file."""
        self.run = dataclasses.replace(self.run, complete=True, took_seconds=took_seconds)
        self._write({"record": "end", "took_seconds": took_seconds})
        if self._file is not None:
            self._file.close()
        return self.run

    def _write(self, fields: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(fields) + "\n")
            self._file.flush()


def open_for_writing(option: str, path: Path) -> TextIO:
    """Open the file anew; ValueError that names the option where that cannot be done."""
    try:
        return path.open("w")
    except OSError as error:
        raise ValueError(f"{option}: {path} cannot be written ({error.strerror})") from error


def folder(option: str, path: Path) -> Path:
    """Make the folder; ValueError that names the option where it cannot be had."""
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option}: {path} cannot be made a folder ({error.strerror})") from error
    return path


def load(path: Path) -> Run:
    """Read a result file; ValueError, in one line, for anything else."""
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        return _parsed([json.loads(line) for line in lines])
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON lines: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a result of this program: {type(error).__name__} {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parsed(lines: list[dict[str, Any]]) -> Run:
    first = dict(lines[0]) if lines and isinstance(lines[0], dict) else {}
    if (first.pop("record", None), schema := first.pop("schema", None)) != ("header", SCHEMA):
        raise ValueError(f"schema: expected a header of schema {SCHEMA} in the first line, got {schema!r}")
    gates, measurements, end = list[Gate](), list[Measurement](), dict[str, Any]()
    for line in lines[1:]:
        fields = dict(line)
        kind = fields.pop("record")
        if kind == "gate":
            gates.append(Gate(**fields))
        elif kind == "measurement":
            measurements.append(Measurement(**(fields | {"case": Case(**fields["case"])})))
        elif kind == "end":
            end = {"complete": True, "took_seconds": fields["took_seconds"]}
        else:
            raise ValueError(f"record: expected a gate, a measurement or the end, got {kind!r}")
    return Run(Header(**first), tuple(gates), tuple(measurements), **end)


def _check_numbers(name: str, values: Iterable[object]) -> None:
    if not all(isinstance(value, (int, float)) for value in values):
        raise ValueError(f"{name}: expected numbers, got {values!r}")
