"""Pictures of margins, and of the angles that a monitor saw. Needs matplotlib (the extra `analysis`).

Figures are made without pyplot: no window, no global state, no backend chosen for the rest of the program.
N angles · degrees on every axis that is an angle
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from expface_kernels.analysis import curves
from expface_kernels.analysis.angle_counts import AngleCounts
from expface_kernels.margins import MarginFunction

DPI = 130
POINTS = 721  # a quarter of a degree apart
# Margins that coincide (CombinedMargin's default is ArcFace's) show through one another.
STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Panel:
    """One curve over the target angle: `values` maps a margin and (N,) radians to (N,)."""

    title: str
    label: str
    values: Callable[[MarginFunction, Tensor], Tensor]
    limits: tuple[float, float] | None = None
    beside: str | None = None  # a thin black line to compare with: a level, or "diagonal"


def _towards_centre(target_gradient: str) -> Callable[[MarginFunction, Tensor], Tensor]:
    return lambda margin, theta: -curves.slope(margin, theta, target_gradient)


def _degrees(f: Callable[[MarginFunction, Tensor], Tensor]) -> Callable[[MarginFunction, Tensor], Tensor]:
    return lambda margin, theta: torch.rad2deg(f(margin, theta))


# Name of the picture → its panels, side by side.
VIEWS = {
    "similarity": [Panel("Similarity of the target", "psi(θ)", curves.similarity)],
    "penalty_cosine": [Panel("Penalty in cosine", "cos θ − psi(θ)", curves.cosine_penalty)],
    "penalty_angle": [Panel("Penalty in angle", "φ(θ) − θ, degrees", _degrees(curves.angular_penalty))],
    "target_gradient": [
        Panel("Exact target gradient", "−dpsi/dθ; below 0 it pushes away", _towards_centre("exact")),
        Panel("Detached target gradient", "sin θ, whatever the margin", _towards_centre("detached")),
    ],
    "pull": [
        Panel(
            "Exact pull of the target / push of the other classes",
            "r = dpsi/dcos θ; detached it is 1",
            curves.pull,
            limits=(-1, 3),
            beside="1",
        )
    ],
    "decision_boundary": [
        Panel(
            "Decision boundary: above its line a row satisfies the margin",
            "angle to the other class θ2, degrees",
            _degrees(curves.decision_boundary),
            limits=(0, 180),
            beside="diagonal",
        )
    ],
}


def draw_views(margins: Sequence[MarginFunction], out: Path) -> list[Path]:
    """One PNG a view in the folder `out`, all margins in each; makes the folder, returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, panels in VIEWS.items():
        files.append(out / f"{name}.png")
        save(view_figure(panels, margins), files[-1])
    return files


def save(figure: Figure, file: Path) -> None:
    """Write a PNG."""
    figure.savefig(file, dpi=DPI)


def view_figure(panels: Sequence[Panel], margins: Sequence[MarginFunction]) -> Figure:
    """The panels side by side, each with all margins."""
    figure = Figure(figsize=(7 * len(panels), 4.8), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(grid, panels, strict=True):
        _draw_lines(axes, panel.values, margins)
        if panel.beside == "diagonal":
            axes.plot([0, 180], [0, 180], color="black", linewidth=0.8)
        elif panel.beside is not None:
            axes.axhline(float(panel.beside), color="black", linewidth=0.8)
        axes.set(title=panel.title, xlabel="target angle θ, degrees", ylabel=panel.label, ylim=panel.limits)
        _angle_axis(axes)
    grid[0].legend(fontsize=8)
    return figure


def distribution_figure(angles: AngleCounts, margins: Sequence[MarginFunction]) -> Figure:
    """Where an epoch's rows lay: own class against nearest other, and each margin's decision boundary."""
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(0, 180, angles.bins + 1)
    counts = angles.histogram.numpy()
    image = axes.pcolormesh(
        edges, edges, np.ma.masked_equal(counts.T, 0), norm=LogNorm(1, max(2.0, float(counts.max())))
    )
    figure.colorbar(image, label="rows (log scale)")
    axes.plot([0, 180], [0, 180], color="black", linewidth=0.8, label="no margin: nearest class changes")
    _draw_lines(axes, _degrees(curves.decision_boundary), margins)
    axes.set(
        title=f"Epoch {angles.epoch}: {angles.rows:,} rows, {angles.accuracy:.1%} nearest to their own class",
        xlabel="angle to the own class, degrees",
        ylabel="angle to the nearest other class, degrees",
        ylim=(0, 180),
    )
    _angle_axis(axes)
    axes.legend(loc="upper left", fontsize=8)
    return figure


def _draw_lines(
    axes: Axes, values: Callable[[MarginFunction, Tensor], Tensor], margins: Sequence[MarginFunction]
) -> None:
    theta = torch.linspace(0, math.pi, POINTS, dtype=torch.float64, device="cpu").clamp_max(math.pi)
    for i, margin in enumerate(margins):
        style = STYLES[i % len(STYLES)]
        x, y = torch.rad2deg(theta).numpy(), values(margin, theta).numpy()
        # Broken lines lie above whole ones, so that of two equal curves both are seen.
        axes.plot(x, y, style, color=f"C{i % 10}", label=curves.label(margin), zorder=2 + (style != "-") / 2)


def _angle_axis(axes: Axes) -> None:
    axes.set(xlim=(0, 180), xticks=range(0, 181, 30))
    axes.grid(alpha=0.3)
