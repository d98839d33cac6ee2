"""Heads with a margin: the eager one, torch.compile of it, its partial-FC form, and this package's.

B rows · C classes · D features · S classes that take part · s scale
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import DTYPES, Case, Inputs
from bench.peers.base import Peer, Step, mode, step_of
from expface_kernels import backends, margin_cross_entropy
from expface_kernels.backends.cpu import TILE_CLASSES
from expface_kernels.backends.products import TILE_ELEMENTS
from expface_kernels.functional import DEFAULT_WORKSPACE_BYTES
from expface_kernels.margins import MarginFunction

if TYPE_CHECKING:
    from expface_kernels.workshop.costs import Costs

# Keeps the slope of arccos finite at x ∥ w, as published heads do; 1 − 1e-7 is a float32 below 1.
COS_LIMIT = 1 - 1e-7
COMPILERS = (os.environ.get("CXX", "g++"), "g++", "clang++", "c++")
# A sweep has more shapes than torch would compile one function for.
SHAPES_COMPILED = 100
HOW = {"static": "", "autotuned": " with max-autotune", "dynamic": ", dynamic shapes"}
"""How, and what labels say of it: each shape anew, in default mode or with max-autotune; all at once."""
SAMPLE_RATE = 0.1
LARGEST_WORKSPACE = 2**63 - 1
"""Bytes: an operator's arguments are int64."""


def margin_loss(
    x: Tensor, w: Tensor, labels: Tensor, margin: MarginFunction, scale: float, target_gradient: str
) -> Tensor:
    """Return the mean loss () of x (B, D), w (C, D), labels (B,), as the usual published head writes it.

    Indexed and scaled in place, so that no copy of the logits is made that autograd does not need; float32
    after the product, as published heads for mixed precision do.
    """
    rows = torch.arange(x.shape[0], device=x.device)
    cos = F.linear(F.normalize(x), F.normalize(w))
    logits = cos.to(torch.promote_types(cos.dtype, torch.float32)).clamp(-1, 1)
    del cos
    # "detached": replaced behind autograd's back, as published heads do, so the slope stays the cosine's.
    with torch.set_grad_enabled(target_gradient == "exact"):
        theta = logits[rows, labels].clamp(-COS_LIMIT, COS_LIMIT).acos()
        logits[rows, labels] = margin(theta).to(logits.dtype)
    return F.cross_entropy(logits.mul_(scale), labels)


def eager_bytes(case: Case) -> int:
    """Estimate what this head holds at its peak, beside inputs and gradients, as measured."""
    logits, centres = case.rows * case.taking_part, case.taking_part * case.features
    itemsize = max(case.itemsize, 4)
    numbers = max(4 * logits + centres, 4.5 * centres) if case.backward else logits + max(logits, centres)
    extra = int(numbers) * itemsize
    # Under autocast the cosines are there in 16 bit as well.
    return extra + (logits * case.product_dtype.itemsize if case.product_dtype.itemsize < itemsize else 0)


class Eager(Peer):
    """Runs `margin_loss` op by op: the head that people have, cosines of all classes in memory."""

    name = "eager"

    def label(self, case: Case) -> str:
        return f"eager head ({mode(self, case)})"

    def extra_bytes(self, case: Case) -> int:
        return eager_bytes(case)

    def step(self, inputs: Inputs) -> Step:
        case, margin = inputs.case, inputs.case.margin_function()
        return step_of(
            case,
            lambda: margin_loss(inputs.x, inputs.w, inputs.labels, margin, case.scale, case.target_gradient),
        )


def no_compiler() -> str | None:
    """Say why torch.compile cannot work here; None where it may."""
    if any(shutil.which(compiler) for compiler in COMPILERS):
        return None
    return "torch.compile needs a C++ compiler, none is on the path"


