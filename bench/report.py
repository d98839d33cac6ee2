"""A result as tables: errors and times of the case, memory of every case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import peers
from bench.cases import Case
from bench.peers import BASELINE, SAMPLED_BASELINE
from bench.peers.base import terms
from bench.result import Gate, Memory, Result
from bench.show import Output

NONE = "–"
BUSY = 0.5  # processes of others, in the minute before


def describe_case(case: Case) -> str:
    under = f" under {case.autocast} autocast" if case.autocast else ""
    under += " on a GPU" if case.device == "cuda" else ""
    return (
        f"B={case.rows:,}, C={case.classes:,}, D={case.features:,}, {case.dtype}{under}, "
        f"{case.margin}, s={case.scale:g}, {case.target_gradient} gradient"
    )


def print_report(result: Result, out: Output) -> None:
    """Machine, errors, times, memory, and why anything is missing."""
    print_machine(result.machine, out)
    print_gates(result.gates, out)
    if result.best_run is not None:
        _print_times(result, result.best_run, out)
    for name, reason in result.skipped.items():
        out.line(f"{name} not timed: {reason}")
    for name, error in result.failed.items():
        out.line(f"timing of {name} FAILED: {error}")
    if result.memory:
        _print_memory(result.memory, out)
    for note in dict.fromkeys(_memory_notes(result.memory)):
        out.line(note)


def print_machine(machine: dict[str, Any], out: Output) -> None:
    """What the numbers were measured on, and whether others used it."""
    out.line(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} threads, "
        f"kernels {machine['instruction_set']}, torch {machine['torch']}, commit {machine['commit']}"
    )
    if machine.get("gpu"):
        gpu = machine["gpu"]
        out.line(f"{gpu['card']}, driver {gpu['driver']}, {gpu['sm_clock_mhz']} MHz, CUDA {gpu['cuda']}")
    load = machine["load_average"]
    if load is not None and load > BUSY:
        out.line(f"The machine was busy: load {load} before the run. Ratios are not to be relied on.")


def print_gates(gates: Sequence[Gate], out: Output) -> None:
    """Each peer's errors."""
    rows = []
    several = len({gate.dtype for gate in gates}) > 1
    for gate in gates:
        errors = [f"{error:.1e}" for error in gate.errors]
        verdict = (gate.note or "ok") if gate.passed else f"FAILED: {gate.reason}"
        of = gate.label if gate.backward else f"{gate.label}, forward alone"
        of += f", {gate.dtype}" if several else ""
        rows.append([of, *errors, *[NONE] * (3 - len(errors)), verdict])
    limits = " or ".join(f"{limit:g}" for limit in sorted({gate.limit for gate in gates}))
    out.table(
        "Correctness gate, at a small size of the same kind",
        ["head", "loss", "dx", "dw", ""],
        rows,
        f"norm of the error over norm of float64 truth, at most {limits}; what fails is not measured",
    )


def _print_times(result: Result, best: int, out: Output) -> None:
    rows = []
    labels = {gate.peer: gate.label for gate in result.gates}
    for peer in result.runs[best]:
        spread = result.seconds(peer, best)
        ratios = [result.ratio(peer, run) for run in range(len(result.runs))]
        flops = terms(peers.get(peer), result.case).flops
        rows.append(
            [
                labels[peer],
                f"{spread.median:.4g}",
                f"{spread.first_quartile:.4g} to {spread.third_quartile:.4g}",
                _ratio(ratios[best]),
                " ".join(_ratio(ratio) for ratio in ratios),
                f"{flops / spread.median / 1e9:.4g}",
            ]
        )
    out.table(
        f"Forward and both gradients: {describe_case(result.case)}"
        + ", one core shared" * result.spin
        + ", freed memory kept by malloc" * result.keep_memory,
        ["head", "seconds", "quartiles", f"times {BASELINE}", "in each run", "GFLOP/s"],
        rows,
        f"median of {result.rounds} interleaved rounds, in the quietest of {len(result.runs)} runs (least "
        f"product of medians)\nGFLOP/s counts the three products that a step needs at least: 6·B·C·D = "
        f"{result.case.flops / 1e9:.4g} GFLOP; sampled modes are compared with {SAMPLED_BASELINE}",
    )


def _ratio(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.2f}"


def _print_memory(entries: tuple[Memory, ...], out: Output) -> None:
    cases = list(dict.fromkeys(entry.case for entry in entries))
    shapes = [f"B={case.rows:,}\nC={case.classes:,}\nD={case.features:,}" for case in cases]
    rows = []
    found = {(entry.peer, entry.case): entry.extra_bytes for entry in entries}
    labels = {entry.peer: entry.label for entry in entries}  # of chunk sizes the last one counts
    for peer, label in labels.items():
        cells = [found.get((peer, case)) for case in cases]
        rows.append([label, *(NONE if cell is None else f"{cell / 1e6:,.1f}" for cell in cells)])
    out.table(
        "Peak extra memory of a step, MB (1e6 bytes), beside inputs and the two gradients",
        ["head", *shapes],
        rows,
        "each number from a process of its own",
    )


def _memory_notes(entries: tuple[Memory, ...]) -> list[str]:
    notes = []
    for entry in entries:
        where = f"{entry.label} at C={entry.case.classes:,}"
        if entry.why_not:
            notes.append(f"memory of {where} not measured: {entry.why_not}")
        elif entry.error:
            notes.append(f"memory of {where} FAILED: {entry.error}")
    return notes
