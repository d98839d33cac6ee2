"""Figures of the report, from the tables alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from .heads import MARGINS, MODES, title
from .plan import CONDITIONS, FINAL, HEADS, REMEDY, Head, head_name
from .recorder import BIN_DEGREES
from .tables import ANGLES_OF, DECISIVE

_DPI = 110
_COLORS = {
    "normface": "#777777",
    "sphereface": "#1b9e77",
    "cosface": "#d95f02",
    "arcface": "#7570b3",
    "expface": "#e7298a",
}
_DASHES = {"detached": "-", "exact": "--"}
_CLEAN, _NOISY = "#1b7837", "#c51b2d"
_PANELS = ("sphereface-exact", "expface-exact")  # the most and the least spread of noisy samples


def save_all(found: dict[str, Any], folder: Path) -> None:
    """Save the figures that the report names, as <name>.png."""
    folder.mkdir(parents=True, exist_ok=True)
    drawings = {"accuracy": accuracy, "gradient": gradient, "angles": angles, "remedies": remedies}
    for name in found["pictures"]:
        figure = drawings[name](found)
        figure.savefig(folder / f"{name}.png", dpi=_DPI)
        plt.close(figure)


def accuracy(found: dict[str, Any]) -> Figure:
    """Plot TAR as points, a group for each condition and a color for each margin; hollow where exact."""
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    for i, head in enumerate(HEADS):
        rows = [row for row in found["accuracy"] if row["stage"] == FINAL and row["head"] == head_name(head)]
        rows = [row for row in rows if row[DECISIVE]["mean"] is not None]
        places = [
            list(CONDITIONS).index(row["condition"]) + 0.09 * (i - (len(HEADS) - 1) / 2) for row in rows
        ]
        axes.errorbar(
            places,
            [row[DECISIVE]["mean"] for row in rows],
            [row[DECISIVE]["deviation"] or 0.0 for row in rows],
            fmt="s" if head[1] == "exact" else "o",
            fillstyle="none" if head[1] == "exact" else "full",
            capsize=3,
            color=_COLORS[head[0]],
            label=title(*head),
        )
    axes.set_xticks(range(len(CONDITIONS)), [_condition(name) for name in CONDITIONS])
    for boundary in range(1, len(CONDITIONS)):
        axes.axvline(boundary - 0.5, color="0.85", linewidth=1)
    axes.set(
        title="Verification of unseen kanji in unseen fonts, each head at its tuned m and s",
        xlabel="noise in the training set",
        ylabel=f"{DECISIVE} on test\n(mean over seeds; whiskers: ± 1 standard deviation)",
        xlim=(-0.5, len(CONDITIONS) - 0.5),
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=9, ncols=2)
    return figure


def _condition(name: str) -> str:
    condition = CONDITIONS[name]
    meaning = {"clean": "labels as given", "flipped": "random other label", "open-set": "image of no class"}
    return f"{condition.title}\n({meaning[condition.kind]})"


def gradient(found: dict[str, Any]) -> Figure:
    """Plot the noisy samples' share of the target gradient by epoch, a panel for each noisy condition."""
    noisy = [name for name, condition in CONDITIONS.items() if condition.share]
    figure, grid = plt.subplots(1, len(noisy), figsize=(13, 5.2), sharey=True, layout="constrained")
    for axes, condition in zip(grid, noisy, strict=True):
        rows = _rows(found, FINAL, condition)
        # CosFace is wide and pale, so that it shows under detached SphereFace, ArcFace and ExpFace.
        for row in rows:
            margin, mode = _head(row)
            values = [epoch["gradient_share"] for epoch in row["epochs"]]
            wide = margin == "cosface"
            axes.plot(
                _numbers(row),
                values,
                marker=".",
                color=_COLORS[margin],
                linestyle=_DASHES[mode],
                linewidth=6 if wide else 1.5,
                alpha=0.45 if wide else 1.0,
                zorder=1 if wide else 2,
                label=title(margin, mode),
            )
        share = CONDITIONS[condition].share
        axes.axhline(share, color="black", linestyle=":", linewidth=1.5, label="share of the training set")
        axes.set(title=CONDITIONS[condition].title, xlabel="epoch", ylim=(0, 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("noisy samples' share of Σ |∂L/∂θ|")
    _legend_below(figure, columns=5)
    figure.suptitle("How much of the target gradient noisy samples take, each head at its tuned m and s")
    return figure


def angles(found: dict[str, Any]) -> Figure:
    """Plot histograms of the target angle of clean and noisy samples, a panel for each of two heads."""
    rows = _rows(found, FINAL, ANGLES_OF)
    rows = [row for row in rows if row["head"] in _PANELS] or rows[:1]
    figure, grid = plt.subplots(
        1, len(rows), figsize=(11, 4.6), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    edges = np.arange(0, 180 + BIN_DEGREES, BIN_DEGREES)
    for axes, row in zip(grid[0], rows, strict=True):
        for epoch, filled in ((row["epochs"][0], False), (row["epochs"][-1], True)):
            for group, color in (("clean", _CLEAN), ("noisy", _NOISY)):
                if epoch[group]:
                    counts = np.array(epoch[group]["histogram"], float)
                    density = 100 * counts / counts.sum() / BIN_DEGREES
                    label = f"{group} samples, epoch {epoch['epoch']}"
                    line = "-" if filled else "--"
                    axes.stairs(density, edges, color=color, linestyle=line, linewidth=1.5, label=label)
                    if filled:
                        axes.stairs(density, edges, color=color, fill=True, alpha=0.35)
        axes.set(title=row["title"], xlabel="target angle, degrees", xlim=(0, 180))
        axes.set_xticks(range(0, 181, 30))
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("% of the group's samples per degree")
    _legend_below(figure, columns=4)
    figure.suptitle(
        f"Angle between a sample and the center of its label, {CONDITIONS[ANGLES_OF].title} labels"
    )
    return figure


def remedies(found: dict[str, Any]) -> Figure:
    """Plot the mean target angle of clean samples by epoch, a panel for each margin and condition."""
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found["noise"]:
        if row["stage"] == REMEDY and row["epochs"]:
            panels.setdefault((row["condition"], _head(row)[0]), []).append(row)
    columns = len({margin for _, margin in panels})
    lines = -(-len(panels) // columns)
    size = (5.5 * columns, 3.6 * lines + 1)
    figure, grid = plt.subplots(
        lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, ((condition, margin), rows) in zip(grid.flat, panels.items(), strict=False):
        for row in rows:
            values = [epoch["clean"]["angle_mean"] for epoch in row["epochs"]]
            mode = _head(row)[1]
            color = f"C{list(MODES).index(mode)}"
            axes.plot(_numbers(row), values, marker=".", color=color, label=MODES[mode])
        axes.axhline(90, color="black", linestyle=":", linewidth=1.5, label="90°: unrelated to the center")
        axes.set(title=f"{MARGINS[margin].__name__}, {CONDITIONS[condition].title}", ylim=(0, 185))
        axes.set_yticks(range(0, 181, 30))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    figure.supylabel("mean target angle of clean samples, degrees")
    _legend_below(figure, columns=4)
    figure.suptitle("Drift of the exact gradient at s = 32 (ArcFace m = 0.5, ExpFace m = 0.7), and remedies")
    return figure


def _rows(found: dict[str, Any], stage: str, condition: str) -> list[dict[str, Any]]:
    return [
        row
        for row in found["noise"]
        if row["stage"] == stage and row["condition"] == condition and row["epochs"]
    ]


def _head(row: dict[str, Any]) -> Head:
    margin, _, mode = row["head"].partition("-")
    return margin, mode


def _numbers(row: dict[str, Any]) -> list[int]:
    return [epoch["epoch"] for epoch in row["epochs"]]


def _legend_below(figure: Figure, columns: int) -> None:
    """Add one legend for all panels below them, with each label once."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    style: dict[str, Any] = {"ncols": columns, "fontsize": 9}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", **style)
