"""Each peer's loss and gradients against float64 truth: what is wrong is not timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor

from bench import peers
from bench.cases import Case, Inputs
from bench.peers.base import Peer, terms
from bench.result import Gate
from expface_kernels import reference
from tests.tolerances import CAPS, ROUNDED_COSINES, relative_error

GATE_ROWS, GATE_CLASSES = 64, 2000
REASON_LENGTH = 300  # characters
ROUNDED = "ok, for cosines of 16 bits"


def gate_case(case: Case) -> Case:
    """The case at a size whose truth takes a moment."""
    return case.at_most(GATE_ROWS, GATE_CLASSES)


def truth(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (), dx (B, D), dw (C, D)), float64, by the reference."""
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


def in_terms_of(name: str, inputs: Inputs) -> Inputs:
    """The same tensors with the case in the peer's own terms (`bench.peers.base.terms`)."""
    return inputs.of(terms(peers.get(name), inputs.case))


def check_all(
    names: Sequence[str], case: Case, advance: Callable[[], None] = lambda: None
) -> tuple[Gate, ...]:
    """Each peer against truth in its own terms, at the case's size."""
    inputs = case.inputs()
    truths: dict[Case, tuple[Tensor, Tensor, Tensor]] = {}
    gates = []
    for name in names:
        own = in_terms_of(name, inputs)
        if own.case not in truths:
            truths[own.case] = truth(own)
        gates.append(check(name, own, truths[own.case]))
        advance()
    return tuple(gates)


def check(name: str, inputs: Inputs, wanted: tuple[Tensor, ...]) -> Gate:
    """The peer's errors, |difference| / |truth|; it passes within its limit.

    Of a forward alone only the loss is compared.
    """
    case, peer = inputs.case, peers.get(name)
    limit = limit_of(peer, case)
    gate = Gate(name, peer.label(case), (), limit, False, None, case.backward, case.dtype)
    inputs.drop_gradients()
    try:
        loss = peer.step(inputs)()
    except Exception as error:  # a peer that raises has failed, whatever it raised
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:REASON_LENGTH]
        return dataclasses.replace(gate, reason=reason)
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


def limit_of(peer: Peer, case: Case) -> float:
    """The cap of the product's dtype; for a peer that rounds its cosines to 16 bits, what that costs.

    Such a one is the baseline that people have: it is measured, and its error stands beside its time.
    """
    cap = CAPS[case.product_dtype]
    return max(cap, ROUNDED_COSINES) if peer.rounds_cosines and case.product_dtype.itemsize == 2 else cap
