"""The training rows of a run, and which of them are wrong.

N images, K characters, F fonts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..dataset import GlyphSet
from ..label_noise import flip_labels, replace_images
from .plan import CHOICE, CONDITIONS, Configuration, Run


@dataclass(frozen=True)
class Rows:
    """What one run trains on."""

    images: Tensor
    """(N, 1, 32, 32) uint8."""
    labels: Tensor
    """(N,) int64, as the head sees them."""
    is_noisy: Tensor
    """(N,) bool: rows that are not what their label says."""
    num_classes: int


def training_rows(train: GlyphSet, configuration: Configuration, run: Run) -> Rows:
    """The rows of `run`: the first characters of the set, made wrong as the condition says, by its seed.

    The noise depends on condition and seed, not on the head: heads are compared over the same wrong rows.
    """
    choosing = run.stage == CHOICE
    classes = configuration.choice_characters if choosing else configuration.characters
    condition = CONDITIONS[run.condition]
    known = train.subset(classes, configuration.fonts)
    if condition.kind == "outsiders":
        outsiders = train.subset(configuration.outsiders, configuration.fonts, skip=configuration.characters)
        images, labels, is_noisy = replace_images(known, outsiders, condition.share, run.seed)
    else:
        images, labels = known.samples()
        labels, is_noisy = flip_labels(labels, classes, condition.share, run.seed)
    return Rows(images, labels, is_noisy, classes)
