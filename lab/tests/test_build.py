"""Fetching and rendering, on a font made here: nothing is downloaded."""

from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from examples.glyphs import dataset
from lab import build_dataset, fetch, fonts, notice, render

BOX = ((100, 0), (100, 800), (500, 800), (500, 0))
BAR = ((0, 300), (0, 400), (900, 400), (900, 300))
MISSING = ((0, 0), (0, 700), (700, 700), (700, 0))


def _glyph(points: tuple[tuple[int, int], ...]) -> object:
    pen = TTGlyphPen(None)
    if points:
        pen.moveTo(points[0])
        for point in points[1:]:
            pen.lineTo(point)
        pen.closePath()
    return pen.glyph()


@pytest.fixture
def font(tmp_path: Path) -> Path:
    """日 a box, 一 a bar, 月 a blank, 火 the missing-glyph box, 水木金土 four times the same image."""
    outlines = {".notdef": MISSING, "box": BOX, "bar": BAR, "blank": (), "same": BOX[1:], "fire": MISSING}
    names = {"日": "box", "一": "bar", "月": "blank", "火": "fire"} | dict.fromkeys("水木金土", "same")
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(outlines))
    builder.setupCharacterMap({ord(character): name for character, name in names.items()})
    builder.setupGlyf({name: _glyph(points) for name, points in outlines.items()})
    builder.setupHorizontalMetrics(dict.fromkeys(outlines, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Made Here", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path = tmp_path / "made.ttf"
    builder.save(path)
    return path


def test_only_glyphs_that_the_font_really_has_are_present(font: Path) -> None:
    rendered = render.render_font([font], "日一月火水木金土人")
    assert rendered.present.tolist() == [True, True, *[False] * 7]
    assert not rendered.images[2:].any()


def test_three_may_share_an_image(font: Path) -> None:
    assert render.render_font([font], "水木金").present.all()


def test_glyphs_are_centered_with_the_longer_side_at_30_pixels(font: Path) -> None:
    box, bar = render.render_font([font], "日一").images
    rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
    assert (rows[0], rows[-1]) == (1, 30)
    assert (columns[0], columns[-1]) == (
        8,
        22,
    )  # 400 of 800 units: 15 pixels, 8 on the left and 9 on the right
    assert box[10, 15] == 255
    rows, columns = np.flatnonzero(bar.any(1)), np.flatnonzero(bar.any(0))
    assert (columns[0], columns[-1]) == (1, 30)
    assert len(rows) == 3


def test_subsets_of_a_font_complete_each_other(font: Path, tmp_path: Path) -> None:
    assert render.render_font([font, font], "日一").present.all()


def test_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(fetch.FetchError, match="apt-get is not installed"):
        fetch.fetch(fonts.TRAIN_FONTS[0].package, tmp_path / "cache")


def test_failed_download_tells_the_command_and_leaves_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "apt-get"
    program.write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    cache = tmp_path / "cache"
    assert build_dataset.main(["--cache", str(cache)]) == 1
    message = capsys.readouterr().err
    assert "`apt-get download fonts-noto-cjk` failed" in message
    assert "Unable to locate package" in message
    assert not any((cache / "packages").iterdir())


def test_every_font_has_a_key_of_its_own() -> None:
    keys = [font.key for font in fonts.FULL_FONTS]
    assert len(set(keys)) == len(keys) == 46
    assert len(fonts.COMPACT_FONTS) == 32


def test_splits_are_those_of_the_tables(glyphs: dataset.Glyphs) -> None:
    train, validation, test = fonts.split_characters()
    assert (glyphs.train.characters, glyphs.validation.characters, glyphs.test.characters) == (
        train,
        validation,
        test,
    )
    assert glyphs.train.fonts == tuple(font.key for font in fonts.TRAIN_FONTS)
    assert glyphs.test.fonts == tuple(font.key for font in fonts.TEST_FONTS)


def test_test_fonts_come_from_packages_that_train_nothing() -> None:
    training = set(fonts.packages_of(fonts.TRAIN_FONTS + fonts.FULL_EXTRA_FONTS))
    assert training.isdisjoint(fonts.packages_of(fonts.TEST_FONTS))


def test_jis_levels() -> None:
    first, second = fonts.jis_kanji(1), fonts.jis_kanji(2)
    assert (len(first), len(second)) == (2965, 3390)
    assert (first[0], first[-1], second[0]) == ("亜", "腕", "弌")
    assert set(first).isdisjoint(second)


def test_shipped_data_is_small_and_its_notice_complete() -> None:
    assert dataset.COMPACT_FILE.stat().st_size <= 8_000_000
    text = dataset.COMPACT_FILE.with_name("NOTICE").read_text(encoding="utf-8")
    for package in fonts.packages_of(fonts.COMPACT_FONTS):
        assert f"({package.name} {package.version})" in text
        assert package.copyright in text
    for words in ("Permission is hereby granted", "Redistributions in binary form", "LICENSE in the root"):
        assert words in text


def test_license_text_is_cut_out_of_a_debian_copyright_file(tmp_path: Path) -> None:
    path = tmp_path / "copyright"
    path.write_text("Files: *\nLicense: MIT\n\nLicense: MIT\n First.\n .\n Last.\n\nFiles: debian/*\n")
    assert notice.debian_license_text(path, "MIT") == "First.\n\nLast."
    with pytest.raises(ValueError, match="expected a text under 'License: BSD-3-Clause'"):
        notice.debian_license_text(path, "BSD-3-Clause")
