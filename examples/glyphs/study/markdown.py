"""The report's tables as markdown, for a page or a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .plan import CONDITIONS, FINAL, MEND, MORE
from .tables import DECISIVE, METRICS, SHARES_OF, WIDEST, shown_epochs

CAPTIONS = {
    "accuracy": "Accuracy against the share of wrong rows, each head at its own m and s, drawn apart",
    "gradient": "Share of the target gradient on wrong rows by epoch; dotted: their share of the rows",
    "angles": "Angles of right and wrong rows to the centre of their label: first, middle and last epoch",
    "mending": "Mean angle of the right rows at s = 32: the exact gradient, and what may mend it",
}
Row = dict[str, Any]


def markdown(found: Row, pictures: str) -> str:
    """All tables, under the questions that they answer; `pictures` is the path to their folder."""
    gradient = [
        {**row, "name": f"{_name(row)}, epoch {row['epoch']}"} for row in found["gradient_differences"]
    ]
    judged = [{**row, "name": _name(row)} for row in found["differences"]]
    final, mend, more = ([row for row in judged if row["stage"] == stage] for stage in (FINAL, MEND, MORE))
    parts = [
        _head(found),
        _choice(found),
        "### (a) Where wrong rows sit",
        _epochs(found, FINAL, _angles, "mean angle of right / wrong rows, epoch {}", clean=True),
        _picture(found, "angles", pictures),
        "### (b) How much of the gradient wrong rows take",
        _epochs(found, FINAL, _shares, "% of abs(∂L/∂θ) / of s·q on wrong rows, epoch {}"),
        _by_condition("ExpFace's share less the other's, points [95%]", gradient, _points),
        _picture(found, "gradient", pictures),
        _tried_shares(found),
        "### (c) What it does to verification",
        _by_condition(f"{DECISIVE} on test", _rows(found["accuracy"], FINAL), _plus_minus),
        _picture(found, "accuracy", pictures),
        _by_condition(f"difference of {DECISIVE}, points [95%]", final, _said),
        _by_condition(f"further runs: difference of {DECISIVE}, points [95%]", more, _said),
        "### (d) What mends the exact gradient",
        _epochs(found, MEND, _angles, "mean angle of right / wrong rows, epoch {}", clean=True),
        _picture(found, "mending", pictures),
        _by_condition(f"{DECISIVE} on test", _rows(found["accuracy"], MEND), _plus_minus),
        _by_condition(f"difference of {DECISIVE}, points [95%]", mend, _said),
        "### All figures",
        _accuracy(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(found: Row) -> str:
    runs, where = found["runs"], ", ".join(found["machines"])
    return (
        f"{runs['final']} runs on test, {runs['mend']} of the mending series, {runs['more']} further ones, "
        f"{runs['choice']} tries: "
        f"{found['core_hours']:.1f} hours of runs, waits included, on {where}, torch "
        f"{', '.join(found['torch'])}. Mean ± standard deviation over seeds. A difference is *undecided* "
        f"where its interval is wider than ±{100 * WIDEST:g} points; which head is higher may be known all "
        "the same, where it leaves out 0. Intervals are over seeds, at the chosen m and s: how the choice "
        "fell, one run a try, is not in them."
    )


def _choice(found: Row) -> str:
    """The chosen m and s, and what the best, the second and the worst try scored."""
    rows = []
    for row in found["choice"]:
        best, second, worst = row["tries"][0], row["tries"][1], row["tries"][-1]
        figures = [f"{entry['score']:.3f}" for entry in (best, second, worst)]
        strength = [_m(best), f"{best['scale']:g}"]
        rows.append([row["title"], CONDITIONS[row["condition"]].title, *strength, *figures])
    columns = ["head", "chosen under", "m", "s", f"its {DECISIVE} on validation", "second try", "worst try"]
    return _table(columns, rows)


def _m(row: Row) -> str:
    return "" if row["m"] is None else f"{row['m']:g}"


def _tried_shares(found: Row) -> str:
    """Which m a head got says more about its share than its margin's family: all of them at one scale."""
    condition, scale = SHARES_OF
    rows = found["tried_shares"]
    if not rows:
        return ""
    corner = f"tries with s = {scale:g}, {CONDITIONS[condition].title}, one seed, epoch {rows[0]['epoch']}"
    return _table(
        [corner, "m", "% of abs(∂L/∂θ) / of s·q on wrong rows"],
        [[row["title"], _m(row), _shares(row)] for row in rows],
    )


def _rows(rows: Sequence[Row], stage: str) -> list[Row]:
    return [{**row, "name": row["title"]} for row in rows if row["stage"] == stage]


def _by_condition(corner: str, rows: Sequence[Row], show: Callable[[Row], str]) -> str:
    """One line for each `name` of the rows, one column for each of their conditions."""
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
    """What noisy conditions, and the clean one, looked like at the first, the middle and the last epoch."""
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
        figures = [_figure(row[name]) for name in (*METRICS, "rank-1")]
        strength = [_m(row), f"{row['scale']:g}"]
        rows.append([CONDITIONS[row["condition"]].title, row["title"], *strength, n, *figures])
    return _table(["training set", "head", "m", "s", "seeds", *METRICS, "rank-1"], rows)


def _plus_minus(row: Row) -> str:
    return _figure(row[DECISIVE])


def _figure(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "none"
    return f"{value['mean']:.3f}" + ("" if value["deviation"] is None else f" ± {value['deviation']:.3f}")


def _name(row: Row) -> str:
    return f"{row['a']} − {row['b']}"


def _said(row: Row) -> str:
    """The difference and what may be said of it."""
    unlike = _unlike(row)
    if row["higher"]:
        size = "" if row["decided"] else ", by how much is undecided"
        return f"{_points(row)} **{row[row['higher']]} higher**{size}{unlike}"
    return f"{_points(row)} {'no difference found' if row['decided'] else 'undecided'}{unlike}"


def _unlike(row: Row) -> str:
    """What the two heads differ in beside their names: s, and m where both are of one margin."""
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


def _picture(found: Row, name: str, folder: str) -> str:
    return f"![{CAPTIONS[name]}]({folder}/{name}.png)" if name in found["pictures"] else ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; nothing where there are no rows."""
    if not rows:
        return ""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
