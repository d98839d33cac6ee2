"""The report: formats the tables as markdown, and writes pages and figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import plots
from .plan import CONDITIONS, FINAL, FOLLOWUP, REMEDY, TUNING, Configuration, StudyError
from .results import Results
from .tables import DECISIVE, METRICS, SHARES_OF, WIDEST, shown_epochs, tables

BEGIN = "<!-- noise study: `make study` writes what is between these two lines -->"
END = "<!-- end of the noise study -->"
FIGURES = "pictures"  # the folder beside the page
CAPTIONS = {
    "accuracy": "Accuracy under each condition, each head at its own m and s",
    "gradient": "Noisy samples' share of the target gradient by epoch; dotted: their share of the data",
    "angles": "Target angles of clean and noisy samples: the first and the last epoch",
    "remedies": "Mean target angle of clean samples at s = 32: the exact gradient, and remedies",
}
Row = dict[str, Any]


def write_report(results: Results, configuration: Configuration, docs: Path | None) -> str:
    """Report on all runs in `results`: to a folder beside them, or into the marked block of the page `docs`.

    Returns where it is and what is undecided. Raises StudyError where there are no runs on test, or no block.
    """
    found = tables(configuration, results.load())
    if not found["accuracy"]:
        raise StudyError(f"{results.path}: no run on test is there yet; `run` makes them")
    if docs is None:
        folder = results.path.parent / "report"
        plots.save_all(found, folder)
        path = folder / "report.md"
        path.write_text(markdown(found, "."), encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    else:
        path = docs
        page = filled(docs.read_text(encoding="utf-8"), markdown(found, FIGURES), docs)
        plots.save_all(found, docs.parent / FIGURES)
        docs.write_text(page, encoding="utf-8")
    return f"Report: {path}\n{more_seeds(found)}"


def more_seeds(found: Row) -> str:
    """Say how many differences are undecided, and which runs would narrow them."""
    every = found["differences"]
    wide = [row for row in every if not row["decided"]]
    if not wide:
        return "All differences are decided."
    conditions = sorted({row["condition"] for row in wide})
    heads = sorted({name for row in wide for name in row["heads"]})
    last = max(seed for row in found["accuracy"] for seed in row["seeds"])
    return (
        f"{len(wide)} of {len(every)} differences are undecided. More seeds for them: "
        f"run --seeds {last + 1} {last + 2} --conditions {' '.join(conditions)} --heads {' '.join(heads)}"
    )


def filled(page: str, inside: str, path: Path) -> str:
    """Return the page with `inside` between its marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise StudyError(f"{path}: expected the lines {BEGIN!r} and {END!r}, to write between them")
    return f"{before}{BEGIN}\n\n{inside}\n{END}{after}"


