"""Liger's fused linear cross-entropy on normalised inputs: without a margin, in chunks of rows.

B rows · C classes · D features
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Inputs
from bench.peers.base import GPU_ONLY, NO_MARGIN, Peer, Step, in_a_line, mode, not_installed, step_of
from bench.peers.normalised import normalising_bytes, operands
from expface_kernels.machine import version_of

PACKAGE = "liger-kernel"
MODULE, FUNCTION = "liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"
# Its chunks hold no more logits than B·D, times this where a release has the argument: at C ≫ D the default
# leaves a row or two a chunk, and it would read all centres for each.
LARGEST_CHUNK_ELEMENTS = 2**28


def budget_factor(case: Case) -> int:
    """`chunk_mem_const`: how many times B·D logits a chunk may hold."""
    return max(LARGEST_CHUNK_ELEMENTS // (case.rows * case.features), 1)


def chunk_rows(case: Case, factor: int) -> int:
    """Rows of a chunk, by its own rule: a power of two, so that chunk·C is about factor·B·D."""
    parts = -(-case.classes // (factor * case.features))
    rows = -(-case.rows // parts)
    return min(1 << (rows - 1).bit_length(), case.rows)


def arguments(forward: Any, rows: Tensor, centres: Tensor, labels: Tensor, case: Case) -> list[Any]:
    """Positional arguments of its autograd function, whose number grows from release to release."""
    wanted = {
        "_input": rows,
        "weight": centres,
        "target": labels,
        # Summed over chunks in 16 bit dw would be lost.
        "accum_dtype": torch.float32,
        "chunk_mem_const": budget_factor(case),
    }
    parameters = list(inspect.signature(forward).parameters.values())[1:]  # the first is ctx
    return [wanted.get(p.name, p.default) for p in parameters]


class Liger(Peer):
    """The autograd function itself, with float32 sums and the largest chunks that the release allows."""

    name = "liger"
    devices, margins = GPU_ONLY, NO_MARGIN
    compiles = True  # Triton

    def label(self, case: Case) -> str:
        version = version_of(PACKAGE)
        there = self.missing(case) is None
        chunk = f"chunks of {chunk_rows(case, self._factor(case)):,} rows" if there else "chunks of rows"
        return f"{PACKAGE} {version}, {chunk} ({mode(self, case)})"

    def missing(self, case: Case) -> str | None:
        if reason := not_installed("liger_kernel", PACKAGE):
            return reason
        try:
            self._function()
        except Exception as error:  # a release may ask for another torch or Triton
            return f"{PACKAGE} cannot be imported: {in_a_line(error)}"
        return None

    def extra_bytes(self, case: Case) -> int:
        """A chunk's logits, dw in float32."""
        logits = 2 * chunk_rows(case, self._factor(case)) * case.classes
        return (logits + case.classes * case.features) * 4 + normalising_bytes(case)

    def step(self, inputs: Inputs) -> Step:
        function = self._function()

        def forward() -> Tensor:
            rows, centres = operands(inputs)
            out = function.apply(*arguments(function.forward, rows, centres, inputs.labels, inputs.case))
            loss: Tensor = out[0] if isinstance(out, tuple) else out
            return loss

        return step_of(inputs.case, forward)

    def _function(self) -> Any:
        return getattr(importlib.import_module(MODULE), FUNCTION)

    def _factor(self, case: Case) -> int:
        """What `chunk_mem_const` comes to: 1 where the release does not have it."""
        has = "chunk_mem_const" in inspect.signature(self._function().forward).parameters
        return budget_factor(case) if has else 1
