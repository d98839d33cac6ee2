"""pytorch-metric-learning's ArcFaceLoss and CosFaceLoss, as they come. Their centres are (D, C)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bench.cases import DTYPES, Case, Inputs
from bench.peers import eager
from bench.peers.base import Peer, Step, mode, not_installed, step_of
from expface_kernels.machine import version_of
from expface_kernels.margin_spec import MARGINS

PACKAGE = "pytorch-metric-learning"


class MetricLearning(Peer):
    """One of its losses, at the default strength of ours; its gradient is that of the value, "exact"."""

    gradients = ("exact",)
    loads = ("pytorch_metric_learning.losses",)

    def __init__(self, margin: str, loss: str) -> None:
        self.name = f"pml_{margin}"
        self.margins = (margin,)
        self.loss = loss

    def label(self, case: Case) -> str:
        version = version_of(PACKAGE)
        return f"{PACKAGE} {version} {self.loss} ({mode(self, case)})"

    def missing(self, case: Case) -> str | None:
        return not_installed("pytorch_metric_learning", PACKAGE)

    def extra_bytes(self, case: Case) -> int:
        if case.backward:
            return eager.extra_bytes(case)
        logits, centres = case.rows * case.classes, case.classes * case.features
        return int(max(4.4 * logits, centres + 2 * logits)) * max(case.itemsize, 4)

    def needed_bytes(self, case: Case) -> int:
        return super().needed_bytes(case) + self.held_bytes(case)

    def held_bytes(self, case: Case) -> int:
        """Its own copy of the centres."""
        return case.classes * case.features * case.itemsize

    def step(self, inputs: Inputs) -> Step:
        case = inputs.case
        loss = self._loss(case)
        # Its own layout, made once: a user's centres are stored so.
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
        # With no classes at first: its own initialisation of the centres would take longer than the step.
        made = getattr(losses, self.loss)(1, case.features, margin=m, scale=case.scale)
        made.num_classes = case.classes
        return made.to(device=torch.device(case.device), dtype=DTYPES[case.dtype])
