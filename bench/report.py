"""A result as tables: errors and times of the case, memory of every case."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.cases import Case
from bench.peers import BASELINE
from bench.result import Memory, Result

NONE = "–"
BUSY = 0.5  # processes of others, in the minute before


def describe_case(case: Case) -> str:
    return (
        f"B={case.rows:,}, C={case.classes:,}, D={case.features:,}, {case.dtype}, {case.margin}, "
        f"s={case.scale:g}, {case.target_gradient} gradient"
    )


def print_report(result: Result, console: Console) -> None:
    """Machine, errors, times, memory, and why anything is missing."""
    machine = result.machine
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} threads, "
        f"kernels {machine['instruction_set']}, torch {machine['torch']}, commit {machine['commit']}"
    )
    load = machine["load_average"]
    if load is not None and load > BUSY:
        console.print(f"The machine was busy: load {load} before the run. Ratios are not to be relied on.")
    _print_gate(result, console)
    if result.best_run is not None:
        _print_times(result, result.best_run, console)
    for name, reason in result.skipped.items():
        console.print(f"{name} not timed: {reason}")
    if result.memory:
        _print_memory(result.memory, console)
    for note in dict.fromkeys(_memory_notes(result.memory)):
        console.print(escape(note))


def _table(*columns: str) -> Table:
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _print_gate(result: Result, console: Console) -> None:
    table = _table("head", "loss", "dx", "dw", "")
    for gate in result.gates:
        errors = [f"{error:.1e}" for error in gate.errors] or [NONE] * 3
        table.add_row(gate.label, *errors, "ok" if gate.passed else f"FAILED: {escape(str(gate.reason))}")
    limit = max((gate.limit for gate in result.gates), default=0.0)
    _print(
        console,
        "Correctness gate, at a small size of the same kind",
        table,
        f"norm of the error over norm of float64 truth, at most {limit:g}; what fails is not measured",
    )


def _print_times(result: Result, best: int, console: Console) -> None:
    table = _table("head", "seconds", "quartiles", f"times {BASELINE}", "in each run", "GFLOP/s")
    labels = {gate.peer: gate.label for gate in result.gates}
    for peer in result.runs[best]:
        spread = result.seconds(peer, best)
        ratios = [result.ratio(peer, run) for run in range(len(result.runs))]
        table.add_row(
            labels[peer],
            f"{spread.median:.4g}",
            f"{spread.first_quartile:.4g} to {spread.third_quartile:.4g}",
            _ratio(ratios[best]),
            " ".join(_ratio(ratio) for ratio in ratios),
            f"{result.case.flops / spread.median / 1e9:.4g}",
        )
    _print(
        console,
        f"Forward and both gradients: {describe_case(result.case)}" + (", one core shared" * result.spin),
        table,
        f"median of {result.rounds} interleaved rounds, in the quietest of {len(result.runs)} runs (least "
        f"sum of medians)\nGFLOP/s counts the three products that a step needs at least: 6·B·C·D = "
        f"{result.case.flops / 1e9:.4g} GFLOP",
    )


def _ratio(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.2f}"


def _print_memory(entries: tuple[Memory, ...], console: Console) -> None:
    cases = list(dict.fromkeys(entry.case for entry in entries))
    shapes = [f"B={case.rows:,}\nC={case.classes:,}\nD={case.features:,}" for case in cases]
    table = _table("head", *shapes)
    found = {(entry.label, entry.case): entry.extra_bytes for entry in entries}
    for label in dict.fromkeys(entry.label for entry in entries):
        cells = [found[label, case] for case in cases]
        table.add_row(label, *(NONE if cell is None else f"{cell / 1e6:,.1f}" for cell in cells))
    _print(
        console,
        "Peak extra memory of a step, MB (1e6 bytes), beside inputs and the two gradients",
        table,
        "each number from a process of its own",
    )


def _print(console: Console, title: str, table: Table, caption: str) -> None:
    """Title and caption outside the table, which would break them at its own width."""
    console.print(f"\n{title}", style="bold")
    console.print(table)
    console.print(caption)


def _memory_notes(entries: tuple[Memory, ...]) -> list[str]:
    notes = []
    for entry in entries:
        where = f"{entry.label} at C={entry.case.classes:,}"
        if entry.why_not:
            notes.append(f"memory of {where} not measured: {entry.why_not}")
        elif entry.error:
            notes.append(f"memory of {where} FAILED: {entry.error}")
    return notes
