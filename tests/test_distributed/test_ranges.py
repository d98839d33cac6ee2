"""Class ranges: the two rules against what DTensor and InsightFace's formula give, on odd sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expface_kernels.distributed.ranges import ClassRange, insightface_ranges, shard_ranges

Rule = Callable[[int, int], list[ClassRange]]


def for_any_sizes(test: Callable[..., None]) -> Callable[..., None]:
    """More and fewer classes than ranks, the same ones in every run."""
    sizes = given(classes=st.integers(1, 1003), ranks=st.integers(1, 20))
    return settings(deadline=None, derandomize=True, max_examples=60)(sizes(test))


@pytest.mark.parametrize("rule", [shard_ranges, insightface_ranges])
@for_any_sizes
def test_ranges_lie_end_to_end_and_cover_every_class_once(rule: Rule, classes: int, ranks: int) -> None:
    ranges = rule(classes, ranks)
    assert len(ranges) == ranks
    assert ranges[0].start == 0
    assert ranges[-1].stop == classes
    for left, right in itertools.pairwise(ranges):
        assert left.stop == right.start
    assert all(r.size >= 0 for r in ranges)


@for_any_sizes
def test_shards_are_the_chunks_that_torch_cuts(classes: int, ranks: int) -> None:
    # DTensor's Shard(0) is defined as torch.chunk, with empty tensors for the ranks that get none.
    chunks = [chunk.tolist() for chunk in torch.arange(classes).chunk(ranks)]
    chunks += [[]] * (ranks - len(chunks))
    assert [list(range(r.start, r.stop)) for r in shard_ranges(classes, ranks)] == chunks


@for_any_sizes
def test_insightface_sizes_follow_its_formula(classes: int, ranks: int) -> None:
    for rank, found in enumerate(insightface_ranges(classes, ranks)):
        assert found.size == classes // ranks + int(rank < classes % ranks)
        assert found.start == classes // ranks * rank + min(rank, classes % ranks)


def test_examples_worked_by_hand() -> None:
    assert shard_ranges(5, 4) == [(0, 2), (2, 2), (4, 1), (5, 0)]
    assert insightface_ranges(5, 4) == [(0, 2), (2, 1), (3, 1), (4, 1)]
    assert shard_ranges(10, 4) == [(0, 3), (3, 3), (6, 3), (9, 1)]


@pytest.mark.parametrize("rule", [shard_ranges, insightface_ranges])
@pytest.mark.parametrize(("classes", "ranks", "name"), [(0, 2, "num_classes"), (4, 0, "world_size")])
def test_less_than_one_class_or_rank_is_refused(rule: Rule, classes: int, ranks: int, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected at least 1, got 0$"):
        rule(classes, ranks)
