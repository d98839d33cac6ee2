"""Devices by name: memory, and how fast they multiply, move and send; a CPU's rates are measured here.

Bytes and seconds throughout. GPU rates of products and memory are those of the triton backend's cost model.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from expface_kernels import machine
from expface_kernels.backends import products


@dataclass(frozen=True)
class Device:
    """What a rank runs on."""

    title: str
    memory_bytes: int | None
    """None: what is free on this machine."""
    usable: float
    """Share of it that can be filled: a context, fragments and the system take some."""
    link: float
    """Bytes a second to other ranks, as far as collectives reach them; assumed, not measured."""

    def memory(self) -> int:
        if self.memory_bytes is not None:
            return self.memory_bytes
        free = machine.available_bytes()
        if free is None:
            raise ValueError("memory_bytes: expected a number, this system does not tell what is free")
        return free


# A GPU's link: 70% of one direction of what connects the GPUs of a machine.
DEVICES = {
    "cpu": Device("CPU machine(s)", None, 0.9, 1.0e9),
    "h100": Device("H100", 80 * 10**9, 0.9, 0.7 * 450e9),
    "h200": Device("H200", 141 * 10**9, 0.9, 0.7 * 450e9),
    "a100": Device("A100", 80 * 10**9, 0.9, 0.7 * 300e9),
    "b200": Device("B200", 180 * 10**9, 0.9, 0.7 * 900e9),
    "mi300x": Device("MI300X", 192 * 10**9, 0.9, 0.7 * 448e9),
}

CALIBRATION_SECONDS = 0.1
"""Of each rate, at least; the best of what was measured counts, since others may use the machine."""
CALIBRATION_CLASSES = 8192
CALIBRATION_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Rates:
    """Of a CPU, all threads together."""

    flops: float
    """A second, of the backend's three products."""
    bandwidth: float
    """Bytes a second, read and written, of memory larger than the caches."""
    fresh: float
    """Bytes a second of writing to memory just received from the system: each page must be faulted in."""


@functools.cache
def calibrate(rows: int, features: int, dtype: torch.dtype, threads: int) -> Rates:
    """Measure this machine, half a second: products of (T, D) by (D, N), of their transposes, and memory.

    rows N, features D: products run at another rate where they are small; more than 8192 make no difference.
    threads: torch's own number, which the result belongs to.
    """
    rows, features = min(rows, CALIBRATION_CLASSES), min(features, CALIBRATION_CLASSES)
    library = products.of(dtype)
    tile = min(CALIBRATION_CLASSES, max(library.tile(rows, features), 256))
    w, x = torch.randn(tile, features, dtype=dtype), torch.randn(rows, features, dtype=dtype)
    e, a, c = torch.empty(tile, rows, dtype=dtype), torch.empty_like(x), torch.empty_like(w)

    def step() -> None:
        library.mm(w, x.T, out=e)
        library.mm(e.T, w, out=a)
        library.mm(e, x, out=c)

    first, second = (torch.ones(CALIBRATION_BYTES // 4) for _ in range(2))
    moved = 3 * CALIBRATION_BYTES
    return Rates(
        flops=3 * 2 * rows * tile * features / _best(step),
        bandwidth=moved / _best(lambda: first.add_(second)),
        fresh=CALIBRATION_BYTES / _best(lambda: torch.empty(CALIBRATION_BYTES, dtype=torch.uint8).fill_(1)),
    )


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs."""
    work()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < CALIBRATION_SECONDS:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
