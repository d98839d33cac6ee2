"""Which kanji are in the data: JIS X 0208 in its own order, and who trains and who stays unseen."""

from __future__ import annotations

import numpy as np

SPLIT_SEED = 20240607
TEST_CHARACTERS, VALIDATION_CHARACTERS, TRAIN_CHARACTERS = 500, 250, 2200

# Level-1 kanji that at least one of FULL_FONTS lacks or draws as a blank. Fixed here so that the compact set,
# which needs only 32 of the fonts, is split exactly as the full one; building the full one checks the list.
LEFT_OUT = "盈牙竃姦徽甑綻瀦穆聯"

_LEVEL_ROWS = {1: range(16, 48), 2: range(48, 85)}


def jis_kanji(level: int) -> str:
    """The kanji of JIS X 0208 `level` (1: 2,965 common ones; 2: 3,390 rarer ones) in the standard's order."""
    kanji = []
    for row in _LEVEL_ROWS[level]:
        for cell in range(1, 95):
            try:
                kanji.append(bytes((0xA0 + row, 0xA0 + cell)).decode("euc_jp"))
            except UnicodeDecodeError:  # the last row of each level is not full
                continue
    return "".join(kanji)


def split_characters() -> tuple[str, str, str]:
    """(training, validation, test) characters: 2,200, 250 and 500 of level 1, drawn with a fixed seed."""
    pool = [c for c in jis_kanji(1) if c not in LEFT_OUT]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pool))
    shuffled = "".join(pool[i] for i in order)
    first, second = TEST_CHARACTERS, TEST_CHARACTERS + VALIDATION_CHARACTERS
    return shuffled[second : second + TRAIN_CHARACTERS], shuffled[first:second], shuffled[:first]
