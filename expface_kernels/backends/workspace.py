"""Buffers that outlive a step, so that their pages are faulted in once.

A fresh 100 MB buffer costs the CPU some 25 ms of page faults in every step (numpy asks for huge pages where
the system has them, and still each must be zeroed). A buffer lent here goes back to the pool when the last
tensor over it dies, never earlier: two forwards before a backward hold two. Steps of one shape borrow the
same buffers again and again, and so do heads of several shapes that take turns. What nobody has borrowed for
a while goes back to the system, and so does what was a little too small for a loan: growing batches do not
collect one buffer for each size.
"""

from __future__ import annotations

import itertools
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; a cache line
_SLACK = 4096  # bytes; so that the smallest loans share
MAX_IDLE = 128
"""Loans and returns, some eight steps of them, that a buffer waits for its next loan."""
_clock = itertools.count()
# uint8 buffers that nobody uses, each with the time when it came back; any thread may append, only _take and
# clear remove.
_free: list[tuple[int, np.ndarray]] = []
_taking = threading.RLock()  # reentrant: a buffer may come back, by garbage collection, inside _take


def allocate(numel: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialized (numel,) tensor, 64-byte aligned, from the pool if it has one so large."""
    nbytes = numel * dtype.itemsize
    buffer = _take(nbytes + _ALIGNMENT)
    offset = -buffer.ctypes.data % _ALIGNMENT
    lease = buffer[offset : offset + nbytes]
    # torch's storage holds the lease; when that dies, so does the lease, and the buffer comes back.
    weakref.finalize(lease, _give_back, buffer)
    return torch.from_numpy(lease).view(dtype)


def clear() -> None:
    """Give the memory of all buffers that nobody uses back to the system."""
    with _taking:
        _free.clear()


def _give_back(buffer: np.ndarray) -> None:
    _free.append((next(_clock), buffer))


def _take(nbytes: int) -> np.ndarray:
    now = next(_clock)
    with _taking:
        fitting = [i for i, (_, free) in enumerate(_free) if _serves(free.nbytes, nbytes)]
        best = min(fitting, key=lambda i: _free[i][1].nbytes, default=None)
        found = None if best is None else _free.pop(best)[1]
        for i in reversed(range(len(_free))):
            came, free = _free[i]
            if now - came > MAX_IDLE or (found is None and _serves(nbytes, free.nbytes)):
                del _free[i]
    return np.empty(nbytes, np.uint8) if found is None else found


def _serves(size: int, nbytes: int) -> bool:
    """Not much larger either: a small loan must not take what the gradient will ask for."""
    return nbytes <= size <= 2 * nbytes + _SLACK
