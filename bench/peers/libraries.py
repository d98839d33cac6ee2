"""Losses of libraries: pytorch-metric-learning's heads, and linear cross-entropies, which have no margin.

Those are fed normalized rows and centers: pytorch's own, Apple's cut-cross-entropy, Liger's fused one.

B rows · C classes · D features · s scale
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import DTYPES, Case, Inputs
from bench.peers.base import GPU_ONLY, NO_MARGIN, Peer, Step, in_a_line, mode, not_installed, step_of
from bench.peers.heads import HOW, compiled, eager_bytes, no_compiler
from expface_kernels.machine import version_of
from expface_kernels.margin_spec import MARGINS

PML, CCE, LIGER = "pytorch-metric-learning", "cut-cross-entropy", "liger-kernel"
FIRST_RELEASE = "2.13"
COMPILED = {"compiled": "static", "autotuned": "autotuned", "dynamic": "dynamic"}
"""Ways that compile, and how."""
CHUNKED = ("chunked", "auto")
CHUNK_ROWS = 128
"""Of "chunked". The automatic choice at C ≫ D is a row or a few, which reads all centers for each chunk."""
WAYS = {
    "plain": "plain",
    **{way: f"compiled{HOW[how]}" for way, how in COMPILED.items()},
    "chunked": "chunks of {rows} rows",
    "auto": "automatic chunks",
}
LIGER_MODULE, LIGER_FUNCTION = (
    "liger_kernel.ops.fused_linear_cross_entropy",
    "LigerFusedLinearCrossEntropyFunction",
)
# Its chunks hold no more logits than B·D, times this where a release has the argument: at C ≫ D the default
# leaves a row or two per chunk, and it would read all centers for each.
LARGEST_CHUNK_ELEMENTS = 2**28


def operands(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return (s·xn (B, D), wn (C, D)), whose products are the logits s·cos, in autocast's dtype if any."""
    return rows_and_centers(inputs.x, inputs.w, inputs.case.scale, inputs.case.product_dtype)


