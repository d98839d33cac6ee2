"""Samples of classes: what is in them, that they are uniform, that they can be drawn again, what they cost.

C classes of a shard · N rows of the global batch · S classes of a sample
"""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from expface_kernels.distributed import sampling
from expface_kernels.distributed.sampling import Sampler, draw, draws_for, mixed_seed, sample_size
from expface_kernels.workshop.costs import PeakMemory

# Both ways of drawing: of 40 classes 12 (keys) and of 400 classes 12 (draws).
WAYS = ((40, 12), (400, 12))
# The largest share of correct tests that a χ² test may fail: with a fixed seed it fails always or never.
SIGNIFICANCE = 1e-4


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("rate", "classes", "rows", "size"),
    [
        (0.1, 1000, 64, 100),
        (0.1, 1000, 300, 300),  # room for the targets of 300 rows
        (0.1, 200, 300, 200),  # never more than there are
        (0.1, 9, 0, 0),
        (1.0, 1001, 4, 1001),
        (0.5, 1, 1, 1),
        (0.3, 0, 8, 0),  # an empty shard
    ],
)
def test_the_size_depends_on_the_rate_and_the_rows_alone(
    rate: float, classes: int, rows: int, size: int
) -> None:
    assert sample_size(rate, classes, rows) == size


@pytest.mark.parametrize(("classes", "size"), [*WAYS, (12, 12), (1, 1), (47, 12), (48, 12), (100_000, 40)])
@pytest.mark.parametrize("kind", ["none", "few", "repeated", "as many as fit"])
def test_a_sample_holds_all_targets_and_no_class_twice(classes: int, size: int, kind: str) -> None:
    for seed in range(20):
        g = generator(seed)
        several = torch.randperm(classes, generator=g)[:size]
        targets = {
            "none": torch.full((5,), -1),
            "few": torch.cat([several[: size // 3], torch.tensor([-1, -2])]),
            "repeated": several[: size // 3].repeat(4),
            "as many as fit": several[torch.randperm(size, generator=g)],
        }[kind]
        sample = draw(targets, classes, size, g)
        assert sample.dtype == torch.int64
        assert sample.shape == (size,)
        assert bool((sample.diff() > 0).all())
        assert sample[0] >= 0
        assert sample[-1] < classes
        assert torch.isin(targets[targets >= 0], sample).all()


@pytest.mark.parametrize(("classes", "size"), WAYS)
def test_what_is_nobodys_target_is_drawn_uniformly(classes: int, size: int) -> None:
    # χ² of how often each class is in a sample. Classes of one sample exclude each other, which makes counts
    # vary less than independent ones would: (1 − share) of it, by which the statistic is divided.
    targets = torch.tensor([3, 3, classes - 1, -1, 17])
    others = torch.ones(classes, dtype=torch.bool).index_fill_(0, targets[targets >= 0], False)
    rounds, drawn, free = 4000, size - 3, classes - 3
    g, counts = generator(5), torch.zeros(classes)
    for _ in range(rounds):
        counts += torch.bincount(draw(targets, classes, size, g), minlength=classes)
    assert (counts[~others] == rounds).all()
    expected = rounds * drawn / free
    statistic = float(((counts[others] - expected) ** 2 / expected).sum()) / (1 - drawn / free)
    # Free of one another but for their sum, and Σ (count − expected) = 0 in every round.
    statistic *= (free - 1) / free
    assert SIGNIFICANCE < scipy.stats.chi2.sf(statistic, free - 1) < 1 - SIGNIFICANCE


@pytest.mark.parametrize(("classes", "size"), [(6, 2), (16, 2)])
def test_every_pair_is_as_likely_as_every_other(classes: int, size: int) -> None:
    # Uniform single counts do not make a uniform sample: neighbours might come together.
    g, rounds = generator(7), 6000
    seen = torch.zeros(classes, classes)
    for _ in range(rounds):
        a, b = draw(torch.tensor([-1]), classes, size, g).tolist()
        seen[a, b] += 1
    pairs = seen[torch.ones(classes, classes).triu(1).bool()]
    assert pairs.sum() == rounds
    assert SIGNIFICANCE < scipy.stats.chisquare(pairs.numpy()).pvalue < 1 - SIGNIFICANCE


def test_a_sample_is_that_of_its_seed_step_and_rank() -> None:
    targets = torch.tensor([5, -1, 80])

    def sample(**changed: int) -> Tensor:
        found = Sampler(**{"rate": 0.05, "seed": 1, "step": 2, "rank": 3, **changed})(targets, 10_000)
        assert found is not None
        return found

    state = torch.get_rng_state()
    first = sample()
    assert torch.equal(sample(), first)
    assert torch.equal(torch.get_rng_state(), state)
    # As a hundred classes of a few thousand coincide by chance, and not in order.
    swapped = ({"seed": 2, "step": 1}, {"step": 3, "rank": 2}, {"seed": 3, "rank": 1})
    for changed in ({"seed": 2}, {"step": 3}, {"rank": 0}, {"seed": 1 + 2**40}, {"seed": -1}, *swapped):
        assert torch.isin(sample(**changed), first).double().mean() < 0.2
    # Neighbouring seeds, steps and ranks would meet if they were added up.
    seeds = {mixed_seed(a, b, c) & 0xFFFFFFFF for a in range(9) for b in range(9) for c in range(9)}
    assert len(seeds) == 9**3


def test_where_a_sample_would_be_every_class_there_is_none() -> None:
    sampler = Sampler(0.5, 0, 0, 0)
    assert sampler(torch.arange(20), 20) is None  # as many rows as classes
    assert sampler(torch.arange(19), 20) is not None
    assert sampler(torch.tensor([-1]), 1) is None


@pytest.mark.parametrize(("classes", "size"), [(40, 10), (4_000, 1_000), (10**7, 10**5), (10**7, 1)])
def test_so_many_draws_always_hold_enough_different_classes(classes: int, size: int) -> None:
    # Variance of the number of different classes among M draws, exactly (occupancy).
    n, m = classes, draws_for(size, classes)
    assert n >= sampling.DENSE_SHARE * size
    missed = (1 - 1 / n) ** m
    mean = n * (1 - missed)
    variance = n * missed * (1 - missed) + n * (n - 1) * ((1 - 2 / n) ** m - missed**2)
    assert mean - 12 * max(variance, 0) ** 0.5 > size - 1
    assert m < 1.2 * size + 15 * size / n**0.5 + 65
    if size > 100_000:
        return
    for seed in range(20):
        drawn = torch.randint(n, (m,), generator=generator(seed))
        assert len(drawn.unique()) >= size


@pytest.mark.parametrize("classes", [40, 400])
def test_no_value_is_read_on_the_host(classes: int) -> None:
    # Fake tensors have shapes and no values: what would read one, or take a size from it, raises.
    with FakeTensorMode():
        targets = torch.empty(4, dtype=torch.int64)
        sample = Sampler(0.2, 0, 1, 2)(targets, classes)
        assert sample is not None
        assert sample.shape == (classes // 5,)
        for read in (Tensor.tolist, Tensor.item, Tensor.nonzero, Tensor.unique, lambda t: t[t > 0]):
            with pytest.raises(RuntimeError):
                read(targets[:1])  # as the check itself must be able to fail


def test_memory_does_not_depend_on_the_number_of_classes() -> None:
    targets = torch.arange(64)
    peaks = []
    for classes in (10**5, 10**7, 10**9):
        with PeakMemory() as memory:
            draw(targets, classes, 1000, generator(0))
        peaks.append(memory.peak)
    assert peaks[2] <= peaks[0]  # fewer draws are repeated
    assert peaks[0] < 200 * 1000
