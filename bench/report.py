"""Prints a run as plain tables: errors, seconds and memory of every shape, growth with the classes.

The functions that write numbers are those of the documents, too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.cases import Case
from bench.peers import BASELINE, SAMPLED_BASELINE
from bench.records import BYTES, MEASURED, NO_ROOM, ROOFLINE, Measurement, Run, Spread

NOTHING = "–"
BUSY = 0.5  # processes of others, in the minute before
FROM, TO = 100_000, 4_000_000
"""The classes between which growth is judged."""


@dataclass(frozen=True)
class Growth:
    """Powers of C by least squares of the logarithms: 1 is linear, 0 is flat; and what a class adds."""

    first: int
    last: int
    """Classes."""
    seconds_exponent: float
    memory_exponent: float | None
    bytes_per_class: float | None
    """Extra memory of the last point less the first's, over the classes between."""


def exponent(values: list[tuple[int, float]]) -> float:
    """Return the slope of log y over log x."""
    logs = [math.log(x) for x, _ in values], [math.log(y) for _, y in values]
    return statistics.linear_regression(*logs).slope


def growth(run: Run, case: Case, peer: str) -> Growth | None:
    """Fit the peer along the classes from FROM to TO, or all if none are there; None below two points.

    Memory's growth is known only where it was measured at the first and the last of them.
    """
    timed = [(c, m.value) for c, m in run.line(case, peer) if m.value is not None]
    within = [(c, y) for c, y in timed if FROM <= c <= TO]
    timed = within if len(within) > 1 else timed
    if len(timed) < 2:
        return None
    first, last = timed[0][0], timed[-1][0]
    held = [
        (c, m.value) for c, m in run.line(case, peer, BYTES) if first <= c <= last and m.value is not None
    ]
    known = {first, last} <= {c for c, _ in held} and all(y > 0 for _, y in held)
    return Growth(
        first,
        last,
        exponent(timed),
        exponent(held) if known else None,
        (held[-1][1] - held[0][1]) / (last - first) if known else None,
    )


def print_run(run: Run) -> None:
    """Print everything that was recorded, and why anything is missing."""
    _print_machine(run.header.machine)
    _print_gates(run)
    shapes = {case.shape: case for case in [*run.cases(BYTES), *run.cases()]}
    for case in shapes.values():
        _print_shape(run, case)
    print(
        "Medians of interleaved rounds; of several runs the least disturbed one. Extra memory: the peak of\n"
        "a step beside inputs and gradients, each from a process of its own. GFLOP/s by the least that a\n"
        f"step needs. Heads that sample the classes are compared with {SAMPLED_BASELINE}."
    )
    _print_growth(run)
    _print_missing(run)


def _print_machine(machine: dict[str, Any]) -> None:
    """Print what the numbers were measured on, and whether others used it."""
    print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} threads, "
        f"kernels {machine['instruction_set']}, torch {machine['torch']}, commit {machine['commit']}"
    )
    if machine.get("gpu"):
        gpu = machine["gpu"]
        print(f"{gpu['card']}, driver {gpu['driver']}, {gpu['sm_clock_mhz']} MHz, CUDA {gpu['cuda']}")
    load = machine["load_average"]
    if load is not None and load > BUSY:
        print(f"The machine was busy: load {load} before the run. Ratios are not to be relied on.")


def _print_gates(run: Run) -> None:
    """Print each peer's errors."""
    if not run.gates:
        return
    rows = []
    for gate in run.gates:
        errors = [f"{error:.1e}" for error in gate.errors]
        verdict = (gate.note or "ok") if gate.passed else f"FAILED: {gate.reason}"
        of = f"{gate.label}, {gate.dtype}" + ("" if gate.backward else ", forward alone")
        rows.append([of, *errors, *[NOTHING] * (3 - len(errors)), verdict])
    limits = " or ".join(f"{limit:g}" for limit in sorted({gate.limit for gate in run.gates}))
    print_table("Correctness gate, at a small size of the same kind", ["head", "loss", "dx", "dw", ""], rows)
    print(f"norm of the error over norm of float64 truth, at most {limits}; what fails is not measured")


