"""Tables as plain data: accuracy, paired differences, gradients, angles. `markdown.py` formats them.

Everything is computed from the results alone, the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .heads import SLOPE_OF_COSINE, title
from .intervals import Difference, paired_difference
from .plan import (
    CELLS,
    CONDITIONS,
    FINAL,
    FOLLOWUP,
    REMEDY,
    TUNING,
    Cell,
    Configuration,
    Head,
    Records,
    Setting,
    head_name,
    trial_scores,
    tunings,
)

# Difference, paired_difference

Runs = Mapping[int, dict[str, Any]]  # of one cell: seed -> record
Scores = dict[int, float]  # seed -> score
STAGES = (TUNING, FINAL, REMEDY, FOLLOWUP)

METRICS = {"TAR@1e-2": "0.01", "TAR@1e-3": "0.001", "TAR@1e-4": "0.0001"}
DECISIVE = "TAR@1e-3"
ANGLES_OF = "flip30"  # the condition whose histograms are plotted
SHARES_OF = ("flip30", 8.0)  # the condition and the scale at which trials are compared
WIDEST = 0.02  # a difference with an interval wider than ± this is called undecided


def tables(configuration: Configuration, records: Records) -> dict[str, Any]:
    """Compute all tables of the report."""
    cells = by_cell(records)
    settings = {
        (run.stage, run.condition, run.head): (run.m, run.scale) for run in records if run.stage != TUNING
    }
    return {
        "runs": {stage: sum(run.stage == stage for run in records) for stage in STAGES},
        "core_hours": round(sum(record["seconds"] for record in records.values()) / 3600, 2),
        "machines": sorted({record["machine"]["cpu"] for record in records.values()}),
        "torch": sorted({record["machine"]["torch"] for record in records.values()}),
        "pictures": _pictures(set(cells)),
        "tuning": _tuning(configuration, records),
        "trial_shares": _trial_shares(records),
        "accuracy": [
            {**_accuracy(cell, cells[cell]), "m": settings[cell][0], "scale": settings[cell][1]}
            for cell in CELLS
            if cell in cells
        ],
        "differences": [
            _difference(a, b, cells, settings, _score_of(DECISIVE))
            for a, b in compared()
            if a in cells and b in cells
        ],
        "noise": [_noise(cell, cells[cell]) for cell in CELLS if cell in cells],
        "gradient_differences": [
            {**_difference(a, b, cells, settings, _gradient_at(epoch)), "epoch": epoch}
            for a, b in compared_gradients()
            if a in cells and b in cells
            for epoch in shown_epochs(configuration.recipe.epochs)
        ],
    }


def _pictures(cells: set[Cell]) -> list[str]:
    """Return the names of the figures that there is data for."""
    final = {condition for stage, condition, _ in cells if stage == FINAL}
    there = {
        "accuracy": bool(final),
        "gradient": any(CONDITIONS[condition].share for condition in final),
        "angles": ANGLES_OF in final,
        "remedies": any(stage == REMEDY for stage, *_ in cells),
    }
    return [name for name, drawn in there.items() if drawn]


def by_cell(records: Records) -> dict[Cell, dict[int, dict[str, Any]]]:
    """Group the runs on test: cell -> seed -> record."""
    found: dict[Cell, dict[int, dict[str, Any]]] = {}
    for run, record in records.items():
        if run.stage != TUNING:
            found.setdefault((run.stage, run.condition, run.head), {})[run.seed] = record
    return found


def shown_epochs(last: int) -> list[int]:
    """Return the first, the middle and the last epoch."""
    return sorted({1, (last + 1) // 2, last})


def compared() -> list[tuple[Cell, Cell]]:
    """Return the pairs of cells whose scores are compared, which were fixed before any of them was trained.

    The pairs with follow-up runs were fixed when the other results were known.
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
        if stage == REMEDY:
            others = COMPARED_WITH.get(mode, ("exact", "detached"))
            found += [((stage, condition, (margin, mode)), (stage, condition, (margin, o))) for o in others]
        if stage == FOLLOWUP:
            found += _compared_followups((stage, condition, (margin, mode)))
    return found


# What each mode of the remedies series is compared with; those not named: the exact and the detached one.
COMPARED_WITH = {
    "exact": (),
    "detached": ("exact",),
    "rising": ("exact", "detached", "detached-rising"),
    "detached-rising": ("detached",),
}


def _compared_followups(cell: Cell) -> list[tuple[Cell, Cell]]:
    """Pair ExpFace of the main series with a follow-up run; and that, if exact, with its detached self."""
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
    """Return the pairs whose gradient shares are compared: ExpFace with ArcFace and CosFace."""
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


