"""The two ways in which work reaches the device, so that one place can watch all of it.

launch(kernel, programs, tile, …)   a kernel of ours
mm_f32(a, b)                        the library's product
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from expface_kernels.backends.triton.tuning import Tile

Watcher = Callable[[Any, int, dict[str, Any]], None]
_watchers: list[Watcher] = []


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Hand every launch, as (kernel, programs, arguments), to `watcher` instead of the device."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.pop()


def launch(kernel: Any, programs: int, tile: Tile, **arguments: Any) -> None:
    """Run a kernel over `programs` programs; a tile's blocks are passed on where the kernel has them."""
    names = kernel.arg_names
    sizes = {name: getattr(tile, name.lower()) for name in ("BM", "BN", "BK") if name in names}
    arguments |= sizes | {"num_warps": tile.warps, "num_stages": tile.stages}
    if _watchers:
        _watchers[-1](kernel, programs, arguments)
    else:
        kernel[(programs,)](**arguments)


def mm_f32(a: Tensor, b: Tensor) -> Tensor:
    """a·b in float32, accumulated in float32, whatever a and b are; 16-bit CPU products have no such mode."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