def markdown(found: Row, figures: str) -> str:
    """Format all tables, under the questions that they answer; `figures` is the folder of the figures."""
    gradient = [
        {**row, "name": f"{_name(row)}, epoch {row['epoch']}"} for row in found["gradient_differences"]
    ]
    judged = [{**row, "name": _name(row)} for row in found["differences"]]
    final, remedies, followups = (
        [row for row in judged if row["stage"] == stage] for stage in (FINAL, REMEDY, FOLLOWUP)
    )
    parts = [
        _head(found),
        _tuning(found),
        "### (a) Where noisy samples lie",
        _epochs(found, FINAL, _angles, "mean angle of clean / noisy samples, epoch {}", clean=True),
        _figure(found, "angles", figures),
        "### (b) Noisy samples' share of the gradient",
        _epochs(found, FINAL, _shares, "% of abs(∂L/∂θ) / of s·q on noisy samples, epoch {}"),
        _by_condition("ExpFace's share − the other's, points [95%]", gradient, _points),
        _figure(found, "gradient", figures),
        _trial_shares(found),
        "### (c) Effect on verification",
        _by_condition(f"{DECISIVE} on test", _rows(found["accuracy"], FINAL), _plus_minus),
        _figure(found, "accuracy", figures),
        _by_condition(f"difference of {DECISIVE}, points [95%]", final, _said),
        _by_condition(f"follow-up runs: difference of {DECISIVE}, points [95%]", followups, _said),
        "### (d) Remedies for the drift of the exact gradient",
        _epochs(found, REMEDY, _angles, "mean angle of clean / noisy samples, epoch {}", clean=True),
        _figure(found, "remedies", figures),
        _by_condition(f"{DECISIVE} on test", _rows(found["accuracy"], REMEDY), _plus_minus),
        _by_condition(f"difference of {DECISIVE}, points [95%]", remedies, _said),
        "### All numbers",
        _accuracy(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(found: Row) -> str:
    runs, where = found["runs"], ", ".join(found["machines"])
    return (
        f"{sum(runs.values())} runs took {found['core_hours']:.1f} core hours, waits included, on {where} "
        f"(torch {', '.join(found['torch'])}): {runs[FINAL]} of the main series, {runs[REMEDY]} of the "
        f"remedies series, {runs[FOLLOWUP]} follow-up runs, {runs[TUNING]} tuning trials. Numbers are mean ± "
        "standard deviation over seeds. A difference is *undecided* where its interval is wider than "
        f"±{100 * WIDEST:g} points; which head is higher may be known all the same, where the interval "
        "excludes 0. Intervals are over seeds, at the tuned m and s: they do not include the variation of "
        "tuning, which had one run per trial."
    )


def _tuning(found: Row) -> str:
    """Format the tuned m and s, and the scores of the best, the second and the worst trial."""
    rows = []
    for row in found["tuning"]:
        best, second, worst = row["trials"][0], row["trials"][1], row["trials"][-1]
        scores = [f"{entry['score']:.3f}" for entry in (best, second, worst)]
        setting = [_m(best), f"{best['scale']:g}"]
        rows.append([row["title"], CONDITIONS[row["condition"]].title, *setting, *scores])
    columns = [
        "head",
        "tuned under",
        "m",
        "s",
        f"its {DECISIVE} on validation",
        "second trial",
        "worst trial",
    ]
    return _table(columns, rows)


def _m(row: Row) -> str:
    return "" if row["m"] is None else f"{row['m']:g}"


def _trial_shares(found: Row) -> str:
    """Format the shares at one scale, which depend more on a head's m than on its margin's family."""
    condition, scale = SHARES_OF
    rows = found["trial_shares"]
    if not rows:
        return ""
    corner = f"trials with s = {scale:g}, {CONDITIONS[condition].title}, one seed, epoch {rows[0]['epoch']}"
    return _table(
        [corner, "m", "% of abs(∂L/∂θ) / of s·q on noisy samples"],
        [[row["title"], _m(row), _shares(row)] for row in rows],
    )


def _rows(rows: Sequence[Row], stage: str) -> list[Row]:
    return [{**row, "name": row["title"]} for row in rows if row["stage"] == stage]


def _by_condition(corner: str, rows: Sequence[Row], show: Callable[[Row], str]) -> str:
    """Format one line for each `name` of the rows, and one column for each of their conditions."""
    conditions = [name for name in CONDITIONS if any(row["condition"] == name for row in rows)]
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        lines.setdefault(row["name"], {})[row["condition"]] = show(row)
    columns = [corner, *(CONDITIONS[condition].title for condition in conditions)]
    return _table(
        columns,
        [[name, *(cells.get(condition, "") for condition in conditions)] for name, cells in lines.items()],
    )


def _epochs(found: Row, stage: str, show: Callable[[Row], str], column: str, *, clean: bool = False) -> str:
    """Format what the first, the middle and the last epoch looked like under each condition."""
    rows = [
        row
        for row in found["noise"]
        if row["stage"] == stage and (clean or CONDITIONS[row["condition"]].share) and row["epochs"]
    ]
    if not rows:
        return ""
    epochs = shown_epochs(max(len(row["epochs"]) for row in rows))
    cells = [
        [
            CONDITIONS[row["condition"]].title,
            row["title"],
            *(show(row["epochs"][epoch - 1]) if epoch <= len(row["epochs"]) else "" for epoch in epochs),
        ]
        for row in rows
    ]
    first, *others = epochs
    return _table(
        ["training set", "head", column.format(first), *(f"epoch {epoch}" for epoch in others)], cells
    )


def _angles(epoch: Row) -> str:
    return " / ".join(f"{epoch[group]['angle_mean']:.0f}°" for group in ("clean", "noisy") if epoch[group])


def _shares(epoch: Row) -> str:
    shares = (epoch["gradient_share"], epoch["push_share"])
    return " / ".join("none" if share is None else f"{100 * share:.0f}" for share in shares)


def _accuracy(found: Row) -> str:
    rows = []
    for row in found["accuracy"]:
        n = f"{len(row['seeds'])}" + (f" ({row['diverged']} diverged)" if row["diverged"] else "")
        scores = [_mean_and_deviation(row[name]) for name in (*METRICS, "rank-1")]
        setting = [_m(row), f"{row['scale']:g}"]
        rows.append([CONDITIONS[row["condition"]].title, row["title"], *setting, n, *scores])
    return _table(["training set", "head", "m", "s", "seeds", *METRICS, "rank-1"], rows)


def _plus_minus(row: Row) -> str:
    return _mean_and_deviation(row[DECISIVE])


def _mean_and_deviation(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "none"
    return f"{value['mean']:.3f}" + ("" if value["deviation"] is None else f" ± {value['deviation']:.3f}")


def _name(row: Row) -> str:
    return f"{row['a']} − {row['b']}"


def _said(row: Row) -> str:
    """Format the difference and what may be said of it."""
    unlike = _unlike(row)
    if row["higher"]:
        size = "" if row["decided"] else ", by how much is undecided"
        return f"{_points(row)} **{row[row['higher']]} higher**{size}{unlike}"
    return f"{_points(row)} {'no difference found' if row['decided'] else 'undecided'}{unlike}"


def _unlike(row: Row) -> str:
    """Say what else the two heads differ in: s, and m where both have the same margin."""
    margins = {head.partition("-")[0] for head in row["heads"]}
    (m, other_m), (s, other_s) = row["ms"], row["scales"]
    found = []
    if len(margins) == 1 and m != other_m:
        found.append(f"m = {m:g} against {other_m:g}")
    if s != other_s:
        found.append(f"s = {s:g} against {other_s:g}")
    return f" ({', '.join(found)})" if found else ""


def _points(row: Row) -> str:
    if row["mean"] is None:
        return "none"
    if row["low"] is None:
        return f"{100 * row['mean']:+.1f}"
    return f"{100 * row['mean']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"


def _figure(found: Row, name: str, folder: str) -> str:
    return f"![{CAPTIONS[name]}]({folder}/{name}.png)" if name in found["pictures"] else ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a markdown table; an empty string where there are no rows."""
    if not rows:
        return ""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
