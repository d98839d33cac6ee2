"""What one call will compute in and how much it will hold: sizes only, no Triton, no tensor's values.

B rows · C classes that take part · D features · E kept exponentials, (kept_pad, rows_pad) class-major
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expface_kernels.backends.base import OpConfig

PAD = 128
"""Rows and chunks of classes are padded to a multiple of this: no kernel masks its inner loop for them."""
CHUNK_BYTES = 256 * 2**20
"""P' of a chunk of classes, in memory between the kernel that writes it and the two that read it, together
with the chunk's centres where dX multiplies a copy of them. Every chunk reads what has B rows once more."""
LARGEST_PLAIN_SCALE = 70.0
"""Up to here exp(s·cos) of all classes adds up in float32 without a running maximum."""
SMALLEST_KEPT_SCALE = 1.0
"""From here on a kept exponential, rounded as it is, tells its cosine to the precision of its dtype."""


@dataclass(frozen=True)
class Plan:
    """The sizes of a call."""

    rows: int
    classes: int
    product: torch.dtype
    """What the matrix products multiply; they accumulate in float32. P' and E have it too."""
    shifted: bool
    """Centres wider than float16 enter float16 products times a power of two, lest they leave its range."""
    kept_pad: int
    """Classes whose exponentials the workspace holds, padded."""
    copied: int
    """D where dX multiplies a copy of a chunk's centres (listed, cast, or over their norm), else 0."""

    @classmethod
    def of(cls, x: Tensor, w: Tensor, classes: int, config: OpConfig, indexed: bool = False) -> Plan:
        """Depends on no value and not on the scale, so that it is known under torch.compile.

        indexed: classes are listed, which makes no difference to the workspace.
        """
        product = config.product_dtype
        if product not in (torch.bfloat16, torch.float16):
            product = torch.promote_types(x.dtype, w.dtype)
        rows = x.shape[0]
        kept_pad = 0
        # float16 has no room for exp(s·cos), whatever its factor.
        if config.keep and product != torch.float16:
            affordable = config.workspace_bytes // (max(_padded(rows), PAD) * product.itemsize)
            kept_pad = min(affordable // PAD * PAD, _padded(classes))
        shifted = product == torch.float16 and w.dtype != torch.float16
        copies = indexed or w.dtype != product or product == torch.float16
        return cls(rows, classes, product, shifted, kept_pad, w.shape[1] if copies else 0)

    @property
    def rows_pad(self) -> int:
        return _padded(self.rows)

    @property
    def classes_pad(self) -> int:
        return _padded(self.classes)

    @property
    def kept(self) -> int:
        return min(self.kept_pad, self.classes)

    @property
    def chunk(self) -> int:
        """Classes of a chunk of P' and, beside it, of copied centres; a multiple of PAD."""
        width = max(self.rows_pad, PAD) + self.copied
        affordable = CHUNK_BYTES // (width * self.product.itemsize)
        return min(max(affordable // PAD, 1) * PAD, self.classes_pad)

    @property
    def over_norm(self) -> bool:
        """Whether P' holds p/|w_j|, which float16 has no range for."""
        return self.product != torch.float16

    @property
    def numel(self) -> int:
        """float32 elements of the workspace: inverse norms, shifts, E."""
        exponentials = self.kept_pad * self.rows_pad * self.product.itemsize // 4
        return self.classes_pad * (2 if self.shifted else 1) + exponentials

    def split(self, workspace: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The workspace as inv (classes_pad,), shift (classes_pad,) or (0,), e (kept_pad, rows_pad)."""
        shifts = self.classes_pad if self.shifted else 0
        inv, shift, e = workspace.split([self.classes_pad, shifts, self.numel - self.classes_pad - shifts])
        return inv, shift, e.view(self.product).view(self.kept_pad, self.rows_pad)

    def chunks(self, start: int, stop: int) -> list[tuple[int, int]]:
        return [(i, min(i + self.chunk, stop)) for i in range(start, stop, self.chunk)]


def _padded(number: int) -> int:
    return -(-number // PAD) * PAD
