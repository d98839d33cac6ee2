"""Makes training data noisy: labels flipped within the set, or images of no class at all (open-set noise).

N images, K characters, F fonts. Which samples are noisy, and how, depends on the seed alone: the global
generators are neither read nor advanced, and every loss head trained from the same seed meets the same noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dataset import GlyphSet


def flip_labels(labels: Tensor, num_classes: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Give round(share * N) of the samples another class of the set, drawn uniformly.

    Args:
        labels: (N,) int64 in 0 to num_classes - 1; left unchanged.
        num_classes: classes to draw from, at least 2 where anything is to be flipped.
        share: of the samples, in [0, 1).
        seed: of samples and classes.

    Returns:
        (N,) int64 labels, and (N,) bool: which samples are noisy now.

    Raises:
        ValueError: share outside [0, 1), or fewer than 2 classes to flip between.
    """
    generator = torch.Generator().manual_seed(seed)
    is_noisy = _noisy_rows(len(labels), share, generator)
    count = int(is_noisy.sum())
    if count and num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2 to flip labels between, got {num_classes}")
    noisy = labels.clone()
    if count:
        # A step of 1 to C - 1 around the circle of classes never comes back to the class it left.
        step = torch.randint(1, num_classes, (count,), generator=generator)
        noisy[is_noisy] = (labels[is_noisy] + step) % num_classes
    return noisy, is_noisy


def replace_images(
    known: GlyphSet, open_set: GlyphSet, share: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace round(share * N) images of `known` by images of `open_set` in the same font.

    The font stays, so that it gives nothing away. An image is used twice only where a font of `open_set` has
    fewer images than are to be replaced.

    Args:
        known: the training set, N images.
        open_set: characters of no class (neither trained on nor verified), in the same fonts.
        share: of the images, in [0, 1).
        seed: of samples and images.

    Returns:
        images (N, 1, 32, 32) uint8, labels (N,) int64 as in `known.samples()`, and (N,) bool: which are
        replaced.

    Raises:
        ValueError: share outside [0, 1), other fonts, a character in both sets, a font without images.
    """
    if known.fonts != open_set.fonts:
        raise ValueError(f"open_set: expected the fonts {known.fonts}, got {open_set.fonts}")
    both = set(known.characters) & set(open_set.characters)
    if both:
        raise ValueError(f"open_set: {len(both)} characters are trained on too, such as {min(both)}")
    generator = torch.Generator().manual_seed(seed)
    images, labels = known.samples()
    is_noisy = _noisy_rows(len(images), share, generator)
    font_of = torch.arange(len(known.fonts)).expand(known.present.shape)[known.present]
    for f, font in enumerate(known.fonts):
        rows = torch.nonzero(is_noisy & (font_of == f))[:, 0]
        candidates = torch.nonzero(open_set.present[:, f])[:, 0]
        if len(rows) and not len(candidates):
            raise ValueError(f"open_set: expected images in every font, got none in {font}")
        order = torch.randperm(len(candidates), generator=generator)
        chosen = candidates[order[torch.arange(len(rows)) % max(1, len(candidates))]]
        images[rows, 0] = open_set.images[chosen, f]
    return images, labels, is_noisy


def _noisy_rows(count: int, share: float, generator: torch.Generator) -> Tensor:
    """(count,) bool with round(share * count) entries true; ValueError for a share outside [0, 1)."""
    if not 0 <= share < 1:
        raise ValueError(f"share: expected the share of noisy samples, in [0, 1), got {share}")
    is_noisy = torch.zeros(count, dtype=torch.bool)
    is_noisy[torch.randperm(count, generator=generator)[: round(share * count)]] = True
    return is_noisy
