"""Heads from pytorch-metric-learning's losses and back: the real version 2, and a stand-in for version 3."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expface_kernels import ArcFace, CosFace, ExpFace, MarginSoftmaxHead, NormFace
from expface_kernels.compat.pytorch_metric_learning import from_loss, to_loss
from tests.distributed import run_ranks
from tests.tolerances import ROUND_TRIP, assert_close

pml = pytest.importorskip("pytorch_metric_learning", exc_type=ModuleNotFoundError)
from pytorch_metric_learning import distances, losses, reducers, regularizers  # noqa: E402

B, C, D = 24, 37, 16
SIZE = {"num_classes": C, "embedding_size": D}
LOSSES = {
    "ArcFaceLoss": {"margin": 28.6, "scale": 64},
    "ArcFaceLoss wide": {"margin": 90.0, "scale": 20.0},  # half of the rows are past π − m
    "CosFaceLoss": {"margin": 0.35, "scale": 64},
    "NormalizedSoftmaxLoss": {"temperature": 0.05},
}


def make(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(3)
    return getattr(losses, name.split()[0])(**SIZE, **LOSSES[name], **options).to(dtype)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(B, D, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, C, (B,), generator=generator)


def with_gradients(loss: Any, weight: nn.Parameter, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, y = batch(dtype)
    x.requires_grad_()
    value = loss(x, y)
    value.backward()
    assert x.grad is not None
    assert weight.grad is not None
    return value, x.grad, weight.grad


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reducer", ["MeanReducer", "SumReducer"])
def test_loss_and_gradients_equal_the_librarys(name: str, reducer: str) -> None:
    theirs = make(name, reducer=getattr(reducers, reducer)())
    head = from_loss(theirs)
    assert head.target_gradient == "exact"
    value, dx, dw = with_gradients(theirs, theirs.W, torch.float64)
    ours = with_gradients(head, head.weight, torch.float64)
    for what, got, truth in zip(("loss", "dx", "dw"), ours, (value, dx, dw.T), strict=True):
        # Float64 of both sides, one over arccos: their error is the larger.
        assert_close(got, truth, dtype=torch.float64, what=what)


@pytest.mark.parametrize("name", LOSSES)
def test_in_float32_the_head_is_as_near_to_the_truth_as_the_library(name: str) -> None:
    theirs, exact = make(name, torch.float32), make(name)
    with torch.no_grad():
        exact.W.copy_(theirs.W)
    x, y = batch(torch.float32)
    head = from_loss(theirs)
    assert head.weight.dtype == torch.float32
    assert_close(head(x, y), exact(x.double(), y), eager=theirs(x, y), dtype=torch.float32, what="loss")


def test_the_wide_margin_reaches_the_boundary() -> None:
    """Or the rule past π − m would not be tested above."""
    head = from_loss(make("ArcFaceLoss wide"))
    _, stats = head(*batch(), return_stats=True)
    assert isinstance(head.margin, ArcFace)
    past = stats.target_angle > math.pi - head.margin.m
    assert 0 < past.sum() < B


def test_what_the_head_is_made_of() -> None:
    head = from_loss(make("ArcFaceLoss"))
    assert isinstance(head.margin, ArcFace)
    assert head.margin.boundary == "monotonic"
    assert head.margin.m == pytest.approx(math.radians(28.6))
    assert (head.scale, head.num_classes, head.embedding_size) == (64.0, C, D)
    assert from_loss(make("NormalizedSoftmaxLoss")).scale == pytest.approx(20.0)
    theirs = make("CosFaceLoss")
    head = from_loss(theirs, target_gradient="detached", backend="reference", margin=ExpFace(0.6))
    assert (head.target_gradient, head.backend) == ("detached", "reference")
    assert isinstance(head.margin, ExpFace)
    with torch.no_grad():
        head.weight.zero_()
    assert theirs.W.any()  # a copy
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperature'"):
        from_loss(theirs, temperature=0.05)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_back_again(name: str, reduction: str) -> None:
    head = from_loss(make(name), reduction=reduction)
    with torch.no_grad():
        head.weight.mul_(torch.linspace(0.5, 2, D))  # as if trained
    made = to_loss(head)
    assert type(made).__name__ == name.split()[0]
    assert made.W.dtype == torch.float64
    assert torch.equal(made.W.T, head.weight)
    assert_close(made(*batch()), head(*batch()), dtype=torch.float64)
    again = from_loss(made)
    assert again.scale == pytest.approx(head.scale, rel=ROUND_TRIP)
    assert vars(again.margin) == vars(head.margin)
    assert again.reduction == reduction


def test_writing_into_a_loss_changes_that_loss() -> None:
    theirs = make("ArcFaceLoss")
    parameter = theirs.W
    head = from_loss(theirs)
    head.scale, head.margin = 32.0, ArcFace(0.3, boundary="monotonic")
    with torch.no_grad():
        head.weight.add_(1.0)
    assert to_loss(head, into=theirs) is theirs
    assert theirs.W is parameter
    assert (theirs.scale, theirs.margin) == (32.0, 0.3)
    assert_close(theirs(*batch()), head(*batch()), dtype=torch.float64)


def a_group_of_one(group: Any) -> tuple[Any, Tensor]:
    head = from_loss(make("CosFaceLoss"), process_group=group)
    return to_loss(head).W.detach(), head.local_weight.detach()


def test_a_head_of_a_group_of_one_rank_has_all_classes() -> None:
    centres, right = run_ranks(1, a_group_of_one)[0]
    assert torch.equal(centres.T, right)


class CosineSimilarity:
    """Version 3's, by name."""


