"""Holds each peer's loss and gradients against float64 truth: what is wrong is not timed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from bench import peers
from bench.cases import Case, Inputs
from bench.peers import supported_case
from bench.peers.base import Peer, Step, in_a_line
from bench.peers.heads import Ours
from bench.records import Gate
from expface_kernels import reference
from expface_kernels.testing import relative_error
from expface_kernels.testing.policy import CAPS

GATE_ROWS, GATE_CLASSES = 64, 2000
# More classes than two tiles of ours at GATE_ROWS rows (expface_kernels.backends.cpu.TILE_CLASSES), of few
# features, on which no tile depends much.
TILED_CLASSES, TILED_FEATURES = 80_000, 64
# Of a head that samples the classes: its sample has to have several tiles as well.
TILED_SAMPLE_RATE = 0.9
# Relative, of gradients of a baseline with 16-bit cosines, at s = 64: rounding moves one logit by up to 0.13.
ROUNDED_COSINES = 5e-2
ROUNDED = "ok, for cosines of 16 bits"


def gate_case(case: Case) -> Case:
    """Shrink the case to a size whose truth takes a moment."""
    return case.at_most(GATE_ROWS, GATE_CLASSES)


def tiled_case(case: Case) -> Case | None:
    """Return the case where ours walks several tiles; None where it has no more classes than `gate_case`."""
    if case.classes <= GATE_CLASSES:
        return None
    small = case.at_most(GATE_ROWS, TILED_CLASSES)
    return dataclasses.replace(small, features=min(case.features, TILED_FEATURES))


def truth(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss (), dx (B, D), dw (C, D)) of the reference in float64."""
    case = inputs.case
    x, w = (leaf.detach().double().requires_grad_() for leaf in (inputs.x, inputs.w))
    loss = reference.margin_cross_entropy(
        x,
        w,
        inputs.labels,
        case.margin_function(),
        scale=case.scale,
        target_gradient=case.target_gradient,
        class_subset=inputs.subset(),
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    assert x.grad is not None
    assert w.grad is not None
    return loss.detach(), x.grad, w.grad


def inputs_for(name: str, inputs: Inputs) -> Inputs:
    """Return the same tensors with the case that the peer supports."""
    return inputs.of(supported_case(peers.get(name), inputs.case))


class Truths:
    """Computes the truth of a case as a peer supports it, once for all peers that support the same."""

    def __init__(self, case: Case) -> None:
        self._inputs = case.inputs()
        self._known: dict[Case, tuple[Tensor, Tensor, Tensor]] = {}

    def of(self, name: str, least_rate: float = 0.0) -> tuple[Inputs, tuple[Tensor, Tensor, Tensor]]:
        """Return inputs and truth; a peer that samples takes no less than this share of the classes."""
        own = inputs_for(name, self._inputs)
        own = own.of(dataclasses.replace(own.case, sample_rate=max(own.case.sample_rate, least_rate)))
        if own.case not in self._known:
            self._known[own.case] = truth(own)
        return own, self._known[own.case]


def check_all(names: Sequence[str], case: Case, *, tiled: Case | None = None) -> tuple[Gate, ...]:
    """Check each peer against the truth of what it supports, at the case's size; ours at that of `tiled` too.

    There ours caches a part of its exponentials at most, so that tiles that are cached and others are met.
    """
    small = Truths(case)
    large = None if tiled is None else Truths(tiled)
    gates = []
    for name in names:
        gate, peer = check(name, *small.of(name)), peers.get(name)
        if large is not None and gate.passed and isinstance(peer, Ours):
            again = check(name, *large.of(name, TILED_SAMPLE_RATE), peer.partly_kept_step)
            gate = _worse(gate, again)
        gates.append(gate)
    return tuple(gates)


def _worse(gate: Gate, tiled: Gate) -> Gate:
    """Combine two gates of a peer that passed the first: each error the larger one, the second's verdict."""
    if not tiled.passed:
        return dataclasses.replace(
            gate, errors=tiled.errors, passed=False, reason=f"{tiled.reason}, over several tiles"
        )
    errors = tuple(map(max, gate.errors, tiled.errors))
    return dataclasses.replace(gate, errors=errors, note=gate.note or tiled.note)


def check(
    name: str, inputs: Inputs, wanted: tuple[Tensor, ...], step_of: Callable[[Inputs], Step] | None = None
) -> Gate:
    """Measure the peer's errors, |difference| / |truth|; it passes within its limit.

    Of a forward alone only the loss is compared. `step_of` makes its step, where that is not `peer.step`.
    """
    case, peer = inputs.case, peers.get(name)
    limit = limit_of(peer, case)
    gate = Gate(name, peer.label(case), (), limit, False, backward=case.backward, dtype=case.dtype)
    inputs.drop_gradients()
    try:
        loss = (step_of or peer.step)(inputs)()
    except Exception as error:  # a peer that raises has failed, whatever it raised
        return dataclasses.replace(gate, reason=in_a_line(error))
    got: tuple[Tensor | None, ...] = (loss, inputs.x.grad, inputs.w.grad)
    if not case.backward:
        got, wanted = got[:1], wanted[:1]
    if any(tensor is None or tensor.shape != want.shape for tensor, want in zip(got, wanted, strict=True)):
        return dataclasses.replace(gate, reason="the loss or a gradient is missing or of another shape")
    errors = tuple(
        relative_error(tensor, want) for tensor, want in zip(got, wanted, strict=True) if tensor is not None
    )
    if not all(error <= limit for error in errors):  # NaN does not pass
        return dataclasses.replace(gate, errors=errors, reason="its answer is wrong")
    note = ROUNDED if max(errors) > CAPS[case.product_dtype] else None
    return dataclasses.replace(gate, errors=errors, passed=True, note=note)


def disagreeing_losses(losses: Mapping[str, tuple[Case, float]]) -> dict[str, str]:
    """Find peers whose loss fewer than half of the others with the same case have, and say what is wrong.

    losses: by peer, its case and its loss on the same tensors. At the size that is timed, truth would take
    too long; what passed the gate at a smaller one may still fail at this one.
    """
    odd = {}
    for name, (case, loss) in losses.items():
        limit = limit_of(peers.get(name), case)
        others = [other for peer, (its, other) in losses.items() if peer != name and its == case]
        near = sum(abs(loss - other) <= 2 * limit * abs(other) for other in others)
        if not math.isfinite(loss) or (others and 2 * near < len(others)):
            odd[name] = f"its loss at this size is {loss:.6g}, the others' is {_listed(others)}"
    return odd


def _listed(losses: Sequence[float]) -> str:
    return ", ".join(f"{loss:.6g}" for loss in losses) or "not there to compare"


def limit_of(peer: Peer, case: Case) -> float:
    """Return the cap of the product's dtype; for a peer that rounds its cosines to 16 bits, what that costs.

    Such a peer is the baseline that people have: it is measured, and its error stands beside its time.
    """
    cap = CAPS[case.product_dtype]
    return max(cap, ROUNDED_COSINES) if peer.rounds_cosines and case.product_dtype.itemsize == 2 else cap
