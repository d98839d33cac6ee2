"""A sweep as four PNGs: seconds and memory against classes, throughput against memory, speed-ups.

Needs matplotlib, which is imported when something is drawn. Colours are Okabe and Ito's, which colour-blind
readers tell apart, with a darker and a paler green; markers and dashes differ as well.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.cases import Case
from bench.peers import SAMPLED_BASELINE
from bench.sweep_report import direction, frontier, labels_of, workspace_bytes
from bench.sweep_result import Axis, Point, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
BLUE, SKY, VERMILION, ORANGE = "#0072B2", "#56B4E9", "#D55E00", "#E69F00"
GREEN, PURPLE, BLACK, GREY = "#009E73", "#CC79A7", "#000000", "#777777"
DARK_GREEN, PALE_GREEN = "#005A41", "#6CC9AE"


class Style(NamedTuple):
    """How a peer is drawn everywhere."""

    color: str
    marker: str
    dashes: str = "-"


STYLES = {
    "ours": Style(BLUE, "o"),
    "ours@0": Style(SKY, "s", "--"),
    "eager": Style(VERMILION, "^"),
    "compiled": Style(ORANGE, "v"),
    "compiled_autotuned": Style(ORANGE, "1", "--"),
    "compiled_dynamic": Style(ORANGE, "v"),
    "pml_arcface": Style(PURPLE, "D"),
    "pml_cosface": Style(PURPLE, "d", "--"),
    "torch_linear": Style(GREEN, "P"),
    "torch_linear_compiled": Style(DARK_GREEN, "X", "--"),
    "torch_linear_autotuned": Style(DARK_GREEN, "2", ":"),
    "torch_linear_dynamic": Style(DARK_GREEN, "X", "--"),
    "torch_linear_chunked": Style(PALE_GREEN, "*", ":"),
    "torch_linear_auto": Style(PALE_GREEN, "3", ":"),
    "cce": Style(BLACK, "<"),
    "cce_exact": Style(BLACK, ">", "--"),
    "liger": Style(GREY, "h"),
    "ours_sampled": Style(BLUE, "o", ":"),
    "partial_fc": Style(BLACK, "p", ":"),
}
RANKS = {name: rank for rank, name in enumerate(STYLES)}
"""In legends."""
OTHER = Style(GREY, ".")


def unavailable() -> str | None:
    """Why nothing can be drawn; None where it can."""
    return None if importlib.util.find_spec("matplotlib") else "matplotlib is not installed"


def source(sweep: Sweep) -> dict[str, str]:
    """What stands in every picture's metadata: which sweep it shows."""
    return {"Commit": sweep.machine["commit"], "Creation Time": sweep.date}


