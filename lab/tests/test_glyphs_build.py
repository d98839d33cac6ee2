"""Fetching and rendering, on a font made here: nothing is downloaded."""

from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from examples.glyphs import build_dataset, fetch, fonts, render

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


def test_glyphs_are_centred_with_the_longer_side_at_30_pixels(font: Path) -> None:
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
