"""torch.nn.functional.linear_cross_entropy on normalised inputs: PyTorch's own, without a margin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Inputs
from bench.peers.base import NO_MARGIN, Peer, Step, mode, step_of
from bench.peers.compiled import HOW, compiled, no_compiler
from bench.peers.normalised import rows_and_centres

FIRST_RELEASE = "2.13"
COMPILED = {"compiled": "static", "autotuned": "autotuned", "dynamic": "dynamic"}
"""Ways that compile, and how."""
CHUNKED = ("chunked", "auto")
CHUNK_ROWS = 128
"""Of "chunked". The automatic choice at C ≫ D is a row or a few, which reads all centres for each chunk."""
WAYS = {
    "plain": "plain",
    **{way: f"compiled{HOW[how]}" for way, how in COMPILED.items()},
    "chunked": "chunks of {rows} rows",
    "auto": "automatic chunks",
}


def linear_loss(
    x: Tensor, w: Tensor, labels: Tensor, scale: float, dtype: torch.dtype, options: object = None
) -> Tensor:
    """Mean loss () of x (B, D), w (C, D), labels (B,); `options` ask for chunks of rows."""
    rows, centres = rows_and_centres(x, w, scale, dtype)
    linear_cross_entropy: Any = F.linear_cross_entropy
    loss: Tensor = linear_cross_entropy(rows, centres, labels, options=options)
    return loss


class TorchLinear(Peer):
    """Op by op, compiled in three ways, or in chunks of rows with gradients formed in the forward."""

    margins = NO_MARGIN

    def __init__(self, way: str) -> None:
        self.way = way
        self.name = f"torch_linear{'' if way == 'plain' else '_' + way}"
        self.compiles = way in COMPILED
        self.loads = ("torch._dynamo",) if self.compiles else ()

    def label(self, case: Case) -> str:
        way = WAYS[self.way].format(rows=min(case.rows, CHUNK_ROWS))
        return f"torch {torch.__version__} linear_cross_entropy, {way} ({mode(self, case)})"

    def missing(self, case: Case) -> str | None:
        if not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no linear_cross_entropy: it came with {FIRST_RELEASE}"
        if self.compiles and (reason := no_compiler()):
            return reason
        return None

    def extra_bytes(self, case: Case) -> int:
        """As measured."""
        centres = case.classes * case.features
        chunked = self.way in CHUNKED
        logits = (self._chunk(case) if chunked else case.rows) * case.classes
        numbers: float = centres + logits
        if not case.backward:
            numbers += 0 if chunked else logits
        elif chunked:
            numbers = max(4.2 * centres, 3.5 * logits + 2.3 * centres)
        elif self.way == "plain":
            numbers = max(4.1 * centres, 2 * logits + 2.3 * centres)
        return int(numbers) * max(case.itemsize, 4)

    def _chunk(self, case: Case) -> int:
        return min(case.rows, CHUNK_ROWS if self.way == "chunked" else 1)

    def step(self, inputs: Inputs) -> Step:
        case = inputs.case
        loss: Callable[..., Tensor] = linear_loss
        options: object = None
        if self.compiles:
            loss = compiled(linear_loss, COMPILED[self.way])
        elif self.way in CHUNKED:
            rows = self._chunk(case) if self.way == "chunked" else None
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        dtype = case.product_dtype
        return step_of(case, lambda: loss(inputs.x, inputs.w, inputs.labels, case.scale, dtype, options))
