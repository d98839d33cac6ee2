"""Random distortions that stand between one font and another: geometry, stroke width, blur, contrast, noise.

B images; x (B, 1, 32, 32) float32, ink high, 0 to 1. Every image draws its own values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ANGLE = 0.12  # radians
SCALE, LOG_SCALE = 1.02, 0.14  # each axis: SCALE * exp(±LOG_SCALE)
SHEAR = 0.15
SHIFT = 0.08  # of half the width
ELASTIC, ELASTIC_GRID = 0.05, 5  # standard deviation in units of half the width, on a 5x5 grid
STROKE = 0.6
BLUR = 0.8
FADE = 0.3
NOISE = 0.15


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Distort each of (B, 1, 32, 32); the result leaves 0 to 1 by the noise."""
    x = F.grid_sample(x, _grid(x, generator), mode="bilinear", padding_mode="zeros", align_corners=False)
    x = _stroke(x, STROKE * _symmetric(x, generator))
    x = x + BLUR * _positive(x, generator) * (F.avg_pool2d(x, 3, 1, 1) - x)
    x = x * (1 - FADE * _positive(x, generator))
    noise = torch.randn(x.shape, generator=generator)
    return x + NOISE * _positive(x, generator) * noise


def _positive(x: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 1, 1, 1) uniform in 0 to 1."""
    return torch.rand((len(x), 1, 1, 1), generator=generator)


def _symmetric(x: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 1, 1, 1) uniform in -1 to 1."""
    return 2 * _positive(x, generator) - 1


def _grid(x: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 32, 32, 2) where to sample: an affine map plus a smooth random displacement."""
    angle, log_x, log_y, shear, shift_x, shift_y = (
        2 * torch.rand((6, len(x)), generator=generator) - 1
    ).unbind()
    cos, sin = torch.cos(ANGLE * angle), torch.sin(ANGLE * angle)
    scale_x, scale_y = SCALE * torch.exp(LOG_SCALE * log_x), SCALE * torch.exp(LOG_SCALE * log_y)
    lean = SHEAR * shear
    first = torch.stack((scale_x * cos, scale_x * (lean * cos - sin), SHIFT * shift_x), dim=1)
    second = torch.stack((scale_y * sin, scale_y * (lean * sin + cos), SHIFT * shift_y), dim=1)
    affine = F.affine_grid(torch.stack((first, second), dim=1), list(x.shape), align_corners=False)
    coarse = ELASTIC * torch.randn((len(x), 2, ELASTIC_GRID, ELASTIC_GRID), generator=generator)
    bend = F.interpolate(coarse, x.shape[-2:], mode="bicubic", align_corners=True)
    return affine + bend.permute(0, 2, 3, 1)


def _stroke(x: Tensor, k: Tensor) -> Tensor:
    """Move by |k| (B, 1, 1, 1) towards thicker (k > 0) or thinner strokes."""
    # min-pool is max-pool of -x: one pooling serves both signs
    sign = torch.where(k > 0, 1.0, -1.0)
    pooled = sign * F.max_pool2d(sign * x, 3, 1, 1)
    return x + k.abs() * (pooled - x)
