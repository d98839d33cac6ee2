"""A sweep as tables: seconds and extra memory along each axis, and how they grow with the classes."""

from __future__ import annotations

from bench import peers
from bench.cases import Case
from bench.peers import BASELINE, SAMPLED_BASELINE
from bench.peers.ours import Ours
from bench.report import NONE, describe_case, print_gates, print_machine
from bench.show import Output
from bench.slopes import rounded, slopes
from bench.sweep_result import Axis, Point, Sweep

NAMES = {*peers.names(), "ours@0"}
LETTERS = {"classes": "C", "rows": "B", "features": "D"}


def print_sweep(sweep: Sweep, out: Output) -> None:
    """Machine, errors, tables, slopes, and why anything is missing."""
    print_machine(sweep.machine, out)
    print_gates(sweep.gates, out)
    directions = list(dict.fromkeys(point.case.backward for point in sweep.points))
    for axis in sweep.axes:
        for backward in directions:
            _print_axis(sweep, axis, backward, out)
    _print_frontier(sweep, out)
    _print_slopes(sweep, directions, out)
    _print_notes(sweep, out)
    out.line(
        f"\n{sweep.took_seconds:.0f} s of {sweep.budget_seconds:.0f} s"
        + ("" if sweep.complete else "; it was stopped before its end, this is what there was")
    )


def direction(backward: bool) -> str:
    """As titles have it."""
    return "forward and both gradients" if backward else "forward alone, without autograd"


def _print_axis(sweep: Sweep, axis: Axis, backward: bool, out: Output) -> None:
    values = sweep.values(axis)
    if not values:
        return
    letter = LETTERS[axis.varies]
    columns = ["head", *(f"{letter}={value:,}" for value in values)]
    labels = labels_of(sweep, axis, backward)
    others = ", ".join(
        f"{other}={getattr(axis.case, name):,}" for name, other in LETTERS.items() if name != axis.varies
    )
    of = f"against {letter}, {direction(backward)}: {others}{_dtype(sweep, axis)}"
    for title, cell, caption in (
        (
            f"Seconds {of}",
            _seconds,
            f"median (quartiles) [times {BASELINE}, or {SAMPLED_BASELINE} if sampled]",
        ),
        (f"Extra memory {of}", _memory, "peak of a step in MB (1e6 bytes), beside inputs and gradients"),
    ):
        rows = []
        for peer, label in labels.items():
            line = dict(sweep.line(axis, peer, backward=backward))
            rows.append([label, *(cell(sweep, line[v]) if v in line else NONE for v in values)])
        out.table(title, columns, rows, caption)


def _dtype(sweep: Sweep, axis: Axis) -> str:
    """What the axis' inputs are stored in, where that differs from axis to axis."""
    several = len({each.case.dtype for each in sweep.axes}) > 1
    return f", {axis.case.dtype} centres" if several else ""


def labels_of(sweep: Sweep, axis: Axis, backward: bool) -> dict[str, str]:
    """Peer -> label of those with a point along the axis; of chunk sizes the last one counts."""
    found: dict[str, str] = {}
    for value in sweep.values(axis):
        for peer, point in sweep.at(axis.at(value, backward=backward)).items():
            found[peer] = point.label
    # Other workspaces are at one shape only: they have a table of their own.
    return {peer: label for peer, label in found.items() if peer in NAMES or ":" in peer}


def frontier(sweep: Sweep) -> list[Point]:
    """Ours with each workspace, at the shape that has most of them, forward and backward."""
    shapes = [point.case for point in sweep.points if point.case.backward]
    found: list[Point] = []
    for case in dict.fromkeys(shapes):
        ours = [p for name, p in sweep.at(case).items() if name == "ours" or name.startswith("ours@")]
        found = max(found, ours, key=len)
    return sorted(found, key=workspace_bytes) if len(found) > 2 else []


def workspace_bytes(point: Point) -> int:
    """Of ours."""
    peer = peers.get(point.peer)
    assert isinstance(peer, Ours)
    return peer.workspace_bytes


def _print_frontier(sweep: Sweep, out: Output) -> None:
    rows = []
    for point in frontier(sweep):
        spread = point.spread
        rate = NONE if spread is None else f"{point.case.rows / spread.median:.4g}"
        rows.append([point.label, _memory(sweep, point), _seconds(sweep, point), rate])
    if rows:
        out.table(
            f"Workspaces, {direction(True)}: {describe_case(frontier(sweep)[0].case)}",
            ["head", "extra memory, MB", "seconds", "rows a second"],
            rows,
            "",
        )


def _seconds(sweep: Sweep, point: Point) -> str:
    spread = point.spread
    if spread is None:
        return _missing(point)
    text = f"{spread.median:.3g} ({spread.first_quartile:.3g}–{spread.third_quartile:.3g})"
    if (ratio := sweep.ratio(point)) is not None:
        text += f" [{ratio:.2f}]"
    if point.roofline_seconds is not None:
        text += f" {point.roofline_seconds / spread.median:.0%} of roofline"
    return text


def _memory(sweep: Sweep, point: Point) -> str:
    return _missing(point) if point.extra_bytes is None else f"{point.extra_bytes / 1e6:,.1f}"


def _missing(point: Point) -> str:
    """What stands in a cell without a number; the reasons follow below the tables."""
    if point.needs_bytes is not None:
        return f"needs {point.needs_bytes / 1e9:.3g} GB"
    return "FAILED" if point.error else NONE


def _print_slopes(sweep: Sweep, directions: list[bool], out: Output) -> None:
    rows = []
    for axis in (axis for axis in sweep.axes if axis.varies == "classes"):
        for backward in directions:
            for peer, label in labels_of(sweep, axis, backward).items():
                found = slopes(sweep, axis, peer, backward=backward)
                if found is None:
                    continue
                memory, added = found.memory_exponent, found.bytes_a_class
                rows.append(
                    [
                        f"{label}, B={axis.case.rows:,}{_dtype(sweep, axis)}, {direction(backward)}",
                        f"{found.first:,} to {found.last:,}",
                        f"{found.seconds_exponent:.2f}",
                        NONE if memory is None else rounded(memory, 2),
                        NONE if added is None else rounded(added, 1),
                    ]
                )
    if rows:
        out.table(
            "Growth with the classes",
            ["head", "classes", "seconds ~ C^", "extra memory ~ C^", "bytes a class"],
            rows,
            "exponents by least squares of the logarithms: 1 is linear, 0 is flat",
        )


def _print_notes(sweep: Sweep, out: Output) -> None:
    """Every reason once, with the shapes that it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for point in sweep.points:
        # How long a step would have taken stands in the JSON.
        text = f"FAILED: {point.error}" if point.error else (point.reason or "").partition(" for a step")[0]
        if text and point.needs_bytes is None:
            found.setdefault((point.peer, text), []).append(_place(point.case))
    for point in sweep.points:
        if point.apart and point.seconds:
            text = "timed by itself, since beside what others keep there was no room"
            found.setdefault((point.peer, text), []).append(_place(point.case))
    for (peer, text), places in found.items():
        places = list(dict.fromkeys(places))
        where = places[0] if len(places) == 1 else f"{len(places)} shapes, the first {places[0]}"
        out.line(f"{peer}: {text} ({where})")


def _place(case: Case) -> str:
    return f"B={case.rows:,}, C={case.classes:,}, D={case.features:,}, {case.dtype}"
