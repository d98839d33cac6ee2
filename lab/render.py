"""From a font to 32x32 images of its kanji, with a mask of those it really has.

A mapped code point proves little: some fonts map thousands of kanji to a blank or to one placeholder, and
the renderer draws the missing-glyph box without a word. So a glyph counts only if the font maps it, it leaves
ink, it is not the missing-glyph image, and at most three characters share its image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageFont

RENDER_PIXELS = 112  # drawn large, shrunk afterwards: hinting of small sizes would dominate the shapes
SIDE = 32
LONGER_SIDE = 30
INK = 64  # of 255: what counts as ink for the bounding box
MOST_SHARING = 3
# Two code points that no font may map (Unicode noncharacters): their image is the missing glyph.
_UNMAPPED = "\uffff"


@dataclass(frozen=True)
class RenderedFont:
    """`images` (N, 32, 32) uint8, ink high, zero where `present` (N,) bool is False."""

    images: np.ndarray
    present: np.ndarray


def render_font(paths: list[Path], characters: str) -> RenderedFont:
    """Draw `characters` from one font, which may be cut into several files (npm's woff2 subsets)."""
    images = np.zeros((len(characters), SIDE, SIDE), np.uint8)
    present = np.zeros(len(characters), bool)
    drawn: list[bytes] = [b""] * len(characters)
    for path in paths:
        for i, ink in _ink_of(path, characters):
            if present[i]:  # a later subset repeats it
                continue
            drawn[i] = ink.tobytes()
            images[i] = normalize(ink)
            present[i] = True
    shared = Counter(image for image in drawn if image)
    for i in np.flatnonzero(present).tolist():
        if shared[drawn[i]] > MOST_SHARING:
            images[i], present[i] = 0, False
    return RenderedFont(images, present)


def _ink_of(path: Path, characters: str) -> Iterator[tuple[int, np.ndarray]]:
    """(index, cropped ink) of every character that the file maps and really draws."""
    with TTFont(path, fontNumber=0, lazy=True) as table:  # face 0 of a collection is the Japanese one
        mapped = table.getBestCmap()
    wanted = [i for i, character in enumerate(characters) if ord(character) in mapped]
    if not wanted:
        return
    font = ImageFont.truetype(path, RENDER_PIXELS, index=0, layout_engine=ImageFont.Layout.BASIC)
    missing = _crop(_draw(font, _UNMAPPED))
    for i in wanted:
        ink = _crop(_draw(font, characters[i]))
        if ink.size and not np.array_equal(ink, missing):
            yield i, ink


def _draw(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    mask = font.getmask(character, "L")
    width, height = mask.size
    return np.frombuffer(bytes(mask), np.uint8).reshape(height, width)


def _crop(ink: np.ndarray) -> np.ndarray:
    """Cut to the bounding box of ink; an empty array where there is none."""
    rows, columns = np.flatnonzero((ink > INK).any(1)), np.flatnonzero((ink > INK).any(0))
    if rows.size == 0:
        return np.zeros((0, 0), np.uint8)
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def normalize(ink: np.ndarray) -> np.ndarray:
    """Shrink cropped ink (h, w) so that its longer side is 30 pixels, and center it in (32, 32)."""
    height, width = ink.shape
    factor = LONGER_SIDE / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    small = np.asarray(Image.fromarray(ink).resize(size, Image.Resampling.HAMMING))
    out = np.zeros((SIDE, SIDE), np.uint8)
    top, left = (SIDE - size[1]) // 2, (SIDE - size[0]) // 2
    out[top : top + size[1], left : left + size[0]] = small
    return out
