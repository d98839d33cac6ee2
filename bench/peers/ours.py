"""This package's head, with a workspace of its default size or another, over all classes or a sample."""

from __future__ import annotations

from torch import Tensor

from bench.cases import Case, Inputs
from bench.peers.base import Peer, Step, mode, step_of
from bench.peers.partial_fc import SAMPLE_RATE
from expface_kernels import backends, margin_cross_entropy
from expface_kernels.backends.cpu import TILE_CLASSES
from expface_kernels.backends.products import TILE_ELEMENTS
from expface_kernels.functional import DEFAULT_WORKSPACE_BYTES

LARGEST_WORKSPACE = 2**63 - 1
"""Bytes: an operator's arguments are int64."""


class Ours(Peer):
    """`margin_cross_entropy`. "ours" has the default workspace, "ours@0" none, "ours@N" one of N bytes."""

    loads = ("torch._dynamo",)
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
        """A GPU's from the cost model; else exponentials kept, a tile of logits, a number a class."""
        if case.device == "cuda":
            from bench import roofline  # needs Triton, which not every system has

            return roofline.extra_bytes(case, self.workspace_bytes)
        logits = case.rows * case.taking_part
        kept = min(self.workspace_bytes, logits * case.itemsize) if case.backward else 0
        # A sample's tile of centres is copied, and so is that of their gradients.
        copied = 2 * case.features * min(case.taking_part, TILE_CLASSES[1]) if self.sample_rate != 1 else 0
        return kept + (min(TILE_ELEMENTS, logits) + case.taking_part + copied) * max(case.itemsize, 4)

    def held_bytes(self, case: Case) -> int:
        """On the CPU the workspace and the memory of w's gradient wait for the next step."""
        return 0 if case.device == "cuda" else self.extra_bytes(case) + case.gradient_bytes

    def step(self, inputs: Inputs) -> Step:
        return self._step(inputs, self.workspace_bytes)

    def partly_kept_step(self, inputs: Inputs) -> Step:
        """The step where the workspace holds no more than half of the exponentials."""
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
    """The same over a sample of the classes (`class_subset`), no gathered copy of which is made."""

    sample_rate = SAMPLE_RATE

    def __init__(self) -> None:
        super().__init__()
        self.name = "ours_sampled"

    def label(self, case: Case) -> str:
        return f"ours, {self.sample_rate:.0%} of the classes sampled ({mode(self, case)})"
