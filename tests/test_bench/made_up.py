"""A sweep with made-up numbers: time grows with the FLOPs, memory with the logits or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from bench import peers, plans
from bench.cases import Case
from bench.records import BYTES, NO_ROOM, SECONDS, Gate, Header, Measurement, Run, Writer
from bench.runner import row

PEERS = ("ours", "ours@0", "eager", "torch_linear_dynamic", "ours_sampled", "partial_fc")
SPEED = {"ours": 3.0, "torch_linear_dynamic": 1.5, "ours_sampled": 2.0}
"""Times as fast as its baseline."""
FLAT_BYTES = 20_000_000
LARGEST = 100_000
"""Classes beyond which the eager head does not fit."""
MACHINE = {
    "cpu": "A processor",
    "cores": 2,
    "memory_bytes": 1,
    "instruction_set": "x86-64-v3",
    "torch_threads": 2,
    "load_average": 0.1,
    "torch": "2.13.0+cpu",
    "commit": "abc1234",
    "gpu": None,
}
HEADER = Header(
    "python -m bench sweep --quick --json x.jsonl", "2026-01-31T00:00:00+00:00", MACHINE, {"seconds": 90}
)
GATE = Gate("ours", "ours (exact)", (1e-8, 2e-7, 3e-7), 2e-5, True)


def rows_of(name: str, case: Case, runs: int = 1) -> list[Measurement]:
    """Median FLOPs/1e10 seconds over the speed, with 10% around it; each run is 1% slower than the last."""
    if name == "eager" and case.classes > LARGEST:
        why = {"status": NO_ROOM, "why": "needs about 33.3 GB", "needs_bytes": 33_300_000_000}
        return [row(what, name, case, **why) for what in (SECONDS, BYTES)]  # type: ignore[arg-type]
    peer = peers.get(name)
    own = peers.supported_case(peer, case)
    median = own.flops / 1e10 / SPEED.get(name, 2.0 if name.startswith("ours@") else 1.0)
    flat = FLAT_BYTES + 4 * case.classes + getattr(peer, "workspace_bytes", 0) // 10
    extra = flat if peers.is_ours(name) else 16 * case.rows * case.classes
    return [
        *(
            row(
                SECONDS, name, case, values=tuple(x * median * (0.99 + i / 100) for x in (0.9, 1, 1.1)), run=i
            )
            for i in range(1, runs + 1)
        ),
        row(BYTES, name, case, values=(extra,)),
    ]


def made_up(header: Header = HEADER, *, runs: int = 1) -> Run:
    shapes = dataclasses.replace(plans.QUICK, peers=PEERS).plan().shapes
    rows = [m for shape in shapes for name in shape.peers for m in rows_of(name, shape.case, runs)]
    return Run(header, (GATE,), tuple(rows), complete=True, took_seconds=80.5)


def changed(run: Run, change: Callable[[Measurement], Measurement | None]) -> Run:
    """The run with other measurements; None leaves one out."""
    rows = [new for m in run.measurements if (new := change(m)) is not None]
    return dataclasses.replace(run, measurements=tuple(rows))


def written(path: Path, run: Run) -> Path:
    """The file that a writer makes of a run."""
    writer = Writer(path, run.header)
    writer.add(*run.gates, *run.measurements)
    if run.complete:
        writer.end(run.took_seconds)
    return path
