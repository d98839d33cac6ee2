"""What came out, as plain data: accuracy, paired differences, gradient, angles. `markdown.py` prints it.

Everything is computed from the runs' JSON alone, the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .choice import scores
from .heads import SLOPE_OF_COSINE, title
from .plan import (
    CELLS,
    CHOICE,
    CONDITIONS,
    FINAL,
    MEND,
    MORE,
    Cell,
    Configuration,
    Head,
    Run,
    Try,
    choices,
    head_name,
)
from .statistics import Difference, paired_difference

Records = Mapping[Run, dict[str, Any]]
Scores = dict[int, float]  # seed -> score

METRICS = {"TAR@1e-2": "0.01", "TAR@1e-3": "0.001", "TAR@1e-4": "0.0001"}
DECISIVE = "TAR@1e-3"
ANGLES_OF = "flip30"  # the condition whose distributions are drawn
SHARES_OF = ("flip30", 8.0)  # the condition and the scale at which tries are compared
WIDEST = 0.02  # a difference whose interval is wider than ± this is called undecided


def tables(configuration: Configuration, records: Records) -> dict[str, Any]:
    """All tables of the report."""
    cells = by_cell(records)
    strengths = {
        (run.stage, run.condition, run.head): (run.m, run.scale) for run in records if run.stage != CHOICE
    }
    return {
        "runs": {stage: sum(run.stage == stage for run in records) for stage in (CHOICE, FINAL, MEND, MORE)},
        "core_hours": round(sum(record["seconds"] for record in records.values()) / 3600, 2),
        "machines": sorted({record["machine"]["cpu"] for record in records.values()}),
        "torch": sorted({record["machine"]["torch"] for record in records.values()}),
        "pictures": _pictures(set(cells)),
        "choice": _choice(configuration, records),
        "tried_shares": _tried_shares(records),
        "accuracy": [
            {**_accuracy(cell, cells[cell]), "m": strengths[cell][0], "scale": strengths[cell][1]}
            for cell in CELLS
            if cell in cells
        ],
        "differences": [
            _difference(a, b, cells, strengths, _score_of(DECISIVE))
            for a, b in compared()
            if a in cells and b in cells
        ],
        "noise": [_noise(cell, cells[cell]) for cell in CELLS if cell in cells],
        "gradient_differences": [
            {**_difference(a, b, cells, strengths, _gradient_at(epoch)), "epoch": epoch}
            for a, b in compared_gradients()
            if a in cells and b in cells
            for epoch in shown_epochs(configuration.recipe.epochs)
        ],
    }


def _pictures(cells: set[Cell]) -> list[str]:
    """What there is something to draw for."""
    final = {condition for stage, condition, _ in cells if stage == FINAL}
    there = {
        "accuracy": bool(final),
        "gradient": any(CONDITIONS[condition].share for condition in final),
        "angles": ANGLES_OF in final,
        "mending": any(stage == MEND for stage, *_ in cells),
    }
    return [name for name, drawn in there.items() if drawn]


def by_cell(records: Records) -> dict[Cell, dict[int, dict[str, Any]]]:
    """The judged runs: cell -> seed -> record."""
    found: dict[Cell, dict[int, dict[str, Any]]] = {}
    for run, record in records.items():
        if run.stage != CHOICE:
            found.setdefault((run.stage, run.condition, run.head), {})[run.seed] = record
    return found


def shown_epochs(last: int) -> list[int]:
    """First, middle and last."""
    return sorted({1, (last + 1) // 2, last})


def compared() -> list[tuple[Cell, Cell]]:
    """The pairs of cells whose scores are compared, laid down before any of them was trained.

    Those of the further runs were laid down when the others were known.
    """
    found: list[tuple[Cell, Cell]] = []
    for condition in CONDITIONS:
        for mode in ("detached", "exact"):
            found += [
                ((FINAL, condition, ("expface", mode)), (FINAL, condition, other)) for other in _rivals(mode)
            ]
        found += [
            ((FINAL, condition, (margin, "exact")), (FINAL, condition, (margin, "detached")))
            for margin in ("sphereface", "arcface", "expface")
        ]
    for stage, condition, (margin, mode) in CELLS:
        if stage == MEND:
            others = HELD_AGAINST.get(mode, ("exact", "detached"))
            found += [((stage, condition, (margin, mode)), (stage, condition, (margin, o))) for o in others]
        if stage == MORE:
            found += _compared_further((stage, condition, (margin, mode)))
    return found


# A mode of the mending series against others; the rest against the exact and the detached one.
HELD_AGAINST = {
    "exact": (),
    "detached": ("exact",),
    "rising": ("exact", "detached", "detached-rising"),
    "detached-rising": ("detached",),
}


def _compared_further(cell: Cell) -> list[tuple[Cell, Cell]]:
    """ExpFace of the main series against a further run; and that, if exact, against its detached self."""
    _, condition, head = cell
    pairs = [
        ((FINAL, condition, ("expface", mode)), cell)
        for mode in ("detached", "exact")
        if head in _rivals(mode)
    ]
    if head[1] == "exact":
        pairs.append((cell, (FINAL, condition, (head[0], "detached"))))
    return pairs


def compared_gradients() -> list[tuple[Cell, Cell]]:
    """The same for the share of the gradient that wrong rows take: ExpFace against ArcFace and CosFace."""
    return [
        (a, b)
        for a, b in compared()
        if CONDITIONS[a[1]].share and a[2][0] == "expface" and b[2][0] in ("arcface", "cosface")
    ]


def _rivals(mode: str) -> list[Head]:
    return [
        (margin, "detached" if margin in SLOPE_OF_COSINE else mode)
        for margin in ("normface", "sphereface", "cosface", "arcface")
    ]


def _choice(configuration: Configuration, records: Records) -> list[dict[str, Any]]:
    """Each head's tries under each condition, best first; left out where they are not all there."""
    rows = []
    for head, condition in choices(CELLS):
        tried = scores(records, head, condition)
        if not set(configuration.tries[head[0]]) <= tried.keys():
            continue
        # Sorting is stable: of equal ones the first stays first, as in the choice.
        order = sorted(configuration.tries[head[0]], key=lambda entry: -tried[entry])
        tries = [{"m": m, "scale": scale, "score": _short(tried[m, scale])} for m, scale in order]
        rows.append({"condition": condition, "head": head_name(head), "title": title(*head), "tries": tries})
    return rows