class MeanReducer:
    """Version 3's, by name."""


class Version3(nn.Module):
    """What version 3 is known by: `weight` (C, D), radians, and the parts that a head must look at."""

    def __init__(self, **numbers: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(C, D, generator=generator, dtype=torch.float64))
        self.num_classes, self.embedding_size = C, D
        self.distance, self.reducer = CosineSimilarity(), MeanReducer()
        self.weight_regularizer = self.embedding_regularizer = None
        for name, value in numbers.items():
            setattr(self, name, value)


def version3(name: str, **numbers: Any) -> Any:
    return type(name, (Version3,), {})(**numbers)


V3 = {
    "ArcFaceLoss": ({"margin": 0.5, "scale": 64}, {"margin": math.degrees(0.5), "scale": 64}),
    "CosFaceLoss": ({"margin": 0.2, "scale": 30}, {"margin": 0.2, "scale": 30}),
    "NormalizedSoftmaxLoss": ({"temperature": 0.1}, {"temperature": 0.1}),
}


@pytest.mark.parametrize("name", V3)
def test_version_3_is_read_by_its_attributes(name: str) -> None:
    """The same loss in version 2 says what the value must be."""
    numbers, in_version_2 = V3[name]
    theirs = version3(name, **numbers)
    older = getattr(losses, name)(**SIZE, **in_version_2).double()
    with torch.no_grad():
        older.W.copy_(theirs.weight.T)
    head = from_loss(theirs)
    assert torch.equal(head.weight, theirs.weight)
    assert_close(head(*batch()), older(*batch()), dtype=torch.float64)

    head.scale = 8.0
    with torch.no_grad():
        head.weight.add_(1.0)
    to_loss(head, into=theirs)
    assert torch.equal(theirs.weight, head.weight)
    assert from_loss(theirs).scale == pytest.approx(8.0)


def test_a_plain_dot_product_of_version_3_is_refused() -> None:
    loss = version3("NormalizedSoftmaxLoss", temperature=0.1)
    loss.distance = type("DotProductSimilarity", (), {"normalize_embeddings": False})()
    with pytest.raises(
        ValueError, match="expected the cosine as its distance, got DotProductSimilarity with"
    ):
        from_loss(loss)


class MyArcFaceLoss(losses.ArcFaceLoss):
    """A user's own, which may compute anything."""