def rows_and_centers(x: Tensor, w: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the same from tensors, normalized in float32 or wider whatever they are stored in."""
    x, w = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, w))
    return (scale * F.normalize(x)).to(dtype), F.normalize(w).to(dtype)


def normalizing_bytes(case: Case) -> int:
    """Estimate what normalizing holds at the backward's peak: centers and gradients in float32 and 16 bit."""
    centers = case.classes * case.features
    half = centers * case.product_dtype.itemsize if case.product_dtype.itemsize < 4 else 0
    return 4 * centers * max(case.itemsize, 4) + 2 * half


class MetricLearning(Peer):
    """Runs one of its losses at the default strength of ours; its gradient is that of the value, "exact"."""

    gradients = ("exact",)

    def __init__(self, margin: str, loss: str) -> None:
        self.name = f"pml_{margin}"
        self.margins = (margin,)
        self.loss = loss

    def label(self, case: Case) -> str:
        version = version_of(PML)
        return f"{PML} {version} {self.loss} ({mode(self, case)})"

    def missing(self, case: Case) -> str | None:
        return not_installed("pytorch_metric_learning", PML)

    def extra_bytes(self, case: Case) -> int:
        if case.backward:
            return eager_bytes(case)
        logits, centers = case.rows * case.classes, case.classes * case.features
        return int(max(4.4 * logits, centers + 2 * logits)) * max(case.itemsize, 4)

    def needed_bytes(self, case: Case) -> int:
        return super().needed_bytes(case) + self.held_bytes(case)

    def held_bytes(self, case: Case) -> int:
        """Count its own copy of the centers, which are (D, C)."""
        return case.classes * case.features * case.itemsize

    def step(self, inputs: Inputs) -> Step:
        case = inputs.case
        loss = self._loss(case)
        # Its own layout, made once: a user's centers are stored so.
        loss.W.data = inputs.w.detach().T.contiguous()

        def forward() -> Tensor:
            value: Tensor = loss(inputs.x, inputs.labels)
            return value

        inner = step_of(case, forward)

        def step() -> Tensor:
            value = inner()
            if case.backward:
                # Handed over: kept here too, it would be freed within its next step.
                inputs.w.grad, loss.W.grad = loss.W.grad.T, None
            return value

        return step

    def _loss(self, case: Case) -> Any:
        from pytorch_metric_learning import losses

        m: float = vars(MARGINS[self.margins[0]]())["m"]
        if self.loss == "ArcFaceLoss":
            m = math.degrees(m)
        # With no classes at first: its own initialization of the centers would take longer than the step.
        made = getattr(losses, self.loss)(1, case.features, margin=m, scale=case.scale)
        made.num_classes = case.classes
        return made.to(device=torch.device(case.device), dtype=DTYPES[case.dtype])


def linear_loss(
    x: Tensor, w: Tensor, labels: Tensor, scale: float, dtype: torch.dtype, options: object = None
) -> Tensor:
    """Return the mean loss () of x (B, D), w (C, D), labels (B,); `options` ask for chunks of rows."""
    rows, centers = rows_and_centers(x, w, scale, dtype)
    linear_cross_entropy: Any = F.linear_cross_entropy
    loss: Tensor = linear_cross_entropy(rows, centers, labels, options=options)
    return loss


class TorchLinear(Peer):
    """Runs torch's own op by op, compiled in three ways, or in chunks with gradients made in the forward."""

    margins = NO_MARGIN

    def __init__(self, way: str) -> None:
        self.way = way
        self.name = f"torch_linear{'' if way == 'plain' else '_' + way}"
        self.compiles = way in COMPILED

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
        """Estimate as measured."""
        centers = case.classes * case.features
        chunked = self.way in CHUNKED
        logits = (self._chunk(case) if chunked else case.rows) * case.classes
        numbers: float = centers + logits
        if not case.backward:
            numbers += 0 if chunked else logits
        elif chunked:
            numbers = max(4.2 * centers, 3.5 * logits + 2.3 * centers)
        elif self.way == "plain":
            numbers = max(4.1 * centers, 2 * logits + 2.3 * centers)
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


class CutCrossEntropy(Peer):
    """Runs Apple's kernels, 16 bit only: `cce` leaves out gradients below a threshold, `cce_exact` none."""

    devices, margins = GPU_ONLY, NO_MARGIN
    compiles = True  # Triton

    def __init__(self, implementation: str) -> None:
        self.name = self.implementation = implementation

    def label(self, case: Case) -> str:
        version = version_of(CCE)
        return f"{CCE} {version}, {self.implementation}, no chunks ({mode(self, case)})"

    def missing(self, case: Case) -> str | None:
        if reason := not_installed("cut_cross_entropy", CCE):
            return reason
        if case.product_dtype not in (torch.bfloat16, torch.float16):
            return f"its backward takes bfloat16 and float16, not {case.product_dtype}"
        return None

    def extra_bytes(self, case: Case) -> int:
        return normalizing_bytes(case)

    def step(self, inputs: Inputs) -> Step:
        from cut_cross_entropy import linear_cross_entropy

        def forward() -> Tensor:
            rows, centers = operands(inputs)
            loss: Tensor = linear_cross_entropy(rows, centers, inputs.labels, impl=self.implementation)
            return loss

        return step_of(inputs.case, forward)


def budget_factor(case: Case) -> int:
    """Return `chunk_mem_const`: how many times B·D logits a chunk may hold."""
    return max(LARGEST_CHUNK_ELEMENTS // (case.rows * case.features), 1)


def chunk_rows(case: Case, factor: int) -> int:
    """Return the rows of a chunk by its own rule: a power of two, so that chunk·C is about factor·B·D."""
    parts = -(-case.classes // (factor * case.features))
    rows = -(-case.rows // parts)
    return min(1 << (rows - 1).bit_length(), case.rows)


def arguments(forward: Any, rows: Tensor, centers: Tensor, labels: Tensor, case: Case) -> list[Any]:
    """Return positional arguments of its autograd function, whose number grows from release to release."""
    wanted = {
        "_input": rows,
        "weight": centers,
        "target": labels,
        # Summed over chunks in 16 bit dw would be lost.
        "accum_dtype": torch.float32,
        "chunk_mem_const": budget_factor(case),
    }
    parameters = list(inspect.signature(forward).parameters.values())[1:]  # the first is ctx
    return [wanted.get(p.name, p.default) for p in parameters]


class Liger(Peer):
    """Runs the autograd function itself, with float32 sums and the largest chunks that the release allows."""

    name = "liger"
    devices, margins = GPU_ONLY, NO_MARGIN
    compiles = True  # Triton

    def label(self, case: Case) -> str:
        version = version_of(LIGER)
        there = self.missing(case) is None
        chunk = f"chunks of {chunk_rows(case, self._factor(case)):,} rows" if there else "chunks of rows"
        return f"{LIGER} {version}, {chunk} ({mode(self, case)})"

    def missing(self, case: Case) -> str | None:
        if reason := not_installed("liger_kernel", LIGER):
            return reason
        try:
            self._function()
        except Exception as error:  # a release may ask for another torch or Triton
            return f"{LIGER} cannot be imported: {in_a_line(error)}"
        return None

    def extra_bytes(self, case: Case) -> int:
        """Count a chunk's logits and dw in float32."""
        logits = 2 * chunk_rows(case, self._factor(case)) * case.classes
        return (logits + case.classes * case.features) * 4 + normalizing_bytes(case)

    def step(self, inputs: Inputs) -> Step:
        function = self._function()

        def forward() -> Tensor:
            rows, centers = operands(inputs)
            out = function.apply(*arguments(function.forward, rows, centers, inputs.labels, inputs.case))
            loss: Tensor = out[0] if isinstance(out, tuple) else out
            return loss

        return step_of(inputs.case, forward)

    def _function(self) -> Any:
        return getattr(importlib.import_module(LIGER_MODULE), LIGER_FUNCTION)

    def _factor(self, case: Case) -> int:
        """Return what `chunk_mem_const` comes to: 1 where the release does not have it."""
        has = "chunk_mem_const" in inspect.signature(self._function().forward).parameters
        return budget_factor(case) if has else 1