def _tried_shares(records: Records) -> list[dict[str, Any]]:
    """Of the tries at one scale, the least first: wrong rows' share of the gradient in the last epoch."""
    condition, scale = SHARES_OF
    rows = []
    for run, record in records.items():
        if (run.stage, run.condition, run.scale) == (CHOICE, condition, scale) and record["epochs"]:
            last = record["epochs"][-1]
            shares = {name: _short(last[name]) for name in ("gradient_share", "push_share")}
            rows.append({"title": title(*run.head), "m": run.m, "epoch": last["epoch"], **shares})
    return sorted(rows, key=lambda row: row["gradient_share"] or 0.0)


def _accuracy(cell: Cell, runs: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    row = {
        **_names(cell),
        "seeds": sorted(runs),
        "diverged": sum(run["failed"] is not None for run in runs.values()),
    }
    for name in (*METRICS, "rank-1"):
        row[name] = _mean_and_deviation(list(_score_of(name)(runs).values()))
    return row


def _score_of(name: str) -> Callable[[Mapping[int, dict[str, Any]]], Scores]:
    """Of a cell's runs: seed -> score; those that diverged have none."""

    def read(runs: Mapping[int, dict[str, Any]]) -> Scores:
        results = {seed: run["result"] for seed, run in runs.items() if run["result"]}
        if name == "rank-1":
            return {seed: result["rank1"] for seed, result in results.items()}
        return {seed: result["tar"][METRICS[name]] for seed, result in results.items()}

    return read


def _gradient_at(epoch: int) -> Callable[[Mapping[int, dict[str, Any]]], Scores]:
    def read(runs: Mapping[int, dict[str, Any]]) -> Scores:
        return {
            seed: run["epochs"][epoch - 1]["gradient_share"]
            for seed, run in runs.items()
            if len(run["epochs"]) >= epoch
        }

    return read


def _difference(
    a: Cell,
    b: Cell,
    cells: Mapping[Cell, Mapping[int, dict[str, Any]]],
    strengths: Mapping[Cell, Try],
    read: Callable[[Mapping[int, dict[str, Any]]], Scores],
) -> dict[str, Any]:
    """a − b. Where a training of either diverged nothing is compared: the rest would be a selection."""
    row = {
        "stage": MORE if MORE in (a[0], b[0]) else a[0],
        "condition": a[1],
        "heads": [head_name(cell[2]) for cell in (a, b)],
        "scales": [strengths[cell][1] for cell in (a, b)],
        "ms": [strengths[cell][0] for cell in (a, b)],
        "a": _called(a, strengths[a]),
        "b": _called(b, strengths[b]),
    }
    diverged = any(run["failed"] for cell in (a, b) for run in cells[cell].values())
    found = None if diverged else paired_difference(read(cells[a]), read(cells[b]))
    if found is None:
        return {**row, **_rounded(Difference(0, math.nan, None, None)), "higher": None, "decided": False}
    return {**row, **_rounded(found), "higher": found.higher, "decided": found.decided(WIDEST)}


def _called(cell: Cell, strength: Try) -> str:
    """A head's name; with its m and s where it is a further one, which stands beside itself at others."""
    stage, _, head = cell
    if stage != MORE:
        return title(*head)
    m, scale = strength
    return f"{title(*head)} (" + ("" if m is None else f"m = {m:g}, ") + f"s = {scale:g})"


def _rounded(found: Difference) -> dict[str, Any]:
    return {"n": found.n, "mean": _short(found.mean), "low": _short(found.low), "high": _short(found.high)}


def _noise(cell: Cell, runs: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Of each epoch, means over the seeds: shares of the gradient, mean angles, histograms summed."""
    epochs = []
    for number in range(max(len(run["epochs"]) for run in runs.values())):
        there = [run["epochs"][number] for run in runs.values() if len(run["epochs"]) > number]
        row: dict[str, Any] = {"epoch": number + 1, "scale": there[0]["scale"]}
        for name in ("gradient_share", "push_share"):
            row[name] = _mean([epoch[name] for epoch in there])
        for group in ("clean", "noisy"):
            parts = [epoch[group] for epoch in there if epoch[group]]
            row[group] = _angles(parts) if parts else None
        epochs.append(row)
    return {**_names(cell), "epochs": epochs}


def _angles(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "angle_mean": _mean([part["angle_mean"] for part in parts]),
        "angle_percentiles": [
            _mean(list(column)) for column in zip(*(part["angle_percentiles"] for part in parts), strict=True)
        ],
        "accuracy": _mean([part["accuracy"] for part in parts]),
        "histogram": np.sum([part["histogram"] for part in parts], axis=0).tolist(),
    }


def _names(cell: Cell) -> dict[str, Any]:
    stage, condition, head = cell
    return {"stage": stage, "condition": condition, "head": head_name(head), "title": title(*head)}


def _mean_and_deviation(values: list[float]) -> dict[str, Any]:
    """Of the seeds; the deviation is that of a sample, None of a single one."""
    if not values:
        return {"mean": None, "deviation": None}
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": _short(float(np.mean(values))), "deviation": _short(deviation)}


def _mean(values: list[Any]) -> float | None:
    there = [value for value in values if value is not None]
    return _short(float(np.mean(there))) if there else None


def _short(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 5)
