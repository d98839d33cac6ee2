"""Draws a sweep as PNGs: seconds and memory against classes, throughput against memory.

Needs matplotlib, which is imported when something is drawn. The colors are Okabe and Ito's, which color-blind
readers tell apart; markers differ as well, and every line has its name at its end.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench import peers
from bench.cases import Case
from bench.peers.heads import Ours
from bench.records import BYTES, NO_ROOM, SECONDS, Measurement, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
LEAST_ROUNDS = 5
"""Of fewer rounds the median is no steady number: its point is hollow."""
BLUE, VERMILION, ORANGE = "#0072B2", "#D55E00", "#E69F00"
GREEN, PURPLE, BLACK, GREY = "#009E73", "#CC79A7", "#000000", "#777777"


class Style(NamedTuple):
    """Says how a peer is drawn everywhere."""

    color: str
    marker: str
    text: str


STYLES = {
    "ours": Style(BLUE, "o", "this package"),
    "eager": Style(VERMILION, "^", "eager"),
    "compiled": Style(ORANGE, "v", "torch.compile"),
    "compiled_dynamic": Style(ORANGE, "v", "torch.compile"),
    "pml_arcface": Style(PURPLE, "D", "pytorch-metric-learning"),
    "torch_linear_compiled": Style(GREEN, "X", "linear_cross_entropy,\ncompiled (no margin)"),
    "torch_linear_dynamic": Style(GREEN, "X", "linear_cross_entropy,\ncompiled (no margin)"),
}
"""The peers that have a line against the classes."""
MARKERS = "s*P<>hp12"
"""Of the others, in the order of their names."""


def unavailable() -> str | None:
    """Say why nothing can be drawn; None where it can."""
    return None if importlib.util.find_spec("matplotlib") else "matplotlib is not installed"


def source(run: Run) -> dict[str, str]:
    """Return what stands in every picture's metadata: which run it shows."""
    return {"Commit": run.header.machine["commit"], "Creation Time": str(run.header.date)}


def draw(run: Run, folder: Path) -> list[Path]:
    """Write what the run has the points for, and return the files; each holds its `source`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = {
        "classes": _against_classes(run, backward=True),
        "classes-forward": _against_classes(run, backward=False),
        "frontier": _frontier(run),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=DPI, metadata=source(run))
            plt.close(figure)
            written.append(path)
    return written


def _title(figure: Figure, run: Run, text: str) -> None:
    """Write the title at the top, and under it where the numbers come from."""
    machine = run.header.machine
    where = machine["gpu"]["card"] if machine.get("gpu") else f"{machine['cpu']}, {machine['cores']} cores"
    figure.suptitle(f"{text}\n ", x=0.01, ha="left", fontsize=12)  # the layout keeps the second line free
    source = f"{where}, torch {machine['torch']}, commit {machine['commit']}, {(run.header.date or '')[:10]}"
    below = 0.98 - 17 / (72 * figure.get_figheight())  # points
    figure.text(0.01, below, source, ha="left", va="top", fontsize=7, color=GREY)


def _longest_line(run: Run, backward: bool) -> Case | None:
    """Return a case of the line along the classes that has most values."""
    cases = [case for case in run.cases() if case.backward is backward]

    def values(case: Case) -> int:
        return sum(dataclasses.replace(c, classes=case.classes).shape == case.shape for c in cases)

    return max(cases, key=values, default=None)


def _against_classes(run: Run, *, backward: bool) -> Figure | None:
    """Draw seconds and extra memory of the peers of STYLES, one panel each."""
    import matplotlib.pyplot as plt

    case = _longest_line(run, backward)
    if case is None:
        return None
    lines = {what: {name: run.line(case, name, what) for name in STYLES} for what in (SECONDS, BYTES)}
    for what, found in lines.items():
        lines[what] = {name: line for name, line in found.items() if any(m.values for _, m in line)}
    shown = [what for what, found in lines.items() if found]
    if not lines[SECONDS]:
        return None
    size = (6.3 * len(shown), 4.6)
    figure, panels = plt.subplots(1, len(shown), figsize=size, layout="constrained", squeeze=False)
    titles = {SECONDS: "seconds of a step", BYTES: "extra memory of a step, MB"}
    few = False
    for panel, what in zip(panels[0], shown, strict=True):
        panel.set(xscale="log", yscale="log", xlabel="classes C")
        panel.set_title(titles[what], loc="left", fontsize=10)
        panel.grid(alpha=0.25, which="major")
        panel.spines[["top", "right"]].set_visible(False)
        ends = []
        for name, line in lines[what].items():
            ends.append(_draw_line(panel, name, line, 1e-6 if what == BYTES else 1.0))
            few |= what == SECONDS and any(0 < len(m.values) < LEAST_ROUNDS for _, m in line)
        _label_ends(panel, ends)
    passes = "forward and both gradients" if backward else "forward alone"
    hollow = f"; hollow: fewer than {LEAST_ROUNDS} rounds" if few else ""
    _title(
        figure, run, f"A step against the classes: B = {case.rows:,}, D = {case.features:,}, {passes}{hollow}"
    )
    return figure


class End(NamedTuple):
    """Says where a line ends, and whether in a cross."""

    x: float
    y: float
    style: Style
    crossed: bool


def _draw_line(panel: Axes, name: str, line: Sequence[tuple[int, Measurement]], unit: float) -> End:
    """Draw a peer's points, and a cross where it has no room; return the place of its label."""
    style = STYLES[name]
    points = [
        (float(c), m.value * unit, len(m.values)) for c, m in line if m.value is not None and m.value > 0
    ]
    width = 2.6 if name == "ours" else 1.5
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    panel.plot(xs, ys, color=style.color, linewidth=width)
    seconds = line[0][1].what == SECONDS
    for x, y, rounds in points:
        face = "white" if seconds and rounds < LEAST_ROUNDS else style.color
        panel.plot(x, y, color=style.color, marker=style.marker, markerfacecolor=face, markersize=6)
    x, y, crossed = xs[-1], ys[-1], False
    lack = next((c for c, m in line if m.status == NO_ROOM and c > x), None)
    if lack is not None:  # further on in proportion to the classes, as far as there is no number
        panel.plot([x, lack], [y, y * lack / x], color=style.color, linestyle=":", linewidth=1.2)
        x, y = float(lack), y * lack / x
        panel.plot(x, y, color=style.color, marker="x", markersize=10, markeredgewidth=2.5)
        crossed = True
    return End(x, y, style, crossed)