REFUSED = {
    "sphereface": (
        lambda: losses.SphereFaceLoss(**SIZE),
        "whole number and multiplies the logits by the emb",
    ),
    "large margin": (
        lambda: losses.LargeMarginSoftmaxLoss(**SIZE),
        "got LargeMarginSoftmaxLoss; pass one of",
    ),
    "sub-centres": (lambda: losses.SubCenterArcFaceLoss(**SIZE), "several centres a class"),
    "pairs": (losses.TripletMarginLoss, "expected ArcFaceLoss, CosFaceLoss, NormalizedSoftmaxLoss"),
    "subclass": (lambda: MyArcFaceLoss(**SIZE), "got MyArcFaceLoss; pass one of these, or build MarginSoft"),
    "weight regularizer": (
        lambda: losses.CosFaceLoss(**SIZE, weight_regularizer=regularizers.LpRegularizer()),
        "expected no weight_regularizer, which a head does not have, got LpRegularizer",
    ),
    "embedding regularizer": (
        lambda: losses.CosFaceLoss(**SIZE, embedding_regularizer=regularizers.LpRegularizer()),
        "expected no embedding_regularizer",
    ),
    "reducer": (
        lambda: losses.CosFaceLoss(**SIZE, reducer=reducers.ThresholdReducer(low=0)),
        "expected one of the reducers MeanReducer, SumReducer, got ThresholdReducer",
    ),
    "no normalisation": (
        lambda: losses.NormalizedSoftmaxLoss(
            **SIZE, distance=distances.DotProductSimilarity(normalize_embeddings=False)
        ),
        "got DotProductSimilarity with another normalize_embeddings",
    ),
    "distance": (
        lambda: losses.NormalizedSoftmaxLoss(**SIZE, distance=distances.LpDistance()),
        "got LpDistance with another class",
    ),
    "power": (
        lambda: losses.CosFaceLoss(**SIZE, distance=distances.CosineSimilarity(power=2)),
        "got CosineSimilarity with another power",
    ),
    "module": (lambda: nn.Linear(D, C), "got Linear; pass one of these"),
}


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_what_a_head_is_not_is_refused(case: str) -> None:
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        from_loss(build())


def head_of(margin: Any, **options: Any) -> MarginSoftmaxHead:
    return MarginSoftmaxHead(D, C, margin, **({"target_gradient": "exact"} | options))


REFUSED_HEADS = {
    "detached": (lambda: head_of(CosFace(), target_gradient="detached"), "expected target_gradient 'exact'"),
    "none": (lambda: head_of(CosFace(), reduction="none"), "expected reduction 'mean' or 'sum', got 'none'"),
    "boundary": (lambda: head_of(ArcFace()), "expected ArcFace with boundary 'monotonic'"),
    "expface": (lambda: head_of(ExpFace()), "expected ArcFace, CosFace or NormFace, .* got ExpFace"),
    "per row": (lambda: head_of(CosFace(torch.full((B,), 0.3))), "expected a margin with one float m"),
}


@pytest.mark.parametrize("case", REFUSED_HEADS)
def test_what_the_library_has_not_is_refused(case: str) -> None:
    build, message = REFUSED_HEADS[case]
    with pytest.raises(ValueError, match=f"head: {message}"):
        to_loss(build())


def test_what_is_no_head_is_refused_by_its_type() -> None:
    no_head: Any
    for no_head, name in ((3, "int"), (nn.Linear(D, C), "Linear")):
        with pytest.raises(TypeError, match=f"^head: expected a MarginSoftmaxHead, got {name}$"):
            to_loss(no_head)


def test_a_loss_that_does_not_fit_is_left_alone() -> None:
    head = head_of(NormFace(), dtype=torch.float64)
    wrong = {
        "into: expected NormalizedSoftmaxLoss for NormFace": make("CosFaceLoss"),
        r"into: expected \(37, 16\) centres as in head, got \(5, 16\)": losses.NormalizedSoftmaxLoss(5, D),
        "into: expected torch.float64 as in head, got torch.float32": losses.NormalizedSoftmaxLoss(C, D),
        "into: expected a reducer for 'mean', got 'sum'": losses.NormalizedSoftmaxLoss(
            C, D, reducer=reducers.SumReducer()
        ),
        "expected the attribute 'temperature', got a loss without it": version3("NormalizedSoftmaxLoss"),
        r"expected centres in `W` \(D, C\)": version3("NormalizedSoftmaxLoss", weight=None),
    }
    for message, into in wrong.items():
        before = {name: value.clone() for name, value in into.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            to_loss(head, into=into)
        assert all(torch.equal(value, before[name]) for name, value in into.state_dict().items())


def test_the_library_is_imported_only_when_a_loss_is_made() -> None:
    code = (
        "import sys, expface_kernels.compat.pytorch_metric_learning as bridge\n"
        "assert 'pytorch_metric_learning' not in sys.modules\n"
        "sys.modules['pytorch_metric_learning'] = None\n"
        "from expface_kernels import MarginSoftmaxHead, NormFace\n"
        "try: bridge.to_loss(MarginSoftmaxHead(4, 5, NormFace(), target_gradient='exact'))\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("to_loss needs pytorch-metric-learning, or a loss to write into")
