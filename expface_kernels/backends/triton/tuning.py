"""Block sizes of the class-tile kernels, by architecture, features and dtypes: a table, not a search.

What `autotune` measured on a GPU stands in `tuned.json` and comes first; the rules here serve the rest, and
every tile of theirs is one that `audit` has compiled without a spill inside its main loop. Blocks are powers
of two: bm × bn is what a program writes, bk what it takes of the product's inner dimension at a time.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Tile:
    """One kernel's blocks, its warps, and the stages of its load pipeline."""

    bm: int
    bn: int
    bk: int
    warps: int = 8
    stages: int = 3

    def __str__(self) -> str:
        return f"{self.bm}x{self.bn}x{self.bk}, {self.warps} warps, {self.stages} stages"


ROWS = Tile(0, 0, 0, 4, 1)
"""Kernels over rows: their blocks follow from D."""
MMA_OF_AMPERE = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_120", "sm_121")
"""Their matrix instructions read registers; those for consumers have 99 KB of shared memory a block."""
KEPT_COLUMNS = Tile(16, 256, 0, 4, 2)
"""(classes, rows) of the pass over kept exponentials."""


@dataclass(frozen=True)
class Blocks:
    """The tiles of a whole chain."""

    forward: Tile
    """(rows, classes, features), sums only."""
    forward_more: Tile
    """The same with maxima, the hardest negative or kept exponentials, which take more registers."""
    probability: Tile
    """(rows, classes, features)."""
    weight: Tile
    """(classes, features, rows)."""
    precision: str
    """How float32 operands multiply: "tf32x3", "ieee" or "tf32"; 16-bit ones ignore it."""


ROLES = ("forward", "forward_more", "probability", "weight")
"""The tiles of a chain by name: what is tuned."""
TUNED = Path(__file__).with_name("tuned.json")
"""{architecture: {"measured_on": text, "tiles": {`key`: {role: {"bm": …, …, "stages": …}}}}}."""
_tried: list[Blocks] = []


@contextlib.contextmanager
def trying(tiles: Blocks) -> Iterator[None]:
    """Inside, every call gets these tiles, whatever it multiplies: for measuring them."""
    _tried.append(tiles)
    try:
        yield
    finally:
        _tried.pop()


def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", …, or "interpreter" for CPU tensors."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def row_elements(arch: str) -> int:
    """Elements of a row kernel's block: 16 float64 a thread; the interpreter pays by the program."""
    return 2**16 if arch == "interpreter" else 2048


def float32_precision(arch: str) -> str:
    """Plain tf32 only where the user has allowed it to torch; AMD has no tf32x3."""
    if arch.startswith("gfx"):
        return "ieee"
    return "tf32" if tf32_allowed() else "tf32x3"


def tf32_allowed() -> bool:
    """What torch was told of float32 products, by whichever of its switches.

    `fp32_precision` follows them all; `allow_tf32` raises once somebody has written to the other.
    """
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if precision is None:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    return bool(precision == "tf32")


def blocks(arch: str, features: int, product: torch.dtype, stored: torch.dtype, precision: str) -> Blocks:
    """The tiles for (B, features) rows multiplied as `product` with centres stored as `stored`."""
    if _tried:
        return _tried[-1]
    ruled = ruled_blocks(arch, features, product, stored, precision)
    measured = table().get(arch, {"tiles": {}})["tiles"]
    found = measured.get(key(features, product, stored, ruled.precision), {})
    return with_tiles(ruled, {role: Tile(**sizes) for role, sizes in found.items()})


@functools.cache
def table(path: Path = TUNED) -> dict[str, Any]:
    """What has been measured, as `autotune` wrote it."""
    return json.loads(path.read_text())


def with_tiles(tiles: Blocks, others: dict[str, Tile]) -> Blocks:
    """The same chain with some roles' tiles replaced."""
    fields = {role: getattr(tiles, role) for role in ROLES} | others
    return Blocks(**fields, precision=tiles.precision)


def key(features: int, product: torch.dtype, stored: torch.dtype, precision: str) -> str:
    """What an entry of the table stands under, as in "512 bfloat16 float32 ieee"."""
    return f"{features} {product} {stored} {precision}".replace("torch.", "")


def ruled_blocks(
    arch: str, features: int, product: torch.dtype, stored: torch.dtype, precision: str
) -> Blocks:
    """The tiles of the rules below, where nothing has been measured."""
    amd, ampere = arch.startswith("gfx"), arch in MMA_OF_AMPERE
    stages = 2 if amd else 3
    if product == torch.float32:
        return _float32_blocks(arch, precision)
    # A stored float32 is cast in registers, between load and product: half the depth, one stage more.
    bk = 32 if stored == torch.float32 else 64
    bk = min(bk, max(16, _power_of_two(features)))
    deep = stages + (1 if stored == torch.float32 and not amd else 0)
    if ampere:
        deep = min(deep, 3)
    tile = Tile(128, 128, bk, 8, deep)
    weight = Tile(128, min(128, max(16, _power_of_two(features))), 64, 8, stages)
    # Sums alone leave registers for twice the classes where matrix instructions read shared memory and no
    # feature is masked: half the sums to write, rows loaded half as often. On sm_90 deeper blocks spill, and
    # at D = 256, where the compiler unrolls the whole loop, these do.
    wide = not (amd or ampere) and stored == product and features >= 512 and features % 32 == 0
    forward = Tile(128, 256, 32, 8, 4) if wide else tile
    if arch in ("sm_120", "sm_121"):  # at twice the depth Triton 3.6 spills where classes are listed
        forward = Tile(128, 128, min(bk, 32), 8, 4)
    # The one case in which P' spills there, for two registers.
    narrow = arch == "sm_103" and product == torch.float16 and stored == torch.float32
    probability = Tile(128, 64, bk, 8, deep) if narrow else tile
    return Blocks(forward, tile, probability, weight, "ieee")


def _float32_blocks(arch: str, precision: str) -> Blocks:
    if precision == "ieee":  # no tensor core: registers bound it
        tile = Tile(64, 64, 32, 4, 2)
        return Blocks(tile, tile, tile, tile, precision)
    if arch in MMA_OF_AMPERE:  # 128×128 spills inside the loop there
        tile = Tile(64, 128, 32, 8, 2)
        return Blocks(tile, tile, tile, tile, precision)
    tile = Tile(128, 128, 32, 8, 3)
    return Blocks(tile, tile, tile, Tile(128, 64, 32, 8, 3), precision)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (number - 1).bit_length()
