"""Each peer's loss and gradients against float64 truth: what is wrong is not timed."""

from __future__ import annotations

from torch import Tensor

from bench import peers
from bench.cases import DTYPES, Case, Inputs
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
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    assert x.grad is not None
    assert w.grad is not None
    return loss.detach(), x.grad, w.grad


def check(name: str, inputs: Inputs, wanted: tuple[Tensor, Tensor, Tensor]) -> Gate:
    """The peer's errors, |difference| / |truth|; it passes where all are within the cap of the dtype."""
    peer, limit = peers.get(name), CAPS[DTYPES[inputs.case.dtype]]
    label = peer.label(inputs.case)
    inputs.drop_gradients()
    try:
        loss = peer.step(inputs)()
    except Exception as error:  # a peer that raises has failed, whatever it raised
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:REASON_LENGTH]
        return Gate(name, label, (), limit, False, reason)
    got = (loss, inputs.x.grad, inputs.w.grad)
    if any(tensor is None or tensor.shape != want.shape for tensor, want in zip(got, wanted, strict=True)):
        return Gate(name, label, (), limit, False, "the loss or a gradient is missing or of another shape")
    errors = tuple(
        relative_error(tensor, want) for tensor, want in zip(got, wanted, strict=True) if tensor is not None
    )
    passed = all(error <= limit for error in errors)  # NaN does not pass
    return Gate(name, label, errors, limit, passed, None if passed else "its answer is wrong")
