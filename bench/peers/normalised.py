"""What the linear cross-entropies of language models are fed here: they have no margin, so no target differs.

B rows · C classes · D features · s scale
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Inputs


def operands(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(s·xn (B, D), wn (C, D)), whose products are the logits s·cos; in autocast's dtype if there is one."""
    return rows_and_centres(inputs.x, inputs.w, inputs.case.scale, inputs.case.product_dtype)


def rows_and_centres(x: Tensor, w: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same from tensors; normalised in float32 or wider whatever they are stored in."""
    x, w = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, w))
    return (scale * F.normalize(x)).to(dtype), F.normalize(w).to(dtype)


def normalising_bytes(case: Case) -> int:
    """About what normalising holds at the backward's peak: centres and gradients in float32 and in 16 bit."""
    centres = case.classes * case.features
    half = centres * case.product_dtype.itemsize if case.product_dtype.itemsize < 4 else 0
    return 4 * centres * max(case.itemsize, 4) + 2 * half