def _label_ends(panel: Axes, ends: list[End]) -> None:
    """Write each line's name to the right of the panel at the height of its end, moved apart where needed."""
    if crosses := [end for end in ends if end.crossed]:
        top = max(crosses, key=lambda end: end.y)
        place: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "bottom"}
        panel.annotate("out of memory", (top.x, top.y), (8, 8), color=BLACK, **place)
    panel.get_figure().canvas.draw()  # type: ignore[union-attr]
    to_axes = panel.transData + panel.transAxes.inverted()
    places = sorted(
        ((end, float(to_axes.transform((end.x, end.y))[1])) for end in ends), key=lambda place: place[1]
    )
    heights = [height for _, height in places]
    for _ in range(200):  # neighbors push one another until none overlap
        for i in range(len(heights) - 1):
            lines = sum(2 + end.style.text.count("\n") for end, _ in places[i : i + 2])
            gap = 0.022 * lines
            if (lack := gap - (heights[i + 1] - heights[i])) > 1e-4:
                heights[i] -= lack / 2
                heights[i + 1] += lack / 2
    for (end, _), height in zip(places, heights, strict=True):
        panel.annotate(
            end.style.text,
            (end.x, end.y),
            (1.04, height),
            textcoords="axes fraction",
            color=end.style.color,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": end.style.color, "alpha": 0.35, "linewidth": 0.8},
        )


def _main_case(run: Run) -> Case | None:
    """Return the shape with most peers, forward and backward."""
    cases = [case for case in run.cases() if case.backward]
    return max(cases, key=lambda case: sum(bool(m.values) for m in run.at(case).values()), default=None)


def _frontier(run: Run) -> Figure | None:
    """Draw rows per second against extra memory: ours with each workspace, and the peers."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    case = _main_case(run)
    if case is None:
        return None
    held = {name: m.value for name, m in run.at(case, BYTES).items()}
    places = {
        name: (memory / 1e6, case.rows / m.value)
        for name, m in run.at(case).items()
        if (memory := held.get(name)) is not None and m.value is not None and m.case.sample_rate == 1
    }
    ours = sorted((n for n in places if peers.is_ours(n)), key=_workspace_bytes)
    if len(ours) < 3:
        return None
    figure, panel = plt.subplots(figsize=(9.5, 5.6), layout="constrained")
    line = [places[name] for name in ours]
    panel.plot(*zip(*line, strict=True), color=BLUE, marker="o", label="this package, by its workspace")
    for i, name in enumerate(ours):  # above and below in turn: neighbors may lie close together
        text, offset = f"{_workspace_bytes(name) / 2**20:.0f} MiB", (0, -11 if i % 2 else 11)
        panel.annotate(
            text, places[name], offset, textcoords="offset points", ha="center", va="center", fontsize=8
        )
    others = [name for name in places if not peers.is_ours(name)]
    for i, name in enumerate(others):
        color, marker, _ = STYLES.get(name, Style(GREY, MARKERS[i % len(MARKERS)], ""))
        label = run.at(case)[name].label
        panel.plot(*places[name], color=color, marker=marker, linestyle="", label=label)
    panel.set(
        xlabel="peak extra memory of a step, MB (log)",
        ylabel="rows a second, forward and both gradients",
        xscale="log",
    )
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_ylim(0, 1.08 * panel.get_ylim()[1])
    panel.grid(alpha=0.3)
    shape = f"B = {case.rows:,}, C = {case.classes:,}, D = {case.features:,}"
    _title(figure, run, f"Throughput and memory, {shape}")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _workspace_bytes(name: str) -> int:
    peer = peers.get(name)
    assert isinstance(peer, Ours)
    return peer.workspace_bytes
