"""Noise made on purpose: as much as asked, where asked, the same for everyone, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from examples.glyphs.dataset import GlyphSet
from examples.glyphs.label_noise import flip_labels, replace_images
from tests.tolerances import CHI_SQUARE_3

OUTSIDE = [-0.1, 1.0, 1.5, math.nan, math.inf]


@pytest.mark.parametrize("share", [0.0, 0.15, 0.3, 0.999])
def test_flips_as_many_as_asked_and_never_to_the_own_class(share: float) -> None:
    labels = torch.arange(1000) % 7
    before = labels.clone()
    noisy, is_noisy = flip_labels(labels, 7, share, seed=3)
    assert torch.equal(labels, before)
    assert int(is_noisy.sum()) == round(share * 1000)
    assert torch.equal(noisy != labels, is_noisy)
    assert 0 <= int(noisy.min()) <= int(noisy.max()) < 7


def test_flips_go_to_every_other_class_alike() -> None:
    labels = torch.full((60_000,), 2)
    noisy, is_noisy = flip_labels(labels, 5, 0.5, seed=0)
    counts = torch.bincount(noisy[is_noisy], minlength=5).double()
    assert counts[2] == 0
    expected = 30_000 / 4
    chi_square = ((counts[counts > 0] - expected) ** 2 / expected).sum()
    assert chi_square < CHI_SQUARE_3
    assert 14_500 < int(is_noisy[:30_000].sum()) < 15_500


def test_noise_depends_on_the_seed_alone() -> None:
    labels = torch.arange(200) % 10
    state = torch.random.get_rng_state()
    first, second = flip_labels(labels, 10, 0.3, seed=1), flip_labels(labels, 10, 0.3, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[1], flip_labels(labels, 10, 0.3, seed=2)[1])


@pytest.mark.parametrize("share", OUTSIDE)
def test_a_share_outside_0_to_1_is_named(share: float) -> None:
    with pytest.raises(ValueError, match=r"share: expected .* in \[0, 1\), got"):
        flip_labels(torch.zeros(4, dtype=torch.int64), 3, share, seed=0)
    with pytest.raises(ValueError, match=r"share: expected .* in \[0, 1\), got"):
        replace_images(glyph_set("ab"), glyph_set("cd"), share, seed=0)


def test_flipping_needs_another_class() -> None:
    with pytest.raises(ValueError, match="num_classes: expected at least 2 to flip labels between, got 1"):
        flip_labels(torch.zeros(4, dtype=torch.int64), 1, 0.5, seed=0)
    assert not flip_labels(torch.zeros(4, dtype=torch.int64), 1, 0.0, seed=0)[1].any()


def glyph_set(characters: str, fonts: int = 2) -> GlyphSet:
    """Each image is filled with its character's code, but for its upper left pixel, which is its font."""
    codes = torch.tensor([ord(c) for c in characters], dtype=torch.uint8)
    images = codes[:, None, None, None].repeat(1, fonts, 32, 32)
    images[:, :, 0, 0] = torch.arange(fonts, dtype=torch.uint8)
    present = torch.ones((len(characters), fonts), dtype=torch.bool)
    return GlyphSet(images, present, characters, tuple(f"font{f}" for f in range(fonts)))


def test_open_set_images_take_the_place_of_images_in_their_own_font() -> None:
    known, open_set = glyph_set("abcdefgh"), glyph_set("QRSTUVWX")
    before = known.images.clone()
    images, labels, is_noisy = replace_images(known, open_set, 0.5, seed=4)
    clean, expected = known.samples()
    assert torch.equal(known.images, before)
    assert torch.equal(labels, expected)
    assert int(is_noisy.sum()) == 8
    assert torch.equal(images[~is_noisy], clean[~is_noisy])
    assert torch.equal(images[:, 0, 0, 0], clean[:, 0, 0, 0])  # the font
    letters = [
        (chr(code), font)
        for code, font in zip(*images[is_noisy][:, 0, [1, 0], [1, 0]].T.tolist(), strict=True)
    ]
    assert {letter for letter, _ in letters} <= set(open_set.characters)
    assert len(set(letters)) == 8  # none twice while there are enough


def test_open_set_images_are_used_again_where_they_are_too_few() -> None:
    images, _, is_noisy = replace_images(glyph_set("abcdefgh"), glyph_set("QR"), 0.9, seed=0)
    assert set(images[is_noisy][:, 0, 5, 5].tolist()) == {ord("Q"), ord("R")}


def test_missing_glyphs_are_neither_replaced_nor_used() -> None:
    known, open_set = glyph_set("abcd"), glyph_set("QRS")
    known.present[0, 1] = open_set.present[1, 0] = False
    images, labels, is_noisy = replace_images(known, open_set, 0.8, seed=1)
    assert len(images) == len(labels) == len(is_noisy) == 7
    used = images[is_noisy][:, 0]
    assert (ord("R"), 0) not in {(int(image[5, 5]), int(image[0, 0])) for image in used}


def test_open_set_must_be_outside_and_in_the_same_fonts() -> None:
    with pytest.raises(ValueError, match="open_set: 1 characters are trained on too, such as b"):
        replace_images(glyph_set("ab"), glyph_set("bc"), 0.5, seed=0)
    with pytest.raises(ValueError, match="open_set: expected the fonts"):
        replace_images(glyph_set("ab"), glyph_set("cd", fonts=3), 0.5, seed=0)
    empty = glyph_set("cd")
    empty.present[:, 1] = False
    with pytest.raises(ValueError, match="open_set: expected images in every font, got none in font1"):
        replace_images(glyph_set("ab"), empty, 0.9, seed=0)
