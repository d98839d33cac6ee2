"""What peers declare, and that those of libraries which only run on a GPU call them rightly.

B rows · C classes · D features
"""

from __future__ import annotations

import dataclasses
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import machine, peers
from bench.cases import DEVICES, Case
from bench.gate import check_all
from bench.peers import libraries, supported_case
from bench.peers.libraries import MetricLearning
from expface_kernels.margins import TARGET_GRADIENTS

CASE = Case(rows=16, classes=100, features=32)
HALF = dataclasses.replace(CASE, autocast="bfloat16")
HUGE = Case(rows=1000, classes=10**12, features=4)
LIBRARIES = ("pml_arcface", "pml_cosface", "torch_linear", "torch_linear_chunked", "torch_linear_auto")
SAMPLING = ("ours_sampled", "partial_fc")
GPU_PEERS = {"cce": "cut-cross-entropy", "cce_exact": "cut-cross-entropy", "liger": "liger-kernel"}


def test_supported_cases_keep_what_a_peer_can_do_and_change_the_rest() -> None:
    case = dataclasses.replace(CASE, margin="arcface", target_gradient="detached")
    assert supported_case(peers.get("eager"), case) == case
    own = supported_case(peers.get("pml_arcface"), case)
    assert (own.margin, own.target_gradient) == ("arcface", "exact")
    assert supported_case(peers.get("pml_cosface"), case).margin == "cosface"
    assert supported_case(peers.get("torch_linear"), case) == dataclasses.replace(case, margin="normface")


@pytest.mark.parametrize("margin", ["expface", "normface"])
@pytest.mark.parametrize("target_gradient", TARGET_GRADIENTS)
def test_libraries_agree_with_truth_as_they_support_it(margin: str, target_gradient: str) -> None:
    case = dataclasses.replace(CASE, margin=margin, target_gradient=target_gradient)
    able = [name for name in LIBRARIES if peers.get(name).why_not(case) is None]
    assert "torch_linear" in able
    for gate in check_all(able, case):
        assert gate.passed, gate
        assert len(gate.errors) == 3


@pytest.mark.parametrize("name", [*LIBRARIES, *SAMPLING, "ours", "eager"])
def test_a_forward_alone_makes_no_gradient_and_its_loss_is_right(name: str) -> None:
    case = dataclasses.replace(CASE, backward=False)
    (gate,) = check_all([name], case)
    assert gate.passed, gate
    assert len(gate.errors) == 1
    inputs = case.inputs()
    loss = peers.get(name).step(inputs.of(supported_case(peers.get(name), case)))()
    assert not loss.requires_grad
    assert inputs.x.grad is None
    assert inputs.w.grad is None


@pytest.mark.parametrize("target_gradient", TARGET_GRADIENTS)
@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_peers_agree_with_the_truth_of_the_sample(name: str, target_gradient: str) -> None:
    case = Case(rows=8, classes=400, features=32, target_gradient=target_gradient)
    (gate,) = check_all([name], case)
    assert gate.passed, gate
    assert "10%" in gate.label
    assert peers.baseline(name) == "partial_fc"
    own = supported_case(peers.get(name), case)
    assert own.taking_part == 40
    inputs = case.inputs()
    subset = inputs.of(own).subset()
    assert subset is not None
    peers.get(name).step(inputs.of(own))()
    assert inputs.w.grad is not None
    assert torch.equal(inputs.w.grad.abs().sum(1).nonzero()[:, 0], subset)


def test_a_sample_holds_the_labels_is_sorted_and_the_same_again() -> None:
    case = Case(rows=30, classes=200, features=4, sample_rate=0.2)
    first, again = case.inputs(), case.inputs()
    subset, same = first.subset(), again.subset()
    assert subset is not None
    assert same is not None
    assert torch.equal(subset, same)
    assert subset.shape == (40,)
    assert torch.equal(subset.unique(), subset)
    assert torch.isin(first.labels, subset).all()
    assert dataclasses.replace(case, sample_rate=0.01).taking_part == 30
    assert CASE.inputs().subset() is None


