"""Train the embedding under any loss head. Used by the demo and by the studies.

N images, B of them in a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .augment import augment


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum, a linear warm-up and a cosine to zero; the last short batch is dropped."""

    epochs: int = 8
    batch: int = 256
    lr: float = 0.07
    momentum: float = 0.9
    weight_decay: float = 5e-4  # on everything, the class centres included
    warmup: float = 0.1  # of all steps
    seed: int = 0  # order and augmentation


@dataclass(frozen=True)
class Step:
    """One step that was just done. `rows` (B,) are indices into the images, `stats` the head's BatchStats."""

    epoch: int
    number: int  # from 1, over all epochs
    of: int
    loss: float
    target_angle: float  # mean over the rows, degrees
    rows: Tensor
    stats: Any


@dataclass(frozen=True)
class EpochRecord:
    """Means over one epoch; the angle between an image and its own class centre in degrees."""

    epoch: int
    loss: float
    target_angle: float
    seconds: float
    images_per_second: float


class TrainingError(RuntimeError):
    """Training cannot go on (a loss that is no number, fewer images than one batch)."""


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """The rate of step 0 to `steps` - 1."""
    warm = max(1, round(recipe.warmup * steps))
    if step < warm:
        return recipe.lr * (step + 1) / warm
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(
    net: nn.Module,
    head: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    on_step: Callable[[Step], None] | None = None,
) -> Iterator[EpochRecord]:
    """Train `net` and `head` in place, yielding a record after each epoch.

    images (N, 1, 32, 32) uint8; labels (N,) int64. `head(embeddings, labels, return_stats=True)` must give a
    loss and BatchStats. Raises TrainingError.
    """
    per_epoch = len(images) // recipe.batch
    if per_epoch == 0:
        raise TrainingError(f"images: expected at least one batch of {recipe.batch}, got {len(images)}")
    steps = per_epoch * recipe.epochs
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.SGD(
        [*net.parameters(), *head.parameters()],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=True,
        weight_decay=recipe.weight_decay,
    )
    net.train()
    number = 0
    for epoch in range(1, recipe.epochs + 1):
        start = time.perf_counter()
        losses, angles = 0.0, 0.0
        order = torch.randperm(len(images), generator=generator)[: per_epoch * recipe.batch]
        for rows in order.split(recipe.batch):
            optimizer.param_groups[0]["lr"] = learning_rate(number, steps, recipe)
            x = augment(images[rows].float() / 255, generator)
            loss, stats = head(net(x), labels[rows], return_stats=True)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            number += 1
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingError(f"the loss is {value} at step {number} of {steps}: training diverged")
            angle = math.degrees(stats.target_angle.mean().item())
            losses, angles = losses + value, angles + angle
            if on_step is not None:
                on_step(Step(epoch, number, steps, value, angle, rows, stats))
        seconds = time.perf_counter() - start
        yield EpochRecord(epoch, losses / per_epoch, angles / per_epoch, seconds, len(order) / seconds)
