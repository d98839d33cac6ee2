"""Which classes take part in a step: the batch's own, filled up with a uniform sample of the others.

Sizes depend on shapes alone and no value is read on the host. Time and memory are O(sample + rows), whatever
the number of classes.

C classes of this shard · N rows of all ranks · S classes of the sample
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# From this share of the classes on, one random key for each of them costs no more than drawing.
DENSE_SHARE = 4
MASK64 = 2**64 - 1
LARGEST_SEED = 2**63 - 1
"""Of a head: what a generator of torch takes on every device, and below zero too."""


def sample_size(rate: float, num_local: int, rows: int) -> int:
    """S: rate of this shard's classes, but room for as many as the global batch may have as targets."""
    return max(int(rate * num_local), min(rows, num_local))


def mixed_seed(*parts: int) -> int:
    """A seed that a change of any part, or of their order, changes throughout (splitmix64, chained).

    All of its bits matter: torch's CPU generator looks at the lowest 32 only.
    """
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & MASK64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK64
        state ^= state >> 31
    return state


class RecentSteps:
    """Remembers which step drew for which labels, for forwards that activation checkpointing runs again.

    A recomputation gets the labels of its forward, alive since then, so that no other tensor has had their
    memory; forwards over the same labels are run again in the opposite order.
    """

    KEPT = 256
    """Forwards that one backward may run again."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, int]] = []  # (address of the labels, step)

    def note(self, labels: Tensor, step: int) -> None:
        """Remember that a forward over these labels drew the sample of this step."""
        address = _address(labels)
        if address is not None:
            self._steps = [*self._steps[1 - self.KEPT :], (address, step)]

    def repeated(self, labels: Tensor) -> int | None:
        """Return the step of the forward that is run again over these labels; None where none is known."""
        address = _address(labels)
        for i in range(len(self._steps) - 1, -1, -1):
            if self._steps[i][0] == address:
                return self._steps.pop(i)[1]
        return None


def _address(labels: Tensor) -> int | None:
    """Return where the labels lie; None where that says nothing: under torch.compile, or what is wrong."""
    if (
        torch.compiler.is_compiling()
        or not isinstance(labels, Tensor)
        or type(labels).__name__ == "FakeTensor"
    ):
        return None
    return labels.data_ptr()


@dataclass(frozen=True)
class Sampler:
    """The sample of one step on one rank: the same for the same (seed, step, rank) on one kind of device."""

    rate: float
    seed: int
    step: int
    rank: int

    def __call__(self, targets: Tensor, num_local: int) -> Tensor | None:
        """(S,) int64 sorted, holding all targets; None where that would be every class.

        targets (N,) int64: classes of this shard, counted from its first; below 0 where there is none.
        """
        size = sample_size(self.rate, num_local, targets.shape[0])
        if size >= num_local:
            return None
        generator = torch.Generator(targets.device)
        generator.manual_seed(mixed_seed(self.seed, self.step, self.rank))
        return draw(targets, num_local, size, generator)


def draw(targets: Tensor, num_local: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` classes of [0, num_local), (S,) int64 sorted: all targets, the rest uniform, none twice.

    targets (N,) int64, below 0 where there is none, at most `size` different ones; size ≤ num_local. The
    others are exactly a uniform sample without replacement from the classes that are nobody's target.
    """
    if num_local < DENSE_SHARE * size:
        return _by_keys(targets, num_local, size, generator)
    return _by_draws(targets, num_local, size, generator)


def _by_keys(targets: Tensor, num_local: int, size: int, generator: torch.Generator) -> Tensor:
    """The classes with the largest of C random keys, targets' above all others; O(C) = O(S) here."""
    options = {"dtype": torch.float64, "device": targets.device}
    keys = torch.rand(num_local + 1, generator=generator, **options)  # type: ignore[call-overload]
    keys.index_fill_(0, torch.where(targets >= 0, targets, num_local), 2.0)
    return keys[:num_local].topk(size, sorted=False).indices.sort().values


def _by_draws(targets: Tensor, num_local: int, size: int, generator: torch.Generator) -> Tensor:
    """The first `size` different classes of a list: the targets, then draws with replacement.

    The first k different ones of independent uniform draws are a uniform k-subset.
    """
    count = draws_for(size, num_local)
    drawn = torch.randint(num_local, (count,), generator=generator, device=targets.device)
    listed = torch.cat([torch.where(targets >= 0, targets, num_local), drawn])
    classes, place = torch.sort(listed, stable=True)
    # Stable: of equal classes the one listed first comes first. num_local stands for "no target".
    new = torch.ones_like(classes, dtype=torch.bool)
    torch.ne(classes[1:], classes[:-1], out=new[1:])
    new &= classes < num_local
    in_order = torch.empty_like(new).scatter_(0, place, new)
    last = torch.searchsorted(torch.cumsum(in_order, 0, dtype=torch.int32), size)
    kept = new & (place <= last)
    # Those not kept all write to the slot past the end: how many there are is not known here.
    slot = torch.where(kept, torch.cumsum(kept, 0) - 1, size)
    return classes.new_zeros(size + 1).scatter_(0, slot, classes)[:size]


def draws_for(size: int, num_classes: int) -> int:
    """Draws with replacement that hold `size` different ones of num_classes ≥ 4·size.

    M draws hold n·(1 − e^(−M/n)) different ones on average, with a deviation below M/√(2n). This is the
    average and 15 deviations more: they are too few less than once in 10^40 calls.
    """
    mean = -num_classes * math.log1p(-size / num_classes)
    return math.ceil(mean + 15 * size / math.sqrt(num_classes)) + 64
