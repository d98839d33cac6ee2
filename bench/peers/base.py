"""A peer is a loss head that steps over a case's inputs and declares what it can do and what it needs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from bench import machine
from bench.cases import AUTOCASTS, DEVICES, Case, Inputs
from expface_kernels.margin_spec import MARGINS
from expface_kernels.margins import TARGET_GRADIENTS

Step = Callable[[], Tensor]
# Of the free memory: needs are estimates, and whoever else is on the machine wants some too.
USABLE = {"cpu": 0.75, "cuda": 0.92}
NO_MARGIN: tuple[str, ...] = ("normface",)
GPU_ONLY: tuple[str, ...] = ("cuda",)
ERROR_LENGTH = 300  # characters


class Peer(ABC):
    """A loss head to be measured. `name` is what `--peers` calls it."""

    name: str
    compiles: bool = False
    """Its first step at a new shape compiles."""
    devices: tuple[str, ...] = DEVICES
    margins: tuple[str, ...] = tuple(MARGINS)
    """Names of expface_kernels.margin_spec.MARGINS that it can do, its own first."""
    gradients: tuple[str, ...] = TARGET_GRADIENTS
    """The target gradients that it can do."""
    sample_rate: float = 1.0
    """The share of the classes that take part in its step."""
    rounds_cosines: bool = True
    """Where products are 16 bit, so are its cosines, or the unit rows and centers that they come from."""

    @abstractmethod
    def label(self, case: Case) -> str:
        """Name it for tables, with the gradient mode, and version and chunk size of a library."""

    @abstractmethod
    def extra_bytes(self, case: Case) -> int:
        """Estimate what it holds at its peak, beside inputs and gradients."""

    @abstractmethod
    def step(self, inputs: Inputs) -> Step:
        """Make a function that goes forward and, if the case wants it, backward, and returns the loss ().

        It fills x.grad and w.grad. What does not belong into every step is done before it returns.
        `inputs.case` is a case that it supports.
        """

    def missing(self, case: Case) -> str | None:
        """Name what it lacks here for this case: a library, a compiler, a dtype; None for nothing."""
        return None

    def held_bytes(self, case: Case) -> int:
        """Estimate what it keeps from one step to the next."""
        return 0

    def unavailable(self, case: Case) -> str | None:
        """Say why it cannot run this case here, memory apart; None where it can."""
        if case.device not in self.devices:
            return (
                "it runs on a GPU only" if self.devices == GPU_ONLY else f"it does not run on {case.device}"
            )
        return self.missing(case) or (machine.gpu_unavailable() if case.device == "cuda" else None)

    def needed_bytes(self, case: Case) -> int:
        """Estimate inputs, gradients and what it holds beside them at its peak."""
        return case.input_bytes + case.gradient_bytes + self.extra_bytes(case)

    def why_not(self, case: Case) -> str | None:
        """Say why it cannot run this case here, memory included; None where it can."""
        return self.unavailable(case) or no_room(self.needed_bytes(case), case.device)


def supported_case(peer: Peer, case: Case) -> Case:
    """Return the case as this peer can do it: of the same sizes, with its own margin, gradient and sampling.

    Truth is taken for that case. Time and memory hardly depend on margin and target gradient, which concern
    B numbers of a step; sampling is another mode, and a label says so.
    """
    return dataclasses.replace(
        case,
        margin=case.margin if case.margin in peer.margins else peer.margins[0],
        target_gradient=case.target_gradient if case.target_gradient in peer.gradients else peer.gradients[0],
        sample_rate=peer.sample_rate,
    )


def mode(peer: Peer, case: Case) -> str:
    """Return the part of a label that says what is computed: the target gradient, or "no margin"."""
    return "no margin" if peer.margins == NO_MARGIN else supported_case(peer, case).target_gradient


def no_room(needed_bytes: int, device: str) -> str | None:
    """Say why so much does not fit on the device; None where it does or cannot be told."""
    free, usable = machine.available_bytes(device), USABLE[device]
    if free is None or needed_bytes <= usable * free:
        return None
    return (
        f"needs about {needed_bytes / 1e9:.3g} GB, more than {usable:.0%} of the {free / 1e9:.3g} GB that "
        "are free"
    )


def not_installed(module: str, package: str) -> str | None:
    """Say why a library cannot be used, as far as it shows without importing it."""
    return None if importlib.util.find_spec(module) else f"{package} is not installed"


def autocast(case: Case) -> AbstractContextManager[object]:
    """Return the context that stands around a forward."""
    if case.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(case.device, AUTOCASTS[case.autocast])


def step_of(case: Case, forward: Callable[[], Tensor]) -> Step:
    """Make a step of a forward, under autocast if the case wants it, and a backward outside it."""

    def step() -> Tensor:
        with torch.set_grad_enabled(case.backward), autocast(case):
            loss = forward()
        if case.backward:
            loss.backward()
        return loss

    return step


def in_a_line(error: Exception) -> str:
    """Shorten what was raised to the line that results keep."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:ERROR_LENGTH]
