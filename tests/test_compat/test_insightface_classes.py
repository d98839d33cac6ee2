"""Which classes a step of PartialFC_V2 takes, and which of them the filter leaves out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expface_kernels.backends import reference
from expface_kernels.compat.insightface import Sampler
from tests import cases
from tests.test_compat import theirs
from tests.test_compat.one_process import B, C, D, build, compare, rows, step


def took_part(dw: Tensor) -> Tensor:
    """The classes with a gradient."""
    return dw.any(dim=1).nonzero()[:, 0]


@pytest.mark.parametrize(("rate", "taken"), [(0.5, 11), (0.3, 6), (0.05, 5), (0.01, 5)])
def test_a_sample_has_their_size_or_the_targets_alone(rate: float, taken: int) -> None:
    x, w, _ = rows("random")
    y = torch.tensor([3, 5, 7, 7, 22, 0, 0, 3, 5, 7, 22, 0])
    module = build(theirs.CosFace(), w, sample_rate=rate)
    assert module.num_sample == int(rate * C)
    for training in (True, False):
        found = step(module.train(training), x, y)
        classes = took_part(found[2])
        assert len(classes) == taken
        assert set(y.tolist()) <= set(classes.tolist())
        compare(
            (found[0], found[1], found[2][classes]),
            theirs.eager(theirs.CosFace(), x, w[classes], torch.searchsorted(classes, y)),
        )


def test_samples_follow_the_global_seed_and_differ_by_step_and_rank() -> None:
    targets = torch.tensor([4, -1, 900])
    drawn = {}
    for seed, rank in ((0, 0), (0, 1), (1, 0)):
        torch.manual_seed(seed)
        drawn[seed, rank] = [tuple(Sampler(50, rank)(targets, 1000).tolist()) for _ in range(2)]
        torch.manual_seed(seed)
        assert tuple(Sampler(50, rank)(targets, 1000).tolist()) == drawn[seed, rank][0]
    every = [one for draws in drawn.values() for one in draws]
    assert len(set(every)) == 6
    for one in every:
        assert len(one) == 50
        assert list(one) == sorted(set(one))
        assert {4, 900} <= set(one)


def test_a_rank_without_targets_and_with_a_tiny_share_takes_one_class() -> None:
    """int(0.01 · 5) = 0, where theirs cannot take a maximum."""
    found = Sampler(0, 0)(torch.tensor([-1, -1]), 5)
    assert found.shape == (1,)
    assert 0 <= int(found) < 5


@pytest.mark.parametrize("tile", [1, 5, 1000])
@pytest.mark.parametrize("threshold", [0.1, 0.99])
def test_filtered_cosines_count_as_zero(tile: int, threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that lie on another class's centre: without a filter that class is all of the softmax."""
    monkeypatch.setattr(reference, "FILTER_TILE_ELEMENTS", tile * B)
    x, w, y = cases.batch("wrong_class", B, C, D)
    margin_loss = theirs.CombinedMarginLoss(64, 1, 0.5, 0, threshold)
    module = build(margin_loss, w)
    found = step(module, x, y)
    compare(found, theirs.eager(margin_loss, x, w, y))
    unfiltered = theirs.eager(theirs.ArcFace(64.0, 0.5), x, w, y)
    assert float(found[0]) < float(unfiltered[0]) - 10


def test_a_filter_that_meets_nothing_changes_nothing() -> None:
    x, w, y = rows("random")
    plain = step(build(theirs.ArcFace(64.0, 0.5), w), x, y)
    compare(step(build(theirs.CombinedMarginLoss(64, 1, 0.5, 0, 1.5), w), x, y), plain)
    compare(step(build(theirs.CombinedMarginLoss(64, 1, 0.5, 0, -1), w), x, y), plain)


def test_a_filtered_sample_is_theirs() -> None:
    x, w, y = rows("random")
    margin_loss = theirs.CombinedMarginLoss(64, 1, 0.5, 0, 0.2)
    module = build(margin_loss, w, sample_rate=0.7)
    torch.manual_seed(3)
    classes = Sampler(module.num_sample, 0)(y, C)
    assert len(classes) == 16
    torch.manual_seed(3)
    loss, dx, dw = step(module, x, y)
    expected = theirs.eager(margin_loss, x, w[classes], torch.searchsorted(classes, y))
    compare((loss, dx, dw[classes]), expected)
    assert set(took_part(dw).tolist()) <= set(classes.tolist())


def test_the_filter_does_not_keep_logits() -> None:
    """Or a million classes would not fit: what autograd saves has no (B, C) among it."""
    x, w, y = rows("random")
    module = build(theirs.CombinedMarginLoss(64, 1, 0.5, 0, 0.2), w)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x.clone().requires_grad_(), y)
    assert sizes
    assert B * C not in sizes
