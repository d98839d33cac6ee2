"""Each peer's loss and gradients against float64 truth: what is wrong is not timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from bench import peers
from bench.cases import Case, Inputs
from bench.peers.base import terms
from bench.result import Gate
from expface_kernels import reference
from tests.tolerances import CAPS, relative_error

GATE_ROWS, GATE_CLASSES = 64, 2000
REASON_LENGTH = 300  # characters


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
    """The peer's errors, |difference| / |truth|; it passes within the cap of the product's dtype.

    Of a forward alone only the loss is compared.
    """
    peer, limit = peers.get(name), CAPS[inputs.case.product_dtype]
    label = peer.label(inputs.case)
    inputs.drop_gradients()
    try:
        loss = peer.step(inputs)()
    except Exception as error:  # a peer that raises has failed, whatever it raised
        reason: str | None = " ".join(f"{type(error).__name__}: {error}".split())[:REASON_LENGTH]
        return Gate(name, label, (), limit, False, reason, inputs.case.backward, inputs.case.dtype)
    got: tuple[Tensor | None, ...] = (loss, inputs.x.grad, inputs.w.grad)
    if not inputs.case.backward:
        got, wanted = got[:1], wanted[:1]
    if any(tensor is None or tensor.shape != want.shape for tensor, want in zip(got, wanted, strict=True)):
        reason = "the loss or a gradient is missing or of another shape"
        return Gate(name, label, (), limit, False, reason, inputs.case.backward, inputs.case.dtype)
    errors = tuple(
        relative_error(tensor, want) for tensor, want in zip(got, wanted, strict=True) if tensor is not None
    )
    passed = all(error <= limit for error in errors)  # NaN does not pass
    reason = None if passed else "its answer is wrong"
    return Gate(name, label, errors, limit, passed, reason, inputs.case.backward, inputs.case.dtype)
