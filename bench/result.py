"""What a run found, and its JSON. Seconds and bytes throughout."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from bench.cases import Case
from bench.measure import Spread, quietest_run
from bench.peers import BASELINE, baseline

SCHEMA = 1
"""Version of the JSON: raised when a field changes its meaning or goes."""


@dataclass(frozen=True)
class Gate:
    """How far a peer is from float64 truth."""

    peer: str
    label: str
    errors: tuple[float, ...]
    """Relative errors of loss, dx and dw, or of the loss of a forward alone; empty where the peer raised."""
    limit: float
    passed: bool
    reason: str | None
    """Why it did not pass."""
    backward: bool = True
    dtype: str = "float32"
    """Of the inputs as they are stored."""
    note: str | None = None
    """What is to be known of one that passed."""


@dataclass(frozen=True)
class Memory:
    """Peak memory of a step beside inputs and gradients; None with the reason (not tried) or the error."""

    peer: str
    label: str
    case: Case
    extra_bytes: int | None
    why_not: str | None
    error: str | None


@dataclass(frozen=True)
class Result:
    """Everything that a table or a comparison of two runs needs."""

    case: Case
    spin: bool
    """Another process kept a core busy."""
    rounds: int
    gates: tuple[Gate, ...]
    skipped: dict[str, str]
    """Peers that cannot run the case, and why."""
    runs: tuple[dict[str, list[float]], ...]
    """Of each run: peer -> seconds of each round."""
    memory: tuple[Memory, ...]
    machine: dict[str, Any]
    command: str
    date: str
    keep_memory: bool = False
    """malloc was told to keep what is freed (bench/allocator.py)."""
    failed: dict[str, str] = field(default_factory=dict)
    """Peers that passed the gate and raised when they were to be timed, and what; they are in no run."""

    @property
    def ok(self) -> bool:
        """All peers were right, and what was to be measured was."""
        measured = not self.failed and not any(entry.error for entry in self.memory)
        return measured and all(gate.passed for gate in self.gates)

    @property
    def best_run(self) -> int | None:
        """The run that the headline is read from."""
        return quietest_run(self.runs) if self.runs else None

    def seconds(self, peer: str, run: int) -> Spread:
        return Spread.of(self.runs[run][peer])

    def ratio(self, peer: str, run: int) -> float | None:
        """Median of its baseline over the median of the peer: above 1 the peer is faster."""
        if (base := baseline(peer)) not in self.runs[run]:
            return None
        return self.seconds(base, run).median / self.seconds(peer, run).median

    def to_json(self) -> str:
        """The fields, and for readers without this code a summary of the best run."""
        best = self.best_run
        summary = {}
        if best is not None:
            for peer in self.runs[best]:
                spread = dataclasses.asdict(self.seconds(peer, best))
                ratios = [self.ratio(peer, run) for run in range(len(self.runs))]
                summary[peer] = spread | {
                    f"times_{BASELINE}": ratios[best],
                    f"times_{BASELINE}_by_run": ratios,
                }
        fields = dataclasses.asdict(self)
        return json.dumps({"schema": SCHEMA, **fields, "best_run": best, "summary": summary}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Result:
        """ValueError for text of another schema."""
        return cls.from_data(json.loads(text))

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Result:
        """From the JSON's object; ValueError for another schema."""
        if data.get("schema") != SCHEMA:
            raise ValueError(f"schema: expected {SCHEMA}, got {data.get('schema')!r}")
        return cls(
            case=Case(**data["case"]),
            spin=data["spin"],
            rounds=data["rounds"],
            gates=tuple(Gate(**(gate | {"errors": tuple(gate["errors"])})) for gate in data["gates"]),
            skipped=data["skipped"],
            runs=tuple(data["runs"]),
            memory=tuple(Memory(**(entry | {"case": Case(**entry["case"])})) for entry in data["memory"]),
            machine=data["machine"],
            command=data["command"],
            date=data["date"],
            keep_memory=data.get("keep_memory", False),
            failed=data.get("failed", {}),
        )
