"""A partial-FC step as users have it in one process: some classes, their centres gathered, the eager head.

B rows · C classes · D features · S classes that take part
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import Case, Inputs
from bench.peers import eager
from bench.peers.base import Peer, Step, mode, step_of

SAMPLE_RATE = 0.1


class PartialFC(Peer):
    """Which classes take part is drawn before the step, for this peer and ours alike."""

    name = "partial_fc"
    sample_rate = SAMPLE_RATE

    def label(self, case: Case) -> str:
        return f"eager partial-FC step, {self.sample_rate:.0%} of the classes sampled ({mode(self, case)})"

    def extra_bytes(self, case: Case) -> int:
        """The eager head's over S classes, and their centres gathered, with that copy's gradient.

        At measured times less: what index_select's backward does not write of w's gradient is never resident.
        """
        gathered = 2 * case.taking_part * case.features * max(case.itemsize, 4)
        return eager.extra_bytes(case) + gathered

    def step(self, inputs: Inputs) -> Step:
        case, margin = inputs.case, inputs.case.margin_function()
        subset = inputs.subset()
        assert subset is not None
        places = torch.searchsorted(subset, inputs.labels)

        def forward() -> Tensor:
            centres = inputs.w.index_select(0, subset)
            return eager.margin_loss(inputs.x, centres, places, margin, case.scale, case.target_gradient)

        return step_of(case, forward)
