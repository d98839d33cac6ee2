"""Seconds of a step: peers take turns round by round, so that whatever else the machine does falls on all."""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from bench import cuda
from bench.budget import CLOCK, Clock
from bench.cases import Inputs
from bench.peers.base import Step

PAGE_BYTES = 4096
WARM_UPS = 2


@dataclass(frozen=True)
class Spread:
    """Median and quartiles, in the unit of what went in."""

    median: float
    first_quartile: float
    third_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        first, median, third = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, first, third)


def quietest_run(runs: Sequence[dict[str, list[float]]]) -> int:
    """The run with the least product of its peers' medians: the one least disturbed, whomever it favours.

    Of a sum most would be the slowest peer's. All runs have the same peers.
    """

    def logs(run: dict[str, list[float]]) -> float:
        return sum(math.log(statistics.median(seconds)) for seconds in run.values())

    return min(range(len(runs)), key=lambda i: logs(runs[i]))


def turn(names: Sequence[str], round_: int) -> list[str]:
    """The names in the order of this round: shuffled, in the same way on every run, and then backwards.

    So that over two rounds all have the same mean place, and nobody always finds the same peer's caches.
    """
    order = random.Random(str(round_ // 2)).sample(list(names), len(names))
    return order[::-1] if round_ % 2 else order


def touch(gradient: Tensor) -> float:
    """Sum of one element a page: pages that nobody has written are not real until they are used.

    Read where they lie, in a transposed gradient too: a copy would be a part of the step's time.
    """
    a_page = PAGE_BYTES // gradient.element_size()
    as_it_lies = gradient.permute(sorted(range(gradient.dim()), key=gradient.stride, reverse=True))
    if as_it_lies.is_contiguous():
        return as_it_lies.view(-1)[::a_page].sum().item()
    return as_it_lies[..., ::a_page].sum().item()  # rows with room between them: each has its pages


def timed_step(step: Step, inputs: Inputs, clock: Clock = CLOCK) -> float:
    """Seconds to go through the step and have loss and gradients; the last peer's are dropped before.

    Wall clock, on a GPU too, which is idle before and has finished after it: launching is part of a step.
    """
    inputs.drop_gradients()
    cuda.synchronise(inputs.case.device)
    start = clock()
    run_step(step, inputs)
    return clock() - start


def run_step(step: Step, inputs: Inputs) -> float:
    """The loss of one step to its end: what it hands out is there, and has been read on a CPU."""
    inputs.drop_gradients()
    loss = step()
    for leaf in (inputs.x, inputs.w) if inputs.case.backward else ():
        assert leaf.grad is not None, "the step left no gradient"
        if inputs.case.device == "cpu":
            touch(leaf.grad)
    value = float(loss.item())
    cuda.synchronise(inputs.case.device)
    return value


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def time_run(
    steps: dict[str, Step],
    inputs: Inputs,
    rounds: int | Mapping[str, int],
    advance: Callable[[], None] = lambda: None,
    *,
    go_on: Callable[[str], bool] = lambda name: True,
    clock: Clock = CLOCK,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each peer in each round: one, and up to its `rounds` as long as `go_on` says so.

    `advance` is called after each step, off the clock. A peer that raises is handed to `failed` and is in no
    further round, nor in what is returned; without `failed` it ends the run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    most = dict.fromkeys(steps, rounds) if isinstance(rounds, int) else rounds
    with no_garbage_collection():
        for round_ in range(max(most.values())):
            for name in turn(list(steps), round_):
                if name not in seconds or round_ >= most[name] or (round_ and not go_on(name)):
                    continue
                try:
                    seconds[name].append(timed_step(steps[name], inputs, clock))
                except Exception as error:  # whatever a peer may raise
                    if failed is None:
                        raise
                    del seconds[name]
                    failed(name, error)
                advance()
    return seconds
