"""Open-set verification of kanji glyphs: a complete small training program on real images."""
