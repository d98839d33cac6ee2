"""Times steps: peers take turns round by round, so that what else the machine does falls on all of them."""

from __future__ import annotations

import gc
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from bench import machine
from bench.cases import Inputs
from bench.peers.base import Step

Clock = Callable[[], float]
CLOCK: Clock = time.perf_counter
PAGE_BYTES = 4096
WARM_UPS = 2
# glibc reads these when a process starts: no block is a mapping of its own, and the heap is never trimmed.
# As it comes, malloc gives every large buffer back to the system and asks for it again in the next step, and
# each of its pages must be zeroed anew. Our own buffers are pooled and hardly notice.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(2**26),
}
# It also ends by itself when its parent is gone, however that ended.
_SPIN = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""


def round_order(names: Sequence[str], round_: int) -> list[str]:
    """Shuffle the names for this round, the same way on every run, every second round backwards.

    So that over two rounds all have the same mean place, and nobody always finds the same peer's caches.
    """
    order = random.Random(str(round_ // 2)).sample(list(names), len(names))
    return order[::-1] if round_ % 2 else order


def fault_in_pages(gradient: Tensor) -> float:
    """Sum one element per page: pages that nobody has written are not real until they are used.

    Read where they lie, in a transposed gradient too: a copy would be a part of the step's time.
    """
    per_page = PAGE_BYTES // gradient.element_size()
    as_it_lies = gradient.permute(sorted(range(gradient.dim()), key=gradient.stride, reverse=True))
    if as_it_lies.is_contiguous():
        return as_it_lies.view(-1)[::per_page].sum().item()
    return as_it_lies[..., ::per_page].sum().item()  # rows with room between them: each has its pages


def timed_step(step: Step, inputs: Inputs, clock: Clock = CLOCK) -> float:
    """Return the seconds of one step, to its loss and gradients; the last peer's are dropped before.

    Wall clock, on a GPU too, which is idle before and has finished after it: launching is part of a step.
    """
    inputs.drop_gradients()
    machine.synchronize(inputs.case.device)
    start = clock()
    run_step(step, inputs)
    return clock() - start


def run_step(step: Step, inputs: Inputs) -> float:
    """Run one step to its end and return its loss: its results are there, and have been read on a CPU."""
    inputs.drop_gradients()
    loss = step()
    for leaf in (inputs.x, inputs.w) if inputs.case.backward else ():
        assert leaf.grad is not None, "the step left no gradient"
        if inputs.case.device == "cpu":
            fault_in_pages(leaf.grad)
    value = float(loss.item())
    machine.synchronize(inputs.case.device)
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
    rounds: int,
    *,
    go_on: Callable[[], bool] = lambda: True,
    clock: Clock = CLOCK,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Time every peer once in each round; after the first round, `go_on` may end it early.

    A peer that raises is handed to `failed` and is in no further round, nor in what is returned; without
    `failed` it ends the run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with no_garbage_collection():
        for round_ in range(rounds):
            if round_ and not go_on():
                break
            for name in round_order(list(steps), round_):
                if name not in seconds:
                    continue
                try:
                    seconds[name].append(timed_step(steps[name], inputs, clock))
                except Exception as error:  # whatever a peer may raise
                    if failed is None:
                        raise
                    del seconds[name]
                    failed(name, error)
    return seconds


@contextmanager
def spinning(wanted: bool) -> Iterator[None]:
    """While inside, if `wanted`, let one process spin on the core that the system gives it, as to any."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", _SPIN, str(os.getpid())])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def cannot_keep_memory() -> str | None:
    """Say why malloc cannot be told to keep what is freed; None where it can."""
    return None if platform.libc_ver()[0] == "glibc" else "this system's malloc is not glibc's"


def keeps_memory() -> bool:
    """Tell whether this process was started with KEEP_MEMORY."""
    return KEEP_MEMORY.items() <= os.environ.items()
