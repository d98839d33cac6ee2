"""What a peer is: a loss head that steps over a case's inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from bench import machine
from bench.cases import Case, Inputs

Step = Callable[[], Tensor]
# Of the free memory: needs are estimates, and whoever else is on the machine wants some too.
USABLE = 0.75


class Peer(Protocol):
    """A loss head to be measured. `name` is what `--peers` calls it."""

    name: str
    compiles: bool
    """Its first step at a new shape compiles. Such a peer keeps no buffers from one step to the next."""

    def label(self, case: Case) -> str:
        """What tables call it, with the gradient mode."""

    def why_not(self, case: Case) -> str | None:
        """Why it cannot run this case here; None where it can."""

    def step(self, inputs: Inputs) -> Step:
        """A function that goes forward and backward, fills x.grad and w.grad and returns the loss ().

        What does not belong into every step is done before it returns.
        """


def memory_reason(case: Case, extra_bytes: int) -> str | None:
    """Why a case does not fit, for a peer that needs about `extra_bytes` beside inputs and gradients."""
    need = 2 * case.gradient_bytes + extra_bytes
    free = machine.available_bytes()
    if free is None or need <= USABLE * free:
        return None
    return f"needs about {need / 1e9:.3g} GB, more than {USABLE:.0%} of the {free / 1e9:.3g} GB that are free"
