"""Builds the glyph data from font packages: fetch, unpack, render, check, pack. The demo does not need this.

    python -m lab.build_dataset --set compact   # 2,950 kanji, 32 fonts: 49,000 images
    python -m lab.build_dataset --set full      # 3,390 more kanji, 14 more fonts: 185,541 images

The first fetches 528 MB of packages and renders for half a minute on 2 cores; the second takes 677 MB and
about two minutes.

Needs apt-get and npm (no root), and the extra `dataset` (Pillow, fontTools, brotli). Renders on all cores.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from examples.glyphs.arguments import Parser, positive_integer
from examples.glyphs.dataset import COMPACT_FILE, Glyphs, GlyphSet, save

from .fetch import FetchError, fetch, font_files
from .fonts import (
    COMPACT_FONTS,
    FULL_EXTRA_FONTS,
    FULL_FONTS,
    LEFT_OUT,
    TEST_FONTS,
    TRAIN_FONTS,
    VALIDATION_FONTS,
    Font,
    jis_kanji,
    packages_of,
    split_characters,
)
from .notice import states_copyright, write_notice
from .render import RenderedFont, render_font

DEFAULT_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "glyphs"


@dataclass(frozen=True)
class _Task:
    font: Font
    characters: str
    cache: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status."""
    options = _parser().parse_args(arguments)
    fonts = FULL_FONTS if options.set == "full" else COMPACT_FONTS
    out = options.out or (COMPACT_FILE if options.set == "compact" else options.cache / "glyphs-full.npz")
    try:
        _fetch_all(fonts, options.cache)
        build = build_full if options.set == "full" else build_compact
        glyphs = build(options.cache, options.jobs)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    save(out, glyphs)
    write_notice(out.with_name("NOTICE"), fonts, options.cache)
    for name in ("train", "validation", "test"):
        part: GlyphSet = getattr(glyphs, name)
        images = int(part.present.sum())
        print(f"{name:10} {len(part.characters):5,} kanji x {len(part.fonts):2} fonts, {images:,} images")
    print(f"{out}: {out.stat().st_size:,} bytes")
    return 0


def _parser() -> Parser:
    parser = Parser(description="Render the kanji data set from font packages.")
    parser.add_argument(
        "--set", choices=("compact", "full"), default="compact", help="which set (default compact)"
    )
    parser.add_argument("--out", type=Path, help="the .npz to write; checksum and NOTICE go beside it")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="packages, and the full set")
    parser.add_argument("--jobs", type=positive_integer, default=os.cpu_count() or 1, help="processes")
    return parser


def _fetch_all(fonts: tuple[Font, ...], cache: Path) -> None:
    packages = packages_of(fonts)
    for package in tqdm(packages, desc="fetching packages", unit="package"):
        fetch(package, cache)
        files = [path for font in fonts if font.package == package for path in font_files(font, cache)]
        if not states_copyright(package, files, cache):
            tqdm.write(
                f"warning: {package.name} no longer states {package.copyright!r}: mend fonts.py", sys.stderr
            )


def build_compact(cache: Path, jobs: int) -> Glyphs:
    """Build 2,200 characters in 20 fonts, 250 in 4, 500 in 8: every image must be there."""
    parts = list(zip((TRAIN_FONTS, VALIDATION_FONTS, TEST_FONTS), split_characters(), strict=True))
    tasks = [_Task(font, characters, cache) for fonts, characters in parts for font in fonts]
    rendered = _render_all(tasks, jobs)
    for task in tasks:
        lost = np.flatnonzero(~rendered[task.font.key].present)
        if lost.size:
            characters = "".join(task.characters[i] for i in lost)
            raise FetchError(
                f"font {task.font.key} no longer draws {characters}: another version of its package?"
            )
    train, validation, test = (
        _select(fonts, characters, characters, rendered) for fonts, characters in parts
    )
    return Glyphs(train, validation, test)


def build_full(cache: Path, jobs: int) -> Glyphs:
    """Build training data of 5,590 characters in 34 fonts, as far as those have them; the rest as above."""
    level_1, level_2 = jis_kanji(1), jis_kanji(2)
    train_fonts = TRAIN_FONTS + FULL_EXTRA_FONTS
    tasks = [_Task(font, level_1 + level_2 if font in train_fonts else level_1, cache) for font in FULL_FONTS]
    rendered = _render_all(tasks, jobs)
    _check_pool(level_1, rendered)
    train, validation, test = split_characters()
    return Glyphs(
        _select(train_fonts, level_1 + level_2, train + level_2, rendered),
        _select(VALIDATION_FONTS, level_1, validation, rendered),
        _select(TEST_FONTS, level_1, test, rendered),
    )


def _check_pool(level_1: str, rendered: dict[str, RenderedFont]) -> None:
    everywhere = np.all([font.present[: len(level_1)] for font in rendered.values()], axis=0)
    lacking = "".join(c for c, present in zip(level_1, everywhere, strict=True) if not present)
    if lacking != LEFT_OUT:
        raise FetchError(
            f"level-1 kanji that some font lacks: expected {LEFT_OUT}, got {lacking}: other versions?"
        )


def _render_all(tasks: list[_Task], jobs: int) -> dict[str, RenderedFont]:
    images = sum(len(task.characters) for task in tasks)
    rendered = {}
    with ProcessPoolExecutor(jobs) as pool, tqdm(total=images, desc="rendering", unit="image") as bar:
        for future in as_completed([pool.submit(_render, task) for task in tasks]):
            key, font = future.result()
            rendered[key] = font
            bar.update(len(font.present))
    return rendered


def _render(task: _Task) -> tuple[str, RenderedFont]:
    return task.font.key, render_font(font_files(task.font, task.cache), task.characters)


def _select(fonts: tuple[Font, ...], drawn: str, wanted: str, rendered: dict[str, RenderedFont]) -> GlyphSet:
    """Select the `wanted` characters, with the fonts of each side by side: it compresses better."""
    place = {character: i for i, character in enumerate(drawn)}
    rows = [place[character] for character in wanted]
    images = np.stack([rendered[font.key].images[rows] for font in fonts], axis=1)
    present = np.stack([rendered[font.key].present[rows] for font in fonts], axis=1)
    keys = tuple(font.key for font in fonts)
    return GlyphSet(torch.from_numpy(images), torch.from_numpy(present), wanted, keys)


if __name__ == "__main__":
    sys.exit(main())
