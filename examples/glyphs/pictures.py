"""Pictures: training curves, ROC, histograms of cosines, queries with their nearest glyphs, suspected labels.

Shapes: K characters, F fonts, D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from .dataset import GlyphSet
from .verification import FAR_LEVELS, Verification

_DPI = 130
_GENUINE, _IMPOSTOR = "#1b7837", "#762a83"
_RIGHT, _WRONG = "#1b7837", "#c51b2d"


@dataclass
class Curve:
    """Loss and mean target angle (degrees) of every step."""

    steps_per_epoch: int
    losses: list[float] = field(default_factory=list)
    angles: list[float] = field(default_factory=list)


def training_curves(path: Path, curves: dict[str, Curve]) -> None:
    """Loss and angle against epochs: each step pale, the running mean of a tenth of an epoch on top."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, (name, curve) in enumerate(curves.items()):
        epochs = np.arange(1, len(curve.losses) + 1) / curve.steps_per_epoch
        for axes, values in ((left, curve.losses), (right, curve.angles)):
            axes.plot(epochs, values, color=f"C{i}", alpha=0.2, linewidth=0.7)
            mean = _running_mean(values, max(1, curve.steps_per_epoch // 10))
            axes.plot(epochs[len(epochs) - len(mean) :], mean, color=f"C{i}", label=name)
    left.set(title="Training loss", xlabel="epoch", ylabel="loss, nats (log scale)", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    right.set(title="Angle to the own class centre", xlabel="epoch", ylabel="mean target angle, degrees")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    right.legend(title="margin")
    _save(figure, path)


def _running_mean(values: Sequence[float], width: int) -> np.ndarray:
    width = min(width, len(values))
    return np.convolve(values, np.full(width, 1 / width), mode="valid")


def roc(path: Path, results: dict[str, Verification]) -> None:
    """True against false accept rate, the latter on a log axis; the printed levels are marked."""
    figure, axes = plt.subplots(figsize=(6.5, 5), layout="constrained")
    for name, result in results.items():
        scores = result.scores
        levels = np.geomspace(1 / len(scores.impostor), 0.999, 300)
        (line,) = axes.plot(
            levels, [scores.tar(far) for far in levels], label=f"{name}, AUC {result.auc:.4f}"
        )
        axes.plot(
            FAR_LEVELS, [result.tar[far] for far in FAR_LEVELS], "o", color=line.get_color(), markersize=4
        )
    axes.set(
        title="Same character? Unseen kanji in unseen fonts",
        xlabel="false accept rate (different characters accepted)",
        ylabel="true accept rate (same character accepted)",
        xscale="log",
        xlim=(1e-6, 1),
        ylim=(0, 1.01),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    _save(figure, path)


def cosine_histograms(path: Path, results: dict[str, Verification]) -> None:
    """Densities of genuine and impostor cosines, one row per head, with the threshold at FAR 1e-3."""
    rows = len(results)
    figure, grid = plt.subplots(
        rows, 1, figsize=(8, 1.2 + 2.6 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    bins = np.linspace(-1, 1, 121).tolist()
    for axes, (name, result) in zip(grid[:, 0], results.items(), strict=True):
        scores = result.scores
        for values, color, label in (
            (scores.impostor, _IMPOSTOR, f"impostor: different characters ({len(scores.impostor):,} pairs)"),
            (scores.genuine, _GENUINE, f"genuine: the same character ({len(scores.genuine):,} pairs)"),
        ):
            axes.hist(values, bins=bins, density=True, color=color, alpha=0.55, label=label)
        threshold = scores.threshold(1e-3)
        label = f"threshold {threshold:.3f}: FAR 0.001, TAR {result.tar[1e-3]:.3f}"
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label=label)
        axes.set(title=f"{name}: cosines between glyphs in two unseen fonts", ylabel="density")
        axes.legend(fontsize=8)
    grid[-1, 0].set_xlabel("cosine")
    _save(figure, path)


def nearest_sheet(path: Path, test: GlyphSet, e: Tensor, queries: int = 16, nearest: int = 10) -> None:
    """Queries, fonts in turn, and the nearest test glyphs in any other font, with their cosines.

    e (K, F, D): unit embeddings of `test`. Frames are green where the character is the query's, else red.
    """
    rows = nearest_glyphs(e, queries, nearest)
    width, height = (
        nearest + 1.3,
        1.3 * len(rows),
    )  # in glyphs; all in one Axes, since hundreds of them are slow
    figure, axes = plt.subplots(figsize=(0.75 * (width + 1), 0.75 * height + 0.9), layout="constrained")
    for i, row in enumerate(rows):
        top = 1.3 * i
        _glyph(axes, test.images[row.query], (0, top), "black")
        axes.text(-0.15, top + 0.5, test.fonts[row.query[1]], ha="right", va="center", fontsize=8)
        for j, (place, cosine) in enumerate(zip(row.found, row.cosines, strict=True)):
            color = _RIGHT if place[0] == row.query[0] else _WRONG
            _glyph(axes, test.images[place], (1.3 + j, top), color)
            axes.text(1.75 + j, top + 1.08, f"{cosine:.2f}", ha="center", va="center", fontsize=7)
    axes.text(0.45, -0.25, "query", ha="center", fontsize=9)
    axes.text(1.75, -0.25, "nearest", ha="center", fontsize=9)
    axes.set(xlim=(-0.1, width), ylim=(height, -0.1), aspect="equal")
    axes.axis("off")
    figure.suptitle(
        "Unseen glyphs and their nearest ones in other unseen fonts\n"
        "(cosine below; green: same character, red: another)",
        fontsize=10,
    )
    _save(figure, path)


@dataclass(frozen=True)
class Suspect:
    """A sample whose label looks wrong; classes are shown by an image that is sure of its label.

    image, given, likely (32, 32) uint8; score in radians, as LabelNoiseRanker has it.
    """

    image: Tensor
    given: Tensor
    likely: Tensor
    score: float
    is_noisy: bool  # the label was flipped
    is_right: bool  # the likely class is the true one


def suspect_sheet(path: Path, suspects: Sequence[Suspect], columns: int = 6) -> None:
    """Suspects in the order of their rank, row by row: the image, the class given to it, the likely class.

    The given class is framed red where the label was flipped, else green; the likely class green where it is
    the true one.
    """
    rows = math.ceil(len(suspects) / columns)
    wide, high = 3.5, 1.35  # of a suspect, in glyphs
    width, height = columns * wide, rows * high
    figure, axes = plt.subplots(figsize=(0.55 * width, 0.55 * height + 1), layout="constrained")
    for i, suspect in enumerate(suspects):
        left, top = (i % columns) * wide, (i // columns) * high
        _glyph(axes, suspect.image, (left, top), "black")
        _glyph(axes, suspect.given, (left + 1, top), _WRONG if suspect.is_noisy else _RIGHT)
        _glyph(axes, suspect.likely, (left + 2, top), _RIGHT if suspect.is_right else _WRONG)
        label = f"{i + 1}: {math.degrees(suspect.score):.0f}°"
        axes.text(left + 0.45, top + 1.08, label, ha="center", va="center", fontsize=7)
    for column in range(columns):
        for j, name in enumerate(("image", "given", "likely")):
            axes.text(column * wide + j + 0.45, -0.2, name, ha="center", fontsize=7)
    axes.set(xlim=(-0.1, width), ylim=(height, -0.5), aspect="equal")
    axes.axis("off")
    figure.suptitle(
        "The most suspicious labels. Below: rank, how much farther the given class is than the likely one.\n"
        "given: red = the label was flipped, green = it is right; likely: green = it is the true class",
        fontsize=9,
    )
    _save(figure, path)


def _glyph(axes: Axes, image: Tensor, corner: tuple[float, float], color: str) -> None:
    """Draw `image` (32, 32) 0.9 units wide with its upper left at `corner`, in a frame."""
    left, top = corner
    extent = (left, left + 0.9, top + 0.9, top)
    axes.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=255, extent=extent)
    axes.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, edgecolor=color, linewidth=1.6))


@dataclass(frozen=True)
class Nearest:
    """A query and what lies nearest to it; a place is (character, font)."""

    query: tuple[int, int]
    found: list[tuple[int, int]]
    cosines: list[float]


def nearest_glyphs(e: Tensor, queries: int, nearest: int) -> list[Nearest]:
    """For `queries` characters of e (K, F, D), fonts in turn, the `nearest` glyphs in all other fonts."""
    characters, fonts = e.shape[:2]
    chosen = np.random.default_rng(0).permutation(characters)[:queries]
    rows = []
    for i, character in enumerate(sorted(int(c) for c in chosen)):
        font = i * fonts // len(chosen)
        cosines = e @ e[character, font]
        cosines[:, font] = -torch.inf
        best, flat = cosines.flatten().topk(min(nearest, characters * (fonts - 1)))
        found = [divmod(int(place), fonts) for place in flat]
        rows.append(Nearest((character, font), found, best.tolist()))
    return rows


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
