"""The verification protocol against brute force, on arrays small enough to enumerate."""

from itertools import combinations, permutations

import numpy as np
import pytest
import torch

from examples.glyphs.verification import Scores, pair_scores, rank1_by_query_font, verify_glyphs
from tests.tolerances import COSINE

K, FONTS, D = 7, 4, 5


@pytest.fixture
def e() -> torch.Tensor:
    """(K, F, D) unit embeddings: characters recognisable, but not perfectly so."""
    generator = torch.Generator().manual_seed(3)
    centre = torch.randn((K, 1, D), generator=generator)
    noise = torch.randn((K, FONTS, D), generator=generator)
    return torch.nn.functional.normalize(centre + 0.8 * noise, dim=-1)


def brute_force_pairs(e: torch.Tensor) -> tuple[list[float], list[float]]:
    genuine, impostor = [], []
    for a, b in combinations(range(FONTS), 2):
        for i in range(K):
            for j in range(K):
                score = float(e[i, a] @ e[j, b])
                (genuine if i == j else impostor).append(score)
    return genuine, impostor


def test_pair_scores_are_all_pairs_of_two_fonts(e: torch.Tensor) -> None:
    genuine, impostor = brute_force_pairs(e)
    scores = pair_scores(e)
    np.testing.assert_allclose(scores.genuine, sorted(genuine), atol=COSINE)
    np.testing.assert_allclose(scores.impostor, sorted(impostor), atol=COSINE)


@pytest.mark.parametrize("far", [0.0, 0.01, 0.05, 0.2, 0.9])
def test_tar_is_the_share_above_the_threshold_that_lets_far_pass(e: torch.Tensor, far: float) -> None:
    genuine, impostor = brute_force_pairs(e)
    threshold = sorted(impostor, reverse=True)[int(far * len(impostor))]
    expected = sum(score > threshold + 1e-7 for score in genuine) / len(genuine)
    scores = pair_scores(e)
    assert scores.tar(far) == pytest.approx(expected)
    assert scores.far(scores.threshold(far)) == pytest.approx(int(far * len(impostor)) / len(impostor))


def test_threshold_by_hand() -> None:
    impostor = np.arange(10, dtype=np.float32) / 10
    scores = Scores(np.array([0.65, 0.75, 0.85, 0.95], np.float32), impostor)
    assert scores.threshold(0.0) == pytest.approx(0.9)
    assert scores.threshold(0.25) == pytest.approx(0.7)  # floor(2.5) = 2 impostors lie above it
    assert (scores.tar(0.0), scores.tar(0.25)) == (0.25, 0.75)


def test_impostors_tied_at_the_threshold_are_not_accepted() -> None:
    scores = Scores(np.array([0.5, 0.6], np.float32), np.full(100, 0.5, np.float32))
    assert scores.tar(0.1) == 0.5
    assert scores.far(scores.threshold(0.1)) == 0.0


def test_auc_counts_pairs_and_halves_ties() -> None:
    genuine, impostor = [0.2, 0.5, 0.5, 0.9], [0.1, 0.5, 0.6]
    expected = sum((g > i) + 0.5 * (g == i) for g in genuine for i in impostor) / 12
    scores = Scores(np.array(genuine, np.float32), np.array(impostor, np.float32))
    assert scores.auc() == pytest.approx(expected)


def test_rank1_is_the_mean_over_ordered_pairs_of_fonts(e: torch.Tensor) -> None:
    hits = np.zeros((FONTS, FONTS))
    for query, gallery in permutations(range(FONTS), 2):
        for i in range(K):
            nearest = max(range(K), key=lambda j: float(e[i, query] @ e[j, gallery]))
            hits[query, gallery] += nearest == i
    by_font = hits.sum(1) / K / (FONTS - 1)
    assert 0.2 < by_font.mean() < 0.99  # neither all nor nothing: the comparison says something
    np.testing.assert_allclose(rank1_by_query_font(e), by_font)
    report = verify_glyphs(e, ("a", "b", "c", "d"))
    assert report.rank1 == pytest.approx(by_font.mean())
    assert report.rank1_by_font["c"] == pytest.approx(by_font[2])


def test_indistinguishable_glyphs_are_no_hits() -> None:
    e = torch.ones((3, 2, 1))
    assert verify_glyphs(e, ("a", "b")).rank1 == 0.0
    assert verify_glyphs(e, ("a", "b")).auc == 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_no_numbers_are_refused(e: torch.Tensor, value: float) -> None:
    e[2, 1, 3] = value
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 of 28 glyphs, the first at .* \(2, 1\)"):
        verify_glyphs(e, ("a", "b", "c", "d"))
    with pytest.raises(ValueError, match="embeddings: expected finite numbers"):
        rank1_by_query_font(e)


def test_far_and_shapes_are_checked() -> None:
    scores = Scores(np.zeros(1, np.float32), np.zeros(1, np.float32))
    with pytest.raises(ValueError, match=r"far: expected at least 0 and below 1, got 1\.5"):
        scores.threshold(1.5)
    with pytest.raises(ValueError, match=r"K, F at least 2, got \(3, 1, 4\)"):
        pair_scores(torch.ones((3, 1, 4)))
