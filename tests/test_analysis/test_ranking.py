"""LabelNoiseRanker against a loop over single rows and single pairs; states, merging, bad input."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expface_kernels import BatchStats, ExpFace, margin_cross_entropy
from expface_kernels.analysis import AngularMonitor, LabelNoiseRanker, describe, ranking
from tests.cases import batch
from tests.test_analysis.test_monitor import stats_of
from tests.tolerances import ANGLE_MEAN

F64 = torch.float64


def made_stats(scores: list[float], classes: list[int] | None = None) -> BatchStats:
    """Rows whose target angle is `scores` farther than the nearest other class, at 1 rad."""
    n = len(scores)
    zeros = torch.zeros(n, dtype=F64)
    nearest = torch.full((n,), math.cos(1.0), dtype=F64)
    number = torch.tensor(classes if classes is not None else [7] * n)
    angle = 1.0 + torch.tensor(scores, dtype=F64)
    return BatchStats(angle, zeros, zeros, zeros, nearest, number, torch.zeros(n, dtype=torch.bool))


def brute_force(
    updates: list[tuple[Tensor, BatchStats]], samples: int, smoothing: float
) -> tuple[list[float], list[int]]:
    """Scores and likely classes, by one row after the other and the definition of a weighted mean."""
    seen: list[list[float]] = [[] for _ in range(samples)]
    likely = [-1] * samples
    for indices, stats in updates:
        for row, sample in enumerate(indices.tolist()):
            target, cos = float(stats.target_angle[row]), float(stats.hardest_negative_cos[row])
            if math.isnan(target) or math.isnan(cos) or int(stats.hardest_negative_class[row]) < 0:
                continue
            seen[sample].append(target - math.acos(max(-1.0, min(1.0, cos))))
            likely[sample] = int(stats.hardest_negative_class[row])
    scores = []
    for values in seen:
        weights = [smoothing**age for age in reversed(range(len(values)))]
        total = sum(weights)
        products = (w * v for w, v in zip(weights, values, strict=True))
        scores.append(sum(products) / total if values else math.nan)
    return scores, likely


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("waiting", [1, 64])
def test_scores_equal_a_loop_over_rows(
    smoothing: float, waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "WAITING", waiting)
    ranker = LabelNoiseRanker(50, smoothing=smoothing)
    g = torch.Generator().manual_seed(0)
    updates = []
    for seed in range(6):
        # 40 of 50 samples, with repetitions inside a batch; some rows ignored.
        indices = torch.randint(45, (40,), generator=g)
        updates.append((indices, stats_of(seed=seed, ignored=seed)))
        ranker.update(*updates[-1])
    scores, likely = brute_force(updates, 50, smoothing)
    torch.testing.assert_close(
        ranker.scores, torch.tensor(scores, dtype=F64), rtol=ANGLE_MEAN, atol=ANGLE_MEAN, equal_nan=True
    )
    assert ranker.likely_class.tolist() == likely
    assert ranker.likely_class[45:].tolist() == [-1] * 5
    order = sorted((i for i in range(50) if not math.isnan(scores[i])), key=lambda i: -scores[i])
    assert ranker.ranking().tolist() == order
    assert ranker.suspects(7).tolist() == order[:7]


def test_a_row_on_another_centre_is_the_first_suspect_and_belongs_there() -> None:
    x, w, y = batch("learnt", 30, 23, 16)
    x[11] = w[(y[11] + 3) % 23]
    ranker = LabelNoiseRanker(100)
    ranker.update(torch.arange(30) + 50, margin_cross_entropy(x, w, y, return_stats=True)[1])
    assert ranker.suspects(1).tolist() == [61]
    assert ranker.likely_class[61] == (y[11] + 3) % 23
    assert ranker.scores[61] > 0 > ranker.scores[62]


def test_equal_scores_rank_by_index_and_old_observations_fade() -> None:
    ranker = LabelNoiseRanker(4, smoothing=0.5)
    ranker.update(torch.tensor([3, 1, 2]), made_stats([0.5, 0.5, 0.8]))
    assert ranker.ranking().tolist() == [2, 1, 3]
    ranker.update(torch.tensor([2]), made_stats([-0.7]))
    assert float(ranker.scores[2]) == pytest.approx((0.5 * 0.8 - 0.7) / 1.5)
    assert ranker.ranking().tolist() == [1, 3, 2]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30).filter(
        lambda rows: len({noisy for _, noisy in rows}) == 2
    )
)
def test_auc_and_precision_equal_a_count_of_pairs(rows: list[tuple[int, bool]]) -> None:
    scores, noisy = [row[0] / 8 for row in rows], [row[1] for row in rows]
    ranker = LabelNoiseRanker(len(rows) + 2)
    ranker.update(torch.arange(len(rows)), made_stats(scores))
    quality = ranker.evaluate(torch.tensor([*noisy, True, False]))  # never seen: not counted
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a, n in zip(scores, noisy, strict=True)
        if n
        for b, m in zip(scores, noisy, strict=True)
        if not m
    ]
    assert quality.auc == pytest.approx(sum(pairs) / len(pairs))
    assert quality.k == sum(noisy)
    order = sorted(range(len(rows)), key=lambda i: (-scores[i], i))
    assert quality.precision == pytest.approx(sum(noisy[i] for i in order[: quality.k]) / quality.k)
    assert ranker.evaluate(torch.tensor([*noisy, True, False]), k=1).precision == float(noisy[order[0]])


def test_nothing_is_read_from_the_device_until_it_is_asked_for() -> None:
    stats = BatchStats(*(value.to("meta") for value in stats_of()))
    ranker = LabelNoiseRanker(40)
    for _ in range(ranking.WAITING - 1):
        ranker.update(torch.arange(40), stats)
    with pytest.raises(NotImplementedError, match="meta"):
        ranker.update(torch.arange(40), stats)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_any_integer_indexes(dtype: torch.dtype) -> None:
    ranker = LabelNoiseRanker(5)
    indices = torch.tensor([4, 0], dtype=dtype)
    ranker.update(indices, made_stats([0.1, 0.2]))
    indices[0] = 1  # a loader may use its buffer again
    assert ranker.ranking().tolist() == [0, 4]


def test_a_state_goes_through_a_file_and_on() -> None:
    ranker = LabelNoiseRanker(40, smoothing=0.3)
    updates = [(torch.arange(40), stats_of(seed=seed)) for seed in range(3)]
    ranker.update(*updates[0])
    file = io.BytesIO()
    torch.save(ranker.state_dict(), file)
    ranker.update(torch.arange(40), stats_of(seed=9))  # a state is a copy
    file.seek(0)
    again = LabelNoiseRanker(40, smoothing=0.3)
    again.update(torch.arange(40), stats_of(seed=8))  # forgotten
    again.load_state_dict(torch.load(file, weights_only=True))
    for update in updates[1:]:
        again.update(*update)
    scores, likely = brute_force(updates, 40, 0.3)
    torch.testing.assert_close(again.scores, torch.tensor(scores, dtype=F64), rtol=0, atol=ANGLE_MEAN)
    assert again.likely_class.tolist() == likely


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("weighted", torch.zeros(4, dtype=F64), r"expected weighted of shape \(5,\) .*, got shape \(4,\)"),
        ("weight", torch.zeros((5, 1), dtype=F64), r"expected weight of shape \(5,\) .* shape \(5, 1\)"),
        ("likely_class", torch.zeros(6).long(), r"expected likely_class of shape \(5,\) .* shape \(6,\)"),
        ("weight", torch.zeros(5), r"expected weight of .*float64, got .*float32"),
        ("likely_class", [1] * 5, r"expected likely_class of shape \(5,\) .*, got list"),
        ("weight", None, "expected weight among its keys, got num_samples, smoothing, weighted, likely"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(key: str, value: Any, words: str) -> None:
    ranker, other = LabelNoiseRanker(5), LabelNoiseRanker(5)
    ranker.update(torch.tensor([2, 0]), made_stats([0.5, 0.3], [8, 9]))
    other.update(torch.tensor([1]), made_stats([0.4]))
    state = {**other.state_dict(), key: value}
    if value is None:
        del state[key]
    with pytest.raises(ValueError, match=f"state: {words}"):
        ranker.load_state_dict(state)
    assert ranker.ranking().tolist() == [2, 0]
    assert ranker.likely_class.tolist() == [9, -1, 8, -1, -1]


def test_merged_ranks_hold_each_others_samples_and_the_mean_of_common_ones() -> None:
    one, two = LabelNoiseRanker(4), LabelNoiseRanker(4)
    one.update(torch.tensor([0, 1]), made_stats([0.4, 0.2], [5, 5]))
    two.update(torch.tensor([1, 2]), made_stats([0.6, -0.1], [6, 6]))
    two.update(torch.tensor([1]), made_stats([0.9], [8]))
    one.merge(two)
    expected = torch.tensor([0.4, (0.2 + 0.5 * 0.6 + 0.9) / 2.5, -0.1, math.nan], dtype=F64)
    torch.testing.assert_close(one.scores, expected, equal_nan=True)
    assert one.likely_class.tolist() == [5, 8, 6, -1]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_samples": 0}, ValueError, "num_samples: expected at least 1"),
        ({"num_samples": 3.0}, TypeError, "num_samples: expected an int"),
        (
            {"num_samples": 3, "smoothing": 1.0},
            ValueError,
            r"smoothing: expected a number in \[0, 1\), got 1.0",
        ),
        ({"num_samples": 3, "smoothing": -0.1}, ValueError, "got -0.1"),
        ({"num_samples": 3, "smoothing": "much"}, TypeError, "smoothing: expected a number, got str"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        LabelNoiseRanker(**options)


@pytest.mark.parametrize(
    ("indices", "error", "words"),
    [
        (torch.tensor([0, 5]), ValueError, "indices: expected 0 to 4, got 5"),
        (torch.tensor([-1, 0]), ValueError, "indices: expected 0 to 4, got -1"),
        (torch.tensor([0, 1, 2]), ValueError, r"expected target_angle of shape \(3,\), got \(2,\)"),
        (torch.tensor([[0, 1]]), ValueError, r"indices: expected shape \(B,\), got \(1, 2\)"),
        (torch.tensor([0.0, 1.0]), TypeError, "indices: expected an integer tensor"),
        ([0, 1], TypeError, "indices: expected an integer tensor .* got list"),
    ],
)
def test_a_bad_update_changes_nothing(indices: Any, error: type[Exception], words: str) -> None:
    ranker = LabelNoiseRanker(5)
    ranker.update(torch.tensor([2, 0]), made_stats([0.5, 0.3]))
    before = ranker.scores
    with pytest.raises(error, match=words):
        ranker.update(indices, made_stats([0.1, 0.1]))
    torch.testing.assert_close(ranker.scores, before, rtol=0, atol=0, equal_nan=True)
    ranker.update(torch.tensor([1]), made_stats([0.4]))
    assert ranker.ranking().tolist() == [2, 1, 0]


def test_bad_questions_are_named() -> None:
    ranker = LabelNoiseRanker(5)
    noisy = torch.tensor([True, False, False, False, False])
    with pytest.raises(ValueError, match="among the 0 samples seen"):
        ranker.evaluate(noisy)
    ranker.update(torch.tensor([2, 0, 1]), made_stats([0.5, 0.3, 0.2]))
    with pytest.raises(ValueError, match="k: expected at most the 3 samples seen, got 4"):
        ranker.suspects(4)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        ranker.evaluate(noisy, k=0)
    with pytest.raises(ValueError, match=r"is_noisy: expected shape \(5,\), got \(4,\)"):
        ranker.evaluate(noisy[:4])
    with pytest.raises(TypeError, match="is_noisy: expected a bool tensor"):
        ranker.evaluate(noisy.long())
    with pytest.raises(ValueError, match="both noisy and clean among the 3 samples seen, got 0 noisy"):
        ranker.evaluate(torch.zeros(5, dtype=torch.bool))
    before = ranker.scores
    for other in (LabelNoiseRanker(6), LabelNoiseRanker(5, smoothing=0.1)):
        with pytest.raises(ValueError, match=r"other: expected num_samples 5 and smoothing 0\.5"):
            ranker.merge(other)
        with pytest.raises(ValueError, match=r"state: expected num_samples 5 and smoothing 0\.5"):
            ranker.load_state_dict(other.state_dict())
    with pytest.raises(TypeError, match="other: expected a LabelNoiseRanker, got int"):
        ranker.merge(3)
    with pytest.raises(TypeError, match="state: expected a state_dict, got NoneType"):
        ranker.load_state_dict(None)
    torch.testing.assert_close(ranker.scores, before, rtol=0, atol=0, equal_nan=True)


def test_the_default_device_changes_nothing() -> None:
    stats = stats_of(rows=3)
    indices = torch.tensor([0, 2, 1])
    torch.set_default_device("meta")
    try:
        ranker, monitor = LabelNoiseRanker(4), AngularMonitor()
        ranker.update(indices, stats)
        monitor.update(stats)
        scores, percentiles = ranker.scores, monitor.end_epoch().target_percentiles()
        found = describe(ExpFace())
    finally:
        torch.set_default_device(None)
    nearest = torch.arccos(stats.hardest_negative_cos.clamp(-1, 1))
    assert torch.equal(scores[indices], stats.target_angle - nearest)
    assert percentiles == sorted(percentiles)
    assert found == describe(ExpFace())