def _print_shape(run: Run, case: Case) -> None:
    under = "".join(f", {name.replace('_', ' ')}" for name, on in run.header.settings.items() if on is True)
    timed, held, rows = run.at(case), run.at(case, BYTES), []
    for peer, found in (held | timed).items():
        memory = held[peer].value if peer in held else None
        ratios = [run.ratio(case, peer, i) for i in run.runs(case)] if peer in timed else []
        extra = missing(held.get(peer)) if memory is None else f"{memory / 1e6:,.1f}"
        rows.append([found.label, *_seconds(run, timed.get(peer)), ratios_of(ratios), extra])
    columns = ["head", "seconds", "quartiles", "rounds", "GFLOP/s", f"times {BASELINE}, each run", "extra MB"]
    print_table(f"{case.describe()}{under}", columns, rows)


def _seconds(run: Run, found: Measurement | None) -> list[str]:
    """Return the cells: median, quartiles, rounds, GFLOP/s with the share of the roofline if it is known."""
    if found is None or not found.values:
        return ["not timed" if found is None else missing(found), NOTHING, NOTHING, NOTHING]
    spread = Spread.of(found.values)
    rate = f"{found.case.flops / spread.median / 1e9:.4g}"
    roofline = run.at(found.case, ROOFLINE).get(found.peer)
    if roofline is not None and roofline.value is not None:
        rate += f", {roofline.value / spread.median:.0%} of roofline"
    quartiles = f"{spread.first_quartile:.3g} to {spread.third_quartile:.3g}"
    return [f"{spread.median:.3g}", quartiles, str(len(found.values)), rate]


def missing(found: Measurement | None) -> str:
    """Say in a cell why there is no number; the reasons follow below the tables."""
    if found is None or found.status == MEASURED:
        return NOTHING
    if found.status == NO_ROOM and found.needs_bytes is not None:
        return f"needs {found.needs_bytes / 1e9:.3g} GB"
    return "out of memory" if found.status == NO_ROOM else found.status


def _print_growth(run: Run) -> None:
    lines = {(c.rows, c.features, c.dtype, c.backward): c for c in reversed(run.cases())}
    rows = []
    for case in reversed(lines.values()):
        for peer, found in run.at(case).items():
            if (fit := growth(run, case, peer)) is not None:
                of = f"{found.label}, B={case.rows:,}, D={case.features:,}" + (
                    "" if case.backward else ", forward"
                )
                rows.append([of, f"{fit.first:,} to {fit.last:,}", *growth_cells(fit)])
    if rows:
        columns = ["head", "classes", "seconds ~ C^", "extra memory ~ C^", "bytes per class"]
        print_table("Growth with the classes", columns, rows)
        print("exponents by least squares of the logarithms: 1 is linear, 0 is flat")


def growth_cells(fit: Growth) -> list[str]:
    """Write the two exponents, and the bytes that a class adds."""
    memory, added = fit.memory_exponent, fit.bytes_per_class
    return [
        f"{fit.seconds_exponent:.2f}",
        NOTHING if memory is None else rounded(memory, 2),
        NOTHING if added is None else rounded(added, 1),
    ]


def _print_missing(run: Run) -> None:
    """Print every reason once, with the shapes that it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for m in run.measurements:
        if m.why is not None:
            what = "memory of " if m.what == BYTES and run.at(m.case).get(m.peer) is None else ""
            places = found.setdefault((f"{what}{m.peer}", f"{m.status}: {m.why}"), [])
            place = f"B={m.case.rows:,}, C={m.case.classes:,}, D={m.case.features:,}, {m.case.dtype}"
            places += [place] if place not in places else []
    for (peer, text), places in found.items():
        where = places[0] if len(places) == 1 else f"{len(places)} shapes, the first {places[0]}"
        print(f"{peer}: {text} ({where})")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print plain text, the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    print(f"\n{title}")
    for row in (columns, *rows):
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())


def ratios_of(ratios: Sequence[float | None]) -> str:
    """Write one ratio per run."""
    return ", ".join(NOTHING if ratio is None else f"{ratio:.2f}" for ratio in ratios) or NOTHING


def rounded(value: float, digits: int) -> str:
    """Write a number without the minus that a small one's 0 would have."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def seconds_of(value: float) -> str:
    """Write two digits, three from 1 on."""
    return f"{value:.3g}" if value >= 1 else f"{value:.2g}"


def megabytes_of(value: float) -> str:
    return f"{value / 1e6:,.0f}"


def bytes_of(value: float) -> str:
    return f"{value / 1e9:.2g} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
