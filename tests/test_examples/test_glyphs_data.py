"""The shipped glyph data: intact, complete, and split so that nothing tested was trained on."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.glyphs import dataset


@pytest.fixture(scope="module")
def glyphs() -> dataset.Glyphs:
    return dataset.load()


def test_shapes_and_levels(glyphs: dataset.Glyphs) -> None:
    assert glyphs.train.images.shape == (2200, 20, 32, 32)
    assert glyphs.validation.images.shape == (250, 4, 32, 32)
    assert glyphs.test.images.shape == (500, 8, 32, 32)
    assert glyphs.test.images.dtype == torch.uint8
    assert glyphs.test.images.unique().tolist() == [0, 85, 170, 255]


def test_every_image_has_ink_and_its_own_shape(glyphs: dataset.Glyphs) -> None:
    for part in (glyphs.train, glyphs.validation, glyphs.test):
        assert part.present.all()
        ink = (part.images > 64).flatten(2).sum(2)
        assert ink.min() >= 20  # even "one" is a stroke of 30 pixels
        for font in range(len(part.fonts)):
            # a blank or a placeholder drawn for many characters would leave few distinct images
            distinct = {image.numpy().tobytes() for image in part.images[:, font]}
            assert len(distinct) >= 0.98 * len(part.characters), part.fonts[font]


def test_splits_share_no_character_and_no_font(glyphs: dataset.Glyphs) -> None:
    parts = (glyphs.train, glyphs.validation, glyphs.test)
    seen = [c for part in parts for c in part.characters]
    assert len(set(seen)) == len(seen) == 2950
    used = [font for part in parts for font in part.fonts]
    assert len(set(used)) == len(used) == 32


def test_samples_are_the_present_images_with_their_class() -> None:
    images = torch.arange(6, dtype=torch.uint8).reshape(3, 2, 1, 1).expand(3, 2, 32, 32)
    present = torch.tensor([[True, False], [True, True], [False, True]])
    x, y = dataset.GlyphSet(images, present, "abc", ("f", "g")).samples()
    assert y.tolist() == [0, 1, 1, 2]
    assert x.shape == (4, 1, 32, 32)
    assert x[:, 0, 0, 0].tolist() == [0, 2, 3, 5]


def test_packing_rounds_to_the_nearest_of_four_levels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    packed = dataset.pack(images)
    assert packed.shape == (2, 3, 256)
    expected = (images.astype(int) + 42) // 85 * 85
    np.testing.assert_array_equal(dataset.unpack(packed), expected)


def test_saved_data_loads_as_it_was(tmp_path: Path, glyphs: dataset.Glyphs) -> None:
    small = dataset.Glyphs(
        glyphs.train.subset(3, 2), glyphs.validation.subset(2, 2), glyphs.test.subset(4, 3)
    )
    dataset.save(tmp_path / "small.npz", small)
    loaded = dataset.load(tmp_path / "small.npz")
    assert loaded.test.characters == small.test.characters
    assert loaded.test.fonts == small.test.fonts
    assert torch.equal(loaded.train.images, small.train.images)


def test_damage_is_told_by_name(tmp_path: Path) -> None:
    copy = tmp_path / dataset.COMPACT_FILE.name
    shutil.copy(dataset.COMPACT_FILE, copy)
    shutil.copy(dataset.checksum_file(dataset.COMPACT_FILE), tmp_path)
    content = bytearray(copy.read_bytes())
    content[1000] ^= 1
    copy.write_bytes(content)
    with pytest.raises(dataset.DataError, match=r"compact\.npz is damaged .* expected SHA-256 \w{64}, got"):
        dataset.load(copy)


def test_missing_data_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(dataset.DataError, match=r"nowhere\.npz does not exist"):
        dataset.load(tmp_path / "nowhere.npz")
