"""Read the glyph data: 2-bit images in a .npz, verified by checksum, as tensors by character and font.

Shapes: K characters, F fonts, N images; an image is 32x32 uint8, ink high (0, 85, 170, 255).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

SIDE = 32
COMPACT_FILE = Path(__file__).resolve().parent / "data" / "glyphs-compact.npz"
SPLITS = ("train", "validation", "test")
_BITS = np.array((0, 2, 4, 6), np.uint8)  # the first of four pixels lies in the low bits


class DataError(RuntimeError):
    """The data file is missing or is not the one that its checksum belongs to."""


@dataclass(frozen=True)
class GlyphSet:
    """`images` (K, F, 32, 32) uint8; `present` (K, F) bool: which fonts have which characters."""

    images: torch.Tensor
    present: torch.Tensor
    characters: str
    fonts: tuple[str, ...]

    def samples(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All images there are, (N, 1, 32, 32) uint8, and their class, the character's index, (N,) int64."""
        labels = torch.arange(len(self.characters))[:, None].expand(self.present.shape)
        return self.images[self.present][:, None], labels[self.present]

    def subset(self, characters: int, fonts: int, skip: int = 0) -> GlyphSet:
        """The first `characters` after `skip` of them, in the first `fonts` of the set."""
        chosen = slice(skip, skip + characters)
        return GlyphSet(
            self.images[chosen, :fonts],
            self.present[chosen, :fonts],
            self.characters[chosen],
            self.fonts[:fonts],
        )


@dataclass(frozen=True)
class Glyphs:
    """The three splits: no character and no font is in two of them."""

    train: GlyphSet
    validation: GlyphSet
    test: GlyphSet


def load(path: Path = COMPACT_FILE) -> Glyphs:
    """Verify `path` against `path`.sha256 and unpack it: 50 MB for the compact set, 200 MB for the full."""
    verify(path)
    with np.load(path) as data:
        train, validation, test = (_unpack_split(data, split) for split in SPLITS)
    return Glyphs(train, validation, test)


def _unpack_split(data: np.lib.npyio.NpzFile, split: str) -> GlyphSet:
    return GlyphSet(
        torch.from_numpy(unpack(data[f"{split}_packed"])),
        torch.from_numpy(data[f"{split}_present"]),
        "".join(data[f"{split}_characters"]),
        tuple(str(font) for font in data[f"{split}_fonts"]),
    )


def save(path: Path, glyphs: Glyphs) -> None:
    """Write `glyphs` as 2-bit images, and the checksum beside them in the format of `sha256sum`."""
    arrays = {}
    for split in SPLITS:
        part: GlyphSet = getattr(glyphs, split)
        arrays[f"{split}_packed"] = pack(part.images.numpy())
        arrays[f"{split}_present"] = part.present.numpy()
        arrays[f"{split}_characters"] = np.array(list(part.characters))
        arrays[f"{split}_fonts"] = np.array(part.fonts)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    checksum_file(path).write_text(f"{sha256(path)}  {path.name}\n")


def verify(path: Path) -> None:
    """Raise DataError unless `path` has the SHA-256 that its checksum file names."""
    sums = checksum_file(path)
    for needed in (path, sums):
        if not needed.is_file():
            raise DataError(f"no glyph data: {needed} does not exist (lab/build_dataset.py writes it)")
    expected, got = sums.read_text().split()[0], sha256(path)
    if got != expected:
        raise DataError(f"{path} is damaged or was changed: expected SHA-256 {expected}, got {got}")


def checksum_file(path: Path) -> Path:
    """Where the checksum of `path` is kept."""
    return path.with_name(path.name + ".sha256")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pack(images: np.ndarray) -> np.ndarray:
    """(..., 32, 32) uint8 to (..., 256) uint8: 2 bits a pixel, q = rint(v / 85), four pixels a byte."""
    levels = np.rint(images / np.float32(85)).astype(np.uint8)
    quads = levels.reshape(*images.shape[:-2], SIDE * SIDE // 4, 4)
    return np.bitwise_or.reduce(quads << _BITS, axis=-1)


def unpack(packed: np.ndarray) -> np.ndarray:
    """(..., 256) uint8 back to (..., 32, 32) uint8 with the levels 0, 85, 170, 255."""
    levels = (packed[..., None] >> _BITS) & 3
    return (levels * np.uint8(85)).reshape(*packed.shape[:-1], SIDE, SIDE)
