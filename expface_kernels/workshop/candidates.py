"""Which tiles are worth measuring: sizes only, no GPU.

A tile holds its accumulator (bm, bn) in registers, float32, and `stages` copies of both operands' blocks in
shared memory. What the launch code assumes of blocks is stated here once, and tested.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass

import torch

from expface_kernels.backends.triton.plan import PAD
from expface_kernels.backends.triton.tuning import MMA_OF_AMPERE, Blocks, Tile, ruled_blocks

BLOCKS = (64, 128, 256)
DEPTHS = (32, 64)
WARPS = (4, 8)
STAGES = (2, 3, 4)
# Accumulators a thread: fewer leave the tensor cores idle, more leave no registers for anything else.
LEAST_ACCUMULATORS, MOST_ACCUMULATORS = 32, 128
REGISTER_OPERANDS = (*MMA_OF_AMPERE, "gfx942")
UNKNOWN_SHARED = 101_376
"""Bytes a block that every architecture with the kernels' instructions has (sm_86, sm_89, sm_120)."""


@dataclass(frozen=True)
class Setting:
    """What a set of tiles is for: an entry of the table."""

    arch: str
    features: int
    product: torch.dtype
    stored: torch.dtype
    precision: str

    def ruled(self) -> Blocks:
        return ruled_blocks(self.arch, self.features, self.product, self.stored, self.precision)


def shared_bytes(role: str, tile: Tile, setting: Setting) -> int:
    """Shared memory of a tile: copies of both blocks in the dtypes they are loaded in; later, the result.

    A stored float32 that is cast in the tile is there once more, as the product takes it. An upper estimate:
    the compiler keeps some of it in registers.
    """
    first, second = setting.product.itemsize, setting.product.itemsize
    cast = 0
    if role in ("forward", "forward_more", "probability"):
        second = setting.stored.itemsize
        cast = tile.bn * tile.bk * setting.product.itemsize
    # Matrix instructions that read registers leave the last stage's copy there.
    copies = tile.stages - 1 if setting.arch in REGISTER_OPERANDS else tile.stages
    staged = copies * tile.bk * (tile.bm * first + tile.bn * second)
    staged += cast if setting.stored != setting.product else 0
    if setting.arch == "gfx950":  # its direct copies leave gaps against bank conflicts
        staged += staged // 16
    return max(staged, tile.bm * tile.bn * setting.product.itemsize)


def _divides(size: int) -> bool:
    return PAD % size == 0


# What the launch code pads for: rows and chunks of classes to PAD, features to the widest block.
FITS: dict[str, Callable[[Tile], bool]] = {
    "forward": lambda tile: _divides(tile.bm),
    "forward_more": lambda tile: _divides(tile.bm),
    "probability": lambda tile: _divides(tile.bm) and _divides(tile.bn),
    "weight": lambda tile: _divides(tile.bm) and _divides(tile.bk),
}


def why_not(role: str, tile: Tile, setting: Setting, shared_limit: int) -> str | None:
    """Why a tile cannot serve; None where it may."""
    if not FITS[role](tile):
        return f"its blocks do not divide what is padded to {PAD}"
    # The products' columns: a block wider than the features' padding is mostly zeros.
    across = tile.bn if role == "weight" else tile.bk
    if across >= 2 * max(setting.features, 16):
        return f"a block of {across} for {setting.features} features"
    accumulators = tile.bm * tile.bn // (32 * tile.warps)
    if not LEAST_ACCUMULATORS <= accumulators <= MOST_ACCUMULATORS:
        return f"{accumulators} accumulators a thread"
    needed = shared_bytes(role, tile, setting)
    if needed > shared_limit:
        return f"{needed} bytes of shared memory, at most {shared_limit}"
    return None


def _all_tiles() -> Iterator[Tile]:
    for bm, bn, bk, warps, stages in itertools.product(BLOCKS, BLOCKS, DEPTHS, WARPS, STAGES):
        yield Tile(bm, bn, bk, warps, stages)


def _differences(a: Tile, b: Tile) -> int:
    """In how many sizes they differ."""
    return sum(x != y for x, y in zip(astuple(a), astuple(b), strict=True))


def candidates(role: str, setting: Setting, shared_limit: int) -> Iterator[Tile]:
    """The tiles of a role that fit, the one of the rules first, then those that differ from it the least."""
    ruled: Tile = getattr(setting.ruled(), role)
    yield ruled
    for tile in sorted(_all_tiles(), key=lambda tile: _differences(tile, ruled)):
        if tile != ruled and why_not(role, tile, setting, shared_limit) is None:
            yield tile
