"""Buffers that outlive a step, so that their pages are faulted in once.

A fresh 100 MB buffer costs the CPU some 25 ms of page faults in every step (numpy asks for huge pages where
the system has them, and still each must be zeroed). A buffer lent here goes back to the pool when the last
tensor over it dies, never earlier: two forwards before a backward hold two. Steps of one shape borrow the
same buffers again and again; a size that the pool lacks empties it, so that it never holds two shapes' worth.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; a cache line
_SLACK = 4096  # bytes; so that the smallest loans share
_free: list[np.ndarray] = []  # uint8 buffers that nobody uses; any thread may append, only _take removes
_taking = threading.RLock()  # reentrant: a buffer may come back, by garbage collection, inside _take


def lend(numel: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised (numel,) tensor, 64-byte aligned, from the pool where that has one large enough."""
    nbytes = numel * dtype.itemsize
    buffer = _take(nbytes + _ALIGNMENT)
    offset = -buffer.ctypes.data % _ALIGNMENT
    lease = buffer[offset : offset + nbytes]
    # torch's storage holds the lease; when that dies, so does the lease, and the buffer comes back.
    weakref.finalize(lease, _free.append, buffer)
    return torch.from_numpy(lease).view(dtype)


def clear() -> None:
    """Give the memory of all buffers that nobody uses back to the system."""
    with _taking:
        _free.clear()


def _take(nbytes: int) -> np.ndarray:
    with _taking:
        # Not much larger either: a small loan must not take what the gradient will ask for.
        fitting = [i for i, free in enumerate(_free) if nbytes <= free.nbytes <= 2 * nbytes + _SLACK]
        if fitting:
            return _free.pop(min(fitting, key=lambda i: _free[i].nbytes))
        _free.clear()
    return np.empty(nbytes, np.uint8)