def draw(sweep: Sweep, folder: Path) -> list[Path]:
    """Writes what the sweep has the points for, and returns the files; each holds its `source`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = {
        "classes-seconds": _against_classes(sweep, memory=False),
        "classes-memory": _against_classes(sweep, memory=True),
        "frontier": _frontier(sweep),
        "speedups": _speedups(sweep),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=DPI, metadata=source(sweep))
            plt.close(figure)
            written.append(path)
    return written


def _figure(panels: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(width, height), layout="constrained", **options)
    return figure, list(axes) if panels > 1 else [axes]


def _style(peer: str) -> Style:
    return STYLES.get(peer, OTHER)


def _line_of(peer: str) -> dict[str, Any]:
    style = _style(peer)
    wide = 2.4 if peer == "ours" else 1.4
    return {
        "color": style.color,
        "marker": style.marker,
        "linestyle": style.dashes,
        "linewidth": wide,
        "markersize": 6,
    }


def _directions(sweep: Sweep) -> list[bool]:
    return sorted({point.case.backward for point in sweep.points})


def _against_classes(sweep: Sweep, *, memory: bool) -> Figure | None:
    axis = next((axis for axis in sweep.axes if axis.varies == "classes"), None)
    if axis is None or not sweep.values(axis):
        return None
    if all(_value(point, memory) is None for point in sweep.points):
        return None
    directions = _directions(sweep)
    figure, panels = _figure(len(directions), 5.2 * len(directions) + 4, 5.4, sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for panel, backward in zip(panels, directions, strict=True):
        for peer, label in labels_of(sweep, axis, backward).items():
            line = sweep.line(axis, peer, backward=backward)
            values = [(c, y) for c, p in line if (y := _value(p, memory)) is not None and y > 0]
            if not values:
                continue
            (handle,) = panel.plot(*zip(*values, strict=True), **_line_of(peer))
            if not memory:
                _mark_single_rounds(panel, peer, line)
            handles[peer], texts[peer] = handle, f"{label}{_stopped(line, backward)}"
        panel.set(xscale="log", yscale="log", xlabel="classes C", title=direction(backward))
        panel.grid(alpha=0.3, which="major")
        panel.yaxis.set_tick_params(labelleft=True)
    texts["guide"] = "slope 1: in proportion to C"
    for panel in panels:
        handles["guide"] = _guide(panel)
    quantity = "peak extra memory of a step, MB (1e6 bytes)" if memory else "median seconds of a step"
    panels[0].set_ylabel(f"{quantity} (log)")
    what = "Extra memory" if memory else "Time (hollow: a single round)"
    _title(figure, sweep, f"{what} against classes, {_shape(axis)}")
    order = sorted(handles, key=lambda name: (name == "guide", RANKS.get(name, len(RANKS))))
    figure.legend(
        [handles[name] for name in order],
        [texts[name] for name in order],
        loc="outside lower center",
        ncols=2,
        fontsize=8,
    )
    return figure


def _title(figure: Figure, sweep: Sweep, text: str) -> None:
    """On the left; where the numbers come from on the right."""
    machine = sweep.machine
    where = machine["gpu"]["card"] if machine.get("gpu") else f"{machine['cpu']}, {machine['cores']} cores"
    source = f"{where}, torch {machine['torch']}\ncommit {machine['commit']}, {sweep.date[:10]}"
    figure.suptitle(text, x=0.01, ha="left")
    figure.text(0.995, 0.99, source, ha="right", va="top", fontsize=6.5, color=GREY)


def _value(point: Point, memory: bool) -> float | None:
    if memory:
        return None if point.extra_bytes is None else point.extra_bytes / 1e6
    return point.median


def _stopped(line: Iterable[tuple[int, Point]], backward: bool) -> str:
    """What the first point without memory enough says, for a legend."""
    found = next(((c, p.needs_bytes) for c, p in line if p.needs_bytes is not None), None)
    if found is None:
        return ""
    what = "with gradients" if backward else "forward"
    return f"; {what} at C={found[0]:,} needs {found[1] / 1e9:.3g} GB"


def _mark_single_rounds(panel: Axes, peer: str, line: Iterable[tuple[int, Point]]) -> None:
    """Hollow markers where time was left for one round only, no median."""
    style = _style(peer)
    single = [(c, p.median) for c, p in line if len(p.seconds) == 1]
    if single:
        panel.plot(
            *zip(*single, strict=True),
            color=style.color,
            marker=style.marker,
            markerfacecolor="white",
            linestyle="",
            markersize=6,
        )


def _guide(panel: Axes) -> Any:
    """A pale line of slope 1 through the lower left corner."""
    (left, right), (low, _) = panel.get_xlim(), panel.get_ylim()
    panel.autoscale(False)
    return panel.axline((left, low), (right, low * right / left), color="#bbbbbb", linewidth=1, zorder=0)


def _shape(axis: Axis) -> str:
    case = axis.case
    names = {"rows": "B", "classes": "C", "features": "D"}
    return ", ".join(f"{n}={getattr(case, name):,}" for name, n in names.items() if name != axis.varies)


def _main_case(sweep: Sweep) -> Case | None:
    """The shape with most peers."""
    shapes = [point.case for point in sweep.points if point.case.backward and point.median is not None]
    return max(shapes, key=lambda case: len(sweep.at(case)), default=None)


def _frontier(sweep: Sweep) -> Figure | None:
    ours = [point for point in frontier(sweep) if point.median is not None and point.extra_bytes is not None]
    if len(ours) < 2:
        return None
    case = ours[0].case
    others = {
        peer: point
        for peer, point in sweep.at(case).items()
        if not peer.startswith("ours")
        and point.median is not None
        and point.extra_bytes is not None
        and point.case.sample_rate == 1
    }
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (panel,) = _figure(1, 9.5, 5.6)

    def place(point: Point) -> tuple[float, float]:
        assert point.median is not None
        assert point.extra_bytes is not None
        return point.extra_bytes / 1e6, point.case.rows / point.median

    panel.plot(
        *zip(*map(place, ours), strict=True), color=BLUE, marker="o", label="ours, by its workspace in MiB"
    )
    for i, point in enumerate(ours):  # above and below in turn: neighbours may lie close together
        text = f"{workspace_bytes(point) / 2**20:.0f}"
        offset = (0, -9 if i % 2 else 9)
        panel.annotate(
            text, place(point), offset, textcoords="offset points", ha="center", va="center", fontsize=8
        )
    for peer, point in others.items():
        style = _style(peer)
        panel.plot(*place(point), color=style.color, marker=style.marker, linestyle="", label=point.label)
    panel.set(
        xlabel="peak extra memory of a step, MB (1e6 bytes, log)",
        ylabel="rows a second, forward and both gradients",
        xscale="log",
    )
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_ylim(0, 1.08 * panel.get_ylim()[1])
    panel.grid(alpha=0.3)
    _title(figure, sweep, f"Throughput and memory, B={case.rows:,}, C={case.classes:,}, D={case.features:,}")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _speedups(sweep: Sweep) -> Figure | None:
    """How many times as fast as each peer ours is at the main shape, and as the eager head at all shapes."""
    case = _main_case(sweep)
    if case is None or "ours" not in sweep.at(case):
        return None
    from matplotlib.ticker import LogLocator, NullFormatter

    directions = _directions(sweep)
    figure, (left, right) = _figure(2, 14, 5.6, width_ratios=[3, 2])
    height = 0.8 / len(directions)
    names, labels = _rivals(sweep, case, directions)
    for k, backward in enumerate(directions):
        points = sweep.at(_turned(case, backward))
        _bars(left, [_times(points, name) for name in names], k, height, backward)
    left.set_yticks(range(len(names)), labels, fontsize=8)
    left.set_title(f"B={case.rows:,}, C={case.classes:,}, D={case.features:,}: against each peer")
    shapes = sorted({_bare(p.case) for p in sweep.points}, key=lambda c: (c[2], c[0], c[1]))
    shown = [s for s in shapes if any(_times(sweep.at(_at(case, s, b)), "eager") for b in directions)]
    for k, backward in enumerate(directions):
        times = [_times(sweep.at(_at(case, shape, backward)), "eager") for shape in shown]
        _bars(right, times, k, height, backward)
    right.set_yticks(range(len(shown)), [f"B={b:,}, C={c:,}, D={d:,}" for b, c, d in shown], fontsize=8)
    right.set_title("against the eager head, every shape")
    for panel in (left, right):
        panel.set(xscale="log", xlabel="times as fast (log; 1: no difference)")
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.axvline(1, color=BLACK, linewidth=1)
        panel.invert_yaxis()
        panel.grid(alpha=0.3, axis="x")
        low, high = panel.get_xlim()
        panel.set_xlim(low * 0.85, high * 1.35)  # room for the numbers
    left.legend(fontsize=8, loc="lower right")  # the last peer's bars are short
    _title(figure, sweep, "Speed of ours, by medians (partial FC: of ours on the same sample)")
    return figure


def _rivals(sweep: Sweep, case: Case, directions: list[bool]) -> tuple[list[str], list[str]]:
    """Peers that are not ours and have a time at the shape, and their labels."""
    found: dict[str, str] = {}
    for backward in directions:
        for name, point in sweep.at(_turned(case, backward)).items():
            if not name.startswith("ours") and point.median is not None:
                found[name] = point.label.replace(" (", "\n(", 1)
    return list(found), list(found.values())


def _times(points: dict[str, Point], name: str) -> float | None:
    """The peer's median over ours, which samples where the peer does."""
    ours = points.get("ours_sampled" if name == SAMPLED_BASELINE else "ours")
    peer = points.get(name)
    if ours is None or peer is None or ours.median is None or peer.median is None:
        return None
    return peer.median / ours.median


def _bars(panel: Axes, times: list[float | None], k: int, height: float, backward: bool) -> None:
    """From 1, no difference, to the right where ours is faster and to the left where it is slower."""
    places = [i + k * height - 0.4 + height / 2 for i in range(len(times))]
    bars = panel.barh(
        places,
        [(value or 1.0) - 1 for value in times],
        left=1,
        height=height,
        color=BLUE if backward else SKY,
        label=direction(backward),
    )
    panel.bar_label(bars, [f"{value:.2f}" if value else "" for value in times], padding=3, fontsize=8)


def _turned(case: Case, backward: bool) -> Case:
    return _at(case, _bare(case), backward)


def _bare(case: Case) -> tuple[int, int, int]:
    return case.rows, case.classes, case.features


def _at(case: Case, shape: tuple[int, int, int], backward: bool) -> Case:
    rows, classes, features = shape
    return Case(rows, classes, features, case.dtype, device=case.device, backward=backward)
