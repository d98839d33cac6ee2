"""Open-set verification: "the same character?" for glyphs in two fonts, neither ever trained on.

Shapes: K characters, F fonts, D features; e (K, F, D) float32 unit embeddings. For each of the F(F-1)/2 pairs
of fonts, genuine scores are the K cosines of a character with itself, impostor scores the K(K-1) of two
different ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from torch import Tensor

FAR_LEVELS = (1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class Scores:
    """Cosines of all pairs, (G,) and (I,) float32, both ascending."""

    genuine: np.ndarray
    impostor: np.ndarray

    def threshold(self, far: float) -> float:
        """The (floor(far * I) + 1)-th impostor score from the top: at most far * I impostors lie above it."""
        if not 0 <= far < 1:
            raise ValueError(f"far: expected at least 0 and below 1, got {far}")
        return float(self.impostor[-1 - int(far * len(self.impostor))])

    def tar(self, far: float) -> float:
        """Share of genuine pairs accepted (scored above the threshold) at false accept rate `far`."""
        return _share_above(self.genuine, self.threshold(far))

    def far(self, threshold: float) -> float:
        """Share of impostor pairs scored above `threshold`."""
        return _share_above(self.impostor, threshold)

    def auc(self) -> float:
        """Probability that a genuine pair scores above an impostor pair; ties count half."""
        below = np.searchsorted(self.impostor, self.genuine, side="left")
        up_to = np.searchsorted(self.impostor, self.genuine, side="right")
        return float((below + up_to).mean() / 2 / len(self.impostor))


def _share_above(ascending: np.ndarray, threshold: float) -> float:
    return 1 - int(np.searchsorted(ascending, np.float32(threshold), side="right")) / len(ascending)


@dataclass(frozen=True)
class Verification:
    """What the protocol measures; `rank1_by_font` is keyed by the query's font."""

    scores: Scores
    tar: dict[float, float]
    auc: float
    rank1: float
    rank1_by_font: dict[str, float]


def verify_glyphs(e: Tensor, fonts: tuple[str, ...]) -> Verification:
    """The whole protocol on e (K, F, D); takes 8 bytes of memory for each of the F(F-1)/2 * K^2 pairs."""
    scores = pair_scores(e)
    by_font = rank1_by_query_font(e)
    return Verification(
        scores=scores,
        tar={far: scores.tar(far) for far in FAR_LEVELS},
        auc=scores.auc(),
        rank1=float(by_font.mean()),
        rank1_by_font=dict(zip(fonts, by_font.tolist(), strict=True)),
    )


def pair_scores(e: Tensor) -> Scores:
    """Genuine and impostor cosines over all unordered pairs of fonts."""
    _check(e)
    same = np.eye(e.shape[0], dtype=bool)
    genuine, impostor = [], []
    for cosines in _cosines(e, combinations(range(e.shape[1]), 2)):
        genuine.append(cosines[same])
        impostor.append(cosines[~same])
    return Scores(np.sort(np.concatenate(genuine)), np.sort(np.concatenate(impostor)))


def rank1_by_query_font(e: Tensor) -> np.ndarray:
    """(F,) share of queries in a font whose nearest of the K glyphs in another is their own, over all others.

    Another glyph that is just as near makes a miss.
    """
    _check(e)
    characters, fonts = e.shape[:2]
    hits = np.zeros((fonts, fonts))
    ordered = [(a, b) for a in range(fonts) for b in range(fonts) if a != b]
    for (query, gallery), cosines in zip(ordered, _cosines(e, iter(ordered)), strict=True):
        own = cosines.diagonal().copy()
        np.fill_diagonal(cosines, -np.inf)
        hits[query, gallery] = (own > cosines.max(axis=1)).mean() if characters > 1 else 1.0
    return hits.sum(axis=1) / (fonts - 1)


def _cosines(e: Tensor, pairs: Iterator[tuple[int, int]]) -> Iterator[np.ndarray]:
    """(K, K) cosines, row: character in the first font of a pair, column: character in the second."""
    for a, b in pairs:
        yield (e[:, a] @ e[:, b].T).numpy()


def _check(e: Tensor) -> None:
    if e.dim() != 3 or e.shape[0] < 2 or e.shape[1] < 2:
        raise ValueError(f"embeddings: expected (K, F, D) with K, F at least 2, got {tuple(e.shape)}")
    finite = e.isfinite().all(dim=2)
    if not bool(finite.all()):
        count, first = int((~finite).sum()), tuple((~finite).nonzero()[0].tolist())
        raise ValueError(
            f"embeddings: expected finite numbers, got NaN or infinity in {count} of {finite.numel()} "
            f"glyphs, the first at (character, font) {first}"
        )