def _tuning(configuration: Configuration, records: Records) -> list[dict[str, Any]]:
    """List each head's trials under each condition, best first; omitted where some are missing."""
    rows = []
    for head, condition in tunings(CELLS):
        scores = trial_scores(records, head, condition)
        if not set(configuration.trials[head[0]]) <= scores.keys():
            continue
        # Sorting is stable: of equal trials the first stays first, as in tuning.
        order = sorted(configuration.trials[head[0]], key=lambda entry: -scores[entry])
        trials = [{"m": m, "scale": scale, "score": _short(scores[m, scale])} for m, scale in order]
        rows.append(
            {"condition": condition, "head": head_name(head), "title": title(*head), "trials": trials}
        )
    return rows


def _trial_shares(records: Records) -> list[dict[str, Any]]:
    """List the trials at one scale by the noisy samples' share of the gradient in the last epoch."""
    condition, scale = SHARES_OF
    rows = []
    for run, record in records.items():
        if (run.stage, run.condition, run.scale) == (TUNING, condition, scale) and record["epochs"]:
            last = record["epochs"][-1]
            shares = {name: _short(last[name]) for name in ("gradient_share", "push_share")}
            rows.append({"title": title(*run.head), "m": run.m, "epoch": last["epoch"], **shares})
    return sorted(rows, key=lambda row: row["gradient_share"] or 0.0)


def _accuracy(cell: Cell, runs: Runs) -> dict[str, Any]:
    row = {
        **_names(cell),
        "seeds": sorted(runs),
        "diverged": sum(run["failed"] is not None for run in runs.values()),
    }
    for name in (*METRICS, "rank-1"):
        row[name] = _mean_and_deviation(list(_score_of(name)(runs).values()))
    return row


def _score_of(name: str) -> Callable[[Runs], Scores]:
    """Return a function from a cell's runs to seed -> score, without the runs that diverged."""

    def read(runs: Runs) -> Scores:
        results = {seed: run["result"] for seed, run in runs.items() if run["result"]}
        if name == "rank-1":
            return {seed: result["rank1"] for seed, result in results.items()}
        return {seed: result["tar"][METRICS[name]] for seed, result in results.items()}

    return read


def _gradient_at(epoch: int) -> Callable[[Runs], Scores]:
    def read(runs: Runs) -> Scores:
        return {
            seed: run["epochs"][epoch - 1]["gradient_share"]
            for seed, run in runs.items()
            if len(run["epochs"]) >= epoch
        }

    return read


def _difference(
    a: Cell,
    b: Cell,
    cells: Mapping[Cell, Runs],
    settings: Mapping[Cell, Setting],
    read: Callable[[Runs], Scores],
) -> dict[str, Any]:
    """Compare a − b; not where a training of either diverged: the rest would be a selection."""
    row = {
        "stage": FOLLOWUP if FOLLOWUP in (a[0], b[0]) else a[0],
        "condition": a[1],
        "heads": [head_name(cell[2]) for cell in (a, b)],
        "scales": [settings[cell][1] for cell in (a, b)],
        "ms": [settings[cell][0] for cell in (a, b)],
        "a": _called(a, settings[a]),
        "b": _called(b, settings[b]),
    }
    diverged = any(run["failed"] for cell in (a, b) for run in cells[cell].values())
    found = None if diverged else paired_difference(read(cells[a]), read(cells[b]))
    if found is None:
        return {**row, **_rounded(Difference(0, math.nan, None, None)), "higher": None, "decided": False}
    return {**row, **_rounded(found), "higher": found.higher, "decided": found.decided(WIDEST)}


def _called(cell: Cell, setting: Setting) -> str:
    """Return a head's title, with m and s for a follow-up run, whose head has another setting elsewhere."""
    stage, _, head = cell
    if stage != FOLLOWUP:
        return title(*head)
    m, scale = setting
    return f"{title(*head)} (" + ("" if m is None else f"m = {m:g}, ") + f"s = {scale:g})"


def _rounded(found: Difference) -> dict[str, Any]:
    return {"n": found.n, "mean": _short(found.mean), "low": _short(found.low), "high": _short(found.high)}


def _noise(cell: Cell, runs: Runs) -> dict[str, Any]:
    """Summarize each epoch over the seeds: mean shares of the gradient, mean angles, summed histograms."""
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
    """Return mean and sample standard deviation over seeds; the deviation of a single seed is None."""
    if not values:
        return {"mean": None, "deviation": None}
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": _short(float(np.mean(values))), "deviation": _short(deviation)}


def _mean(values: list[Any]) -> float | None:
    there = [value for value in values if value is not None]
    return _short(float(np.mean(there))) if there else None


def _short(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 5)
