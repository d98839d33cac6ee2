"""The matrix products of the cpu backend: torch.mm's, or oneDNN's where those are twice as fast.

torch's builds for x86 multiply with MKL, which runs AVX2 code on AMD's processors even where they have
AVX-512. oneDNN, in the same builds for compiled linear layers, runs AVX-512 there: 450 GFLOP/s instead of 200
on two cores of one that has it. It returns memory of its own, so its tiles are small enough to be copied
out of the caches; torch.mm's are large, so that a core shared with others delays few of them.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ONEDNN_TILE_ELEMENTS = 1 << 21
TILE_ELEMENTS = 1 << 23
SMALL = 1 << 21
"""Multiplications below which torch.mm starts sooner than it would be overtaken."""


@dataclass(frozen=True)
class Products:
    """Describes one way to multiply matrices, and the tiles that suit it."""

    name: str
    owns_results: bool
    """Results come in memory of the library's own, (T, B) or (T, D), beside a copy of a transposed (T, B)."""

    def mm(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """Set out = a·b for a (N, K), b (K, M), out (N, M), all of one dtype, and return it."""
        if not self.owns_results or a.numel() * b.shape[1] < SMALL:
            return torch.mm(a, b, out=out)
        return out.copy_(torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], ""))

    def tile(self, batch: int, features: int) -> int:
        """Return the classes of a tile, before any limit."""
        if self.owns_results:
            return ONEDNN_TILE_ELEMENTS // (
                batch + features
            )  # a maximum would make torch.compile compile twice
        return TILE_ELEMENTS // max(batch, 1)

    def own_numel(self, batch: int, features: int, tile: int) -> int:
        """Return how many elements the library holds beside operands and results while it multiplies."""
        return tile * (max(batch, features) + batch) if self.owns_results else 0


MM = Products("torch.mm", owns_results=False)
ONEDNN = Products("oneDNN", owns_results=True)


_chosen: list[Products] = []  # by `using`, the last one counts


@contextlib.contextmanager
def using(library: Products) -> Iterator[None]:
    """Let the library multiply float32, to count and to compare; a backward must lie within as well."""
    _chosen.append(library)
    try:
        yield
    finally:
        _chosen.pop()


def of(dtype: torch.dtype) -> Products:
    """Return what multiplies fastest, the same for a whole process: a backward needs its forward's tiles."""
    if dtype != torch.float32:
        return MM
    if _chosen:
        return _chosen[-1]
    return ONEDNN if _amd_avx512() else MM


@functools.cache
def _amd_avx512() -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _vendor()


def _vendor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
