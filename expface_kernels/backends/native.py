"""The C++ extension, loaded when it is first needed, with tensors in place of addresses.

T classes of a tile · B rows · D features; csrc/margin_softmax.h describes each function.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

_FUNCTIONS = [
    f"{name}_{dtype}"
    for name in ("inverse_norms", "forward_tile", "backward_tile", "project")
    for dtype in ("float32", "float64")
]


@functools.cache
def _load() -> ModuleType:
    # torch is imported by now: its OpenMP threads are the ones that the extension finds and shares.
    extension = importlib.import_module("expface_kernels._C")
    missing = [name for name in _FUNCTIONS if not hasattr(extension, name)]
    if missing:
        raise ImportError(f"it lacks {', '.join(missing)}: built from other sources, build it again")
    return extension


def load_error() -> str | None:
    """Return why the extension does not load; None where it does."""
    try:
        _load()
    except ImportError as error:
        return f"the C++ extension does not load: {error}"
    return None


class Kernels:
    """Offers the extension's functions for one compute dtype, on contiguous CPU tensors of that dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        extension = _load()
        suffix = {torch.float32: "float32", torch.float64: "float64"}[dtype]
        self._inverse_norms = getattr(extension, f"inverse_norms_{suffix}")
        self._forward_tile = getattr(extension, f"forward_tile_{suffix}")
        self._backward_tile = getattr(extension, f"backward_tile_{suffix}")
        self._project = getattr(extension, f"project_{suffix}")
        self.threads = torch.get_num_threads()

    def inverse_norms(self, w: Tensor, inv: Tensor) -> None:
        self._inverse_norms(w.data_ptr(), *w.shape, inv.data_ptr(), self.threads)

    def forward_tile(
        self,
        dots: Tensor,
        inv: Tensor,
        scale: float,
        y: Tensor,
        tile_max: Tensor,
        tile_sum: Tensor,
        hardest: Tensor | None,
    ) -> None:
        self._forward_tile(
            dots=dots.data_ptr(),
            rows=dots.shape[0],
            batch=dots.shape[1],
            inv=inv.data_ptr(),
            scale=scale,
            local_labels=y.data_ptr(),
            tile_max=tile_max.data_ptr(),
            tile_sum=tile_sum.data_ptr(),
            hardest=0 if hardest is None else hardest.data_ptr(),
            threads=self.threads,
        )

    def backward_tile(self, dots: Tensor, inv: Tensor, scale: float, y: Tensor, shift: Tensor) -> None:
        self._backward_tile(
            dots=dots.data_ptr(),
            rows=dots.shape[0],
            batch=dots.shape[1],
            inv=inv.data_ptr(),
            scale=scale,
            local_labels=y.data_ptr(),
            shift=shift.data_ptr(),
            threads=self.threads,
        )

    def project(self, acc: Tensor, w: Tensor, inv: Tensor, factor: float) -> None:
        self._project(acc.data_ptr(), w.data_ptr(), *acc.shape, inv.data_ptr(), factor, self.threads)