def test_a_library_that_owns_its_centres_keeps_no_gradient_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    peer, made, inputs = peers.get("pml_arcface"), list[Any](), CASE.inputs()
    assert isinstance(peer, MetricLearning)
    make = peer._loss

    def recorded(case: Case) -> Any:
        made.append(make(case))
        return made[-1]

    monkeypatch.setattr(peer, "_loss", recorded)
    step = peer.step(inputs)
    step()
    first = inputs.w.grad
    assert made[0].W.grad is None
    inputs.drop_gradients()
    step()
    torch.testing.assert_close(inputs.w.grad, first)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    on_gpu = dataclasses.replace(HALF, device="cuda")
    for name, package in {**GPU_PEERS, "pml_arcface": "pytorch-metric-learning"}.items():
        assert peers.get(name).why_not(on_gpu) == f"{package} is not installed"
        assert package in peers.get(name).label(on_gpu)
    for name in GPU_PEERS:
        assert peers.get(name).why_not(HALF) == "it runs on a GPU only"


def test_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu_unavailable", lambda: None)
    monkeypatch.setattr(machine, "available_bytes", lambda device: 10**10 if device == "cuda" else 10**15)
    eager = peers.get("eager")
    case = Case(1024, 1_000_000, 512, device="cuda", autocast="bfloat16")
    assert "of the 10 GB" in str(eager.why_not(case))
    assert eager.why_not(dataclasses.replace(case, classes=100_000)) is None
    assert eager.why_not(dataclasses.replace(case, device="cpu")) is None
    monkeypatch.setattr(machine, "gpu_unavailable", lambda: "there is no GPU")
    assert eager.why_not(case) == "there is no GPU"


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A library that is not here, by what the peer calls of it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        made = ModuleType(".".join(parts[:i]))
        made.__spec__ = ModuleSpec(made.__name__, None)
        monkeypatch.setitem(sys.modules, made.__name__, made)
    for attribute, value in contents.items():
        setattr(sys.modules[name], attribute, value)


def _everywhere(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(type(peers.get(name)), "devices", DEVICES)


def _loss(rows: Tensor, centres: Tensor, labels: Tensor) -> Tensor:
    assert rows.dtype == centres.dtype == torch.bfloat16
    return F.cross_entropy(rows.float() @ centres.float().T, labels)


@pytest.mark.parametrize("name", ["cce", "cce_exact"])
def test_cut_cross_entropy_is_fed_normalized_16_bit_operands(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def linear_cross_entropy(e: Tensor, c: Tensor, targets: Tensor, impl: str) -> Tensor:
        asked.append(impl)
        return _loss(e, c, targets)

    _module(monkeypatch, "cut_cross_entropy", linear_cross_entropy=linear_cross_entropy)
    assert peers.get(name).why_not(HALF) == "it runs on a GPU only"
    _everywhere(monkeypatch, name)
    assert "float32" in str(peers.get(name).why_not(CASE))
    assert peers.get(name).why_not(HALF) is None
    (gate,) = check_all([name], HALF)
    assert gate.passed, gate
    assert asked == [name]
    assert name in gate.label


class OldLiger(torch.autograd.Function):
    """As releases without a chunk's budget have it: both gradients are formed in the forward."""

    @staticmethod
    def forward(
        ctx: Any, _input: Tensor, weight: Tensor, target: Tensor, bias: Any = None, reduction: str = "mean"
    ) -> Tensor:
        assert (bias, reduction) == (None, "mean")
        rows, centres = (t.detach().requires_grad_() for t in (_input, weight))
        with torch.enable_grad():
            loss = _loss(rows, centres, target)
        ctx.save_for_backward(*torch.autograd.grad(loss, (rows, centres)))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        dx, dw = ctx.saved_tensors
        return g * dx, g * dw, None, None, None


class NewLiger(OldLiger):
    """As later ones: more arguments, more results."""

    factor = None

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, _input: Tensor, weight: Tensor, target: Tensor, accum_dtype: Any = None,
        chunk_mem_const: int = 1,
    ) -> tuple[Tensor, None]:  # fmt: skip
        assert accum_dtype == torch.float32
        NewLiger.factor = chunk_mem_const
        return OldLiger.forward(ctx, _input, weight, target), None

    @staticmethod
    def backward(ctx: Any, g: Tensor, *none: Any) -> tuple[Any, ...]:
        return OldLiger.backward(ctx, g)


@pytest.mark.parametrize("function", [OldLiger, NewLiger])
def test_liger_is_called_by_the_names_that_its_release_has(
    function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _module(monkeypatch, libraries.LIGER_MODULE, **{libraries.LIGER_FUNCTION: function})
    _everywhere(monkeypatch, "liger")
    assert peers.get("liger").why_not(HALF) is None
    (gate,) = check_all(["liger"], HALF)
    assert gate.passed, gate
    if function is NewLiger:
        assert NewLiger.factor == libraries.budget_factor(HALF) > 1