def compiled(function: Callable[..., Tensor], how: str) -> Callable[..., Tensor]:
    """Compile the function as one graph; `how` is a name of HOW."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, SHAPES_COMPILED)
    made: Callable[..., Tensor] = torch.compile(
        function,
        fullgraph=True,
        dynamic=how == "dynamic",
        mode="max-autotune" if how == "autotuned" else "default",
    )
    return made


class Compiled(Peer):
    """Compiles `margin_loss`: static shapes suit it best, dynamic ones save a sweep minutes of compiling.

    `how` is a name of HOW.
    """

    compiles = True

    def __init__(self, how: str) -> None:
        self.how = how
        self.name = "compiled" if how == "static" else f"compiled_{how}"

    def label(self, case: Case) -> str:
        return f"torch.compile of the eager head{HOW[self.how]} ({mode(self, case)})"

    def missing(self, case: Case) -> str | None:
        return no_compiler()

    def extra_bytes(self, case: Case) -> int:
        """Estimate as measured; the forward alone as eager."""
        if not case.backward:
            return eager_bytes(case)
        logits, centres = case.rows * case.taking_part, case.taking_part * case.features
        numbers = max(4.25 * logits, 1.1 * centres + 2 * logits)
        return int(numbers) * max(case.itemsize, 4)

    def step(self, inputs: Inputs) -> Step:
        case, margin = inputs.case, inputs.case.margin_function()
        loss = compiled(margin_loss, self.how)
        return step_of(
            case, lambda: loss(inputs.x, inputs.w, inputs.labels, margin, case.scale, case.target_gradient)
        )


class PartialFC(Peer):
    """Gathers the sampled centers and runs the eager head over them, as users have it in one process.

    Which classes take part is drawn before the step, for this peer and ours alike.
    """

    name = "partial_fc"
    sample_rate = SAMPLE_RATE

    def label(self, case: Case) -> str:
        return f"eager partial-FC step, {self.sample_rate:.0%} of the classes sampled ({mode(self, case)})"

    def extra_bytes(self, case: Case) -> int:
        """Estimate the eager head over S classes, and their centers gathered, with that copy's gradient.

        At measured times less: what index_select's backward does not write of w's gradient is never resident.
        """
        gathered = 2 * case.taking_part * case.features * max(case.itemsize, 4)
        return eager_bytes(case) + gathered

    def step(self, inputs: Inputs) -> Step:
        case, margin = inputs.case, inputs.case.margin_function()
        subset = inputs.subset()
        assert subset is not None
        places = torch.searchsorted(subset, inputs.labels)

        def forward() -> Tensor:
            centres = inputs.w.index_select(0, subset)
            return margin_loss(inputs.x, centres, places, margin, case.scale, case.target_gradient)

        return step_of(case, forward)


DEFAULT_ARCH = "sm_90"
"""Whose launches are counted where memory is asked for."""


@functools.cache
def our_costs(case: Case, workspace_bytes: int, arch: str) -> Costs:
    """Count ours from the launches that it makes on such a GPU; this needs Triton, not a GPU."""
    from expface_kernels.workshop import costs, recording

    dtype = DTYPES[case.dtype]
    launches = recording.Case(
        case.rows,
        case.classes,
        case.features,
        dtype,
        dtype,
        scale=case.scale,
        workspace_bytes=workspace_bytes,
        product_dtype=None if case.autocast is None else case.product_dtype,
    )
    return costs.costs(launches, arch)


class Ours(Peer):
    """Runs `margin_cross_entropy`: "ours" by default, "ours@N" with a workspace of N bytes."""

    rounds_cosines = False

    def __init__(self, workspace_bytes: int | None = None) -> None:
        self.name = "ours" if workspace_bytes is None else f"ours@{workspace_bytes}"
        self.workspace_bytes = DEFAULT_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
        if self.workspace_bytes > LARGEST_WORKSPACE:
            raise ValueError(f"workspace-bytes: expected at most 2**63 - 1, got {workspace_bytes}")

    def label(self, case: Case) -> str:
        return f"ours, workspace {self.workspace_bytes / 2**20:.4g} MiB ({mode(self, case)})"

    def missing(self, case: Case) -> str | None:
        state = backends.available()["cpu" if case.device == "cpu" else "triton"]
        return None if state == "ok" else state

    def extra_bytes(self, case: Case) -> int:
        """Ask the cost model on a GPU; else count cached exponentials, a tile, one number per class."""
        if case.device == "cuda":
            return our_costs(case, self.workspace_bytes, DEFAULT_ARCH).extra
        logits = case.rows * case.taking_part
        kept = min(self.workspace_bytes, logits * case.itemsize) if case.backward else 0
        # A sample's tile of centers is copied, and so is that of their gradients.
        copied = 2 * case.features * min(case.taking_part, TILE_CLASSES[1]) if self.sample_rate != 1 else 0
        return kept + (min(TILE_ELEMENTS, logits) + case.taking_part + copied) * max(case.itemsize, 4)

    def held_bytes(self, case: Case) -> int:
        """Count the workspace and w's gradient, whose memory waits for the next step on the CPU."""
        return 0 if case.device == "cuda" else self.extra_bytes(case) + case.gradient_bytes

    def step(self, inputs: Inputs) -> Step:
        return self._step(inputs, self.workspace_bytes)

    def partly_kept_step(self, inputs: Inputs) -> Step:
        """Make the step whose workspace holds no more than half of the exponentials."""
        case = inputs.case
        itemsize = case.product_dtype.itemsize if case.device == "cuda" else max(case.itemsize, 4)
        return self._step(inputs, min(self.workspace_bytes, case.rows * case.taking_part * itemsize // 2))

    def _step(self, inputs: Inputs, workspace_bytes: int) -> Step:
        case, margin, subset = inputs.case, inputs.case.margin_function(), inputs.subset()

        def forward() -> Tensor:
            loss = margin_cross_entropy(
                inputs.x,
                inputs.w,
                inputs.labels,
                margin,
                scale=case.scale,
                target_gradient=case.target_gradient,
                class_subset=subset,
                workspace_bytes=workspace_bytes,
            )
            assert isinstance(loss, Tensor)
            return loss

        return step_of(case, forward)


class OursSampled(Ours):
    """Runs it over a sample of the classes (`class_subset`), without a gathered copy of their centers."""

    sample_rate = SAMPLE_RATE

    def __init__(self) -> None:
        super().__init__()
        self.name = "ours_sampled"

    def label(self, case: Case) -> str:
        return f"ours, {self.sample_rate:.0%} of the classes sampled ({mode(self, case)})"
