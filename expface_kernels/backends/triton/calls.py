"""The two ways in which work reaches the device, so that one place can watch all of it.

launch(kernel, programs, tile, …)   a kernel of ours
add_mm_f32(total, a, b)             the library's product
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from expface_kernels.backends.triton.tuning import Tile

LaunchWatcher = Callable[[Any, int, dict[str, Any]], None]
ProductWatcher = Callable[[Tensor, Tensor], None]
_watchers: list[tuple[LaunchWatcher, ProductWatcher | None]] = []


@contextlib.contextmanager
def watched(launches: LaunchWatcher, products: ProductWatcher | None = None) -> Iterator[None]:
    """Hand every launch, as (kernel, programs, arguments), to `launches` instead of the device.

    Library products are shown to `products`, and made all the same.
    """
    _watchers.append((launches, products))
    try:
        yield
    finally:
        _watchers.pop()


def launch(kernel: Any, programs: int, tile: Tile, **arguments: Any) -> None:
    """Run a kernel over `programs` programs; a tile's blocks are passed on where the kernel has them."""
    names = kernel.arg_names
    sizes = {name: getattr(tile, name.lower()) for name in ("BM", "BN", "BK") if name in names}
    # Stated, because its default changes between versions: a fused multiply-add rounds once less.
    arguments |= sizes | {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    if _watchers:
        _watchers[-1][0](kernel, programs, arguments)
    else:
        run(kernel, programs, arguments)


def run(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    """Hand a launch to the device; what wraps this sees every kernel that runs."""
    kernel[(programs,)](**arguments)


def add_mm_f32(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a·b in float32, accumulated in float32, whatever a and b are; 16-bit CPU products have no such
    mode."""
    if _watchers and (show := _watchers[-1][1]) is not None:
        show(a, b)
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif a.device.type != "meta":  # where there is nothing to add, nor to copy
        total.addmm_(a.float(), b.float())
