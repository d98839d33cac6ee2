"""The report's pictures, from the report's data alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from .heads import MARGINS, MODES, title
from .plan import CONDITIONS, FINAL, HEADS, MEND, head_name
from .recorder import BIN_DEGREES
from .tables import ANGLES_OF, DECISIVE, shown_epochs

_DPI = 110
_COLOURS = {
    "normface": "#777777",
    "sphereface": "#1b9e77",
    "cosface": "#d95f02",
    "arcface": "#7570b3",
    "expface": "#e7298a",
}
_DASHES = {"detached": "-", "exact": "--"}
_CLEAN, _NOISY = "#1b7837", "#c51b2d"


def save_all(found: dict[str, Any], folder: Path) -> None:
    """The pictures that the report names, as <name>.png."""
    folder.mkdir(parents=True, exist_ok=True)
    drawings = {"accuracy": accuracy, "gradient": gradient, "angles": angles, "mending": mending}
    for name in found["pictures"]:
        figure = drawings[name](found)
        figure.savefig(folder / f"{name}.png", dpi=_DPI)
        plt.close(figure)


def accuracy(found: dict[str, Any]) -> plt.Figure:
    """TAR against the share of wrong rows: flipped labels left, outsiders right."""
    figure, grid = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axes, kind in zip(grid, ("flipped", "outsiders"), strict=True):
        for i, head in enumerate(HEADS):
            points = [  # a little apart, so that bars do not hide one another
                (100 * CONDITIONS[row["condition"]].share + 0.25 * (i - len(HEADS) / 2), row[DECISIVE])
                for row in found["accuracy"]
                if row["stage"] == FINAL
                and row["head"] == head_name(head)
                and CONDITIONS[row["condition"]].kind in ("clean", kind)
                and row[DECISIVE]["mean"] is not None
            ]
            if points:
                shares, values = zip(*points, strict=True)
                means = [value["mean"] for value in values]
                deviations = [value["deviation"] or 0.0 for value in values]
                axes.errorbar(shares, means, deviations, capsize=3, marker="o", markersize=4, **_line(head))
        axes.set(title=kind, xlabel="wrong rows of the training set, %")
        axes.grid(alpha=0.3)
    grid[0].set_ylabel(f"{DECISIVE}, test")
    _legend(grid[0], grid[1])
    return figure


def gradient(found: dict[str, Any]) -> plt.Figure:
    """Share of the target gradient on wrong rows, epoch by epoch, a column for each noisy condition."""
    noisy = [name for name, condition in CONDITIONS.items() if condition.share]
    figure, grid = plt.subplots(1, len(noisy), figsize=(13, 4.5), sharey=True, layout="constrained")
    for axes, condition in zip(grid, noisy, strict=True):
        for row in _rows(found, FINAL, condition):
            values = [epoch["gradient_share"] for epoch in row["epochs"]]
            axes.plot(_numbers(row), values, marker=".", **_line(_head(row)))
        axes.axhline(CONDITIONS[condition].share, color="black", linestyle=":", linewidth=1)
        axes.set(title=CONDITIONS[condition].title, xlabel="epoch", ylim=(0, 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("share of the target gradient on wrong rows")
    _legend(*grid)
    return figure


def angles(found: dict[str, Any]) -> plt.Figure:
    """Distributions of the target angle of right and wrong rows, one row of panels for each head."""
    rows = _rows(found, FINAL, ANGLES_OF)
    epochs = shown_epochs(min(len(row["epochs"]) for row in rows))
    size = (10, 1.5 * len(rows) + 0.8)
    figure, grid = plt.subplots(
        len(rows), len(epochs), figsize=size, sharex=True, squeeze=False, layout="constrained"
    )
    edges = np.arange(0, 180 + BIN_DEGREES, BIN_DEGREES)
    for line, row in zip(grid, rows, strict=True):
        for axes, number in zip(line, epochs, strict=True):
            epoch = row["epochs"][number - 1]
            for group, colour, label in (("clean", _CLEAN, "right"), ("noisy", _NOISY, "wrong")):
                if epoch[group]:
                    counts = np.array(epoch[group]["histogram"], float)
                    density = counts / counts.sum() / BIN_DEGREES
                    axes.stairs(density, edges, color=colour, fill=True, alpha=0.5, label=label)
            axes.set_yticks([])
            axes.set_title(f"{row['title']}, epoch {epoch['epoch']}", fontsize=8)
    grid[0, 0].legend(fontsize=7)
    for line in grid:
        line[0].set_ylabel("density", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("angle to the label's centre, degrees")
        axes.set_xticks(range(0, 181, 30))
    figure.suptitle(f"{CONDITIONS[ANGLES_OF].title}: right and wrong rows, each to an area of 1", fontsize=10)
    return figure


def mending(found: dict[str, Any]) -> plt.Figure:
    """Mean angle of right rows by epoch: exact, detached, mended; a panel a margin and condition."""
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found["noise"]:
        if row["stage"] == MEND and row["epochs"]:
            panels.setdefault((row["condition"], _head(row)[0]), []).append(row)
    columns = len({margin for _, margin in panels})
    lines = -(-len(panels) // columns)
    size = (5.5 * columns, 3.6 * lines)
    figure, grid = plt.subplots(
        lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, ((condition, margin), rows) in zip(grid.flat, panels.items(), strict=False):
        for row in rows:
            values = [epoch["clean"]["angle_mean"] for epoch in row["epochs"]]
            mode = _head(row)[1]
            colour = f"C{list(MODES).index(mode)}"
            axes.plot(_numbers(row), values, marker=".", color=colour, label=MODES[mode])
        axes.axhline(90, color="black", linestyle=":", linewidth=1, label="90°: nothing learnt")
        axes.set(title=f"{MARGINS[margin].__name__}, {CONDITIONS[condition].title}", xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.set_ylabel("mean angle of right rows, degrees")
    _legend(*list(grid.flat)[::-1])
    return figure


def _rows(found: dict[str, Any], stage: str, condition: str) -> list[dict[str, Any]]:
    return [
        row
        for row in found["noise"]
        if row["stage"] == stage and row["condition"] == condition and row["epochs"]
    ]


def _head(row: dict[str, Any]) -> tuple[str, str]:
    margin, _, mode = row["head"].partition("-")
    return margin, mode


def _numbers(row: dict[str, Any]) -> list[int]:
    return [epoch["epoch"] for epoch in row["epochs"]]


def _line(head: Sequence[str]) -> dict[str, Any]:
    """One colour a margin, one dash a target gradient, in every picture."""
    return {"color": _COLOURS[head[0]], "linestyle": _DASHES[head[1]], "label": title(head[0], head[1])}


def _legend(*all_axes: Axes) -> None:
    """In the first panel that shows anything."""
    for axes in all_axes:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, handlelength=3.5)
            return
