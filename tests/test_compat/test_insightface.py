"""PartialFC_V2 in one process: whose margin it is, what it computes, what it takes and keeps."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from expface_kernels import CombinedMargin, ExpFace, pipeline
from expface_kernels.compat.insightface import PartialFC_V2
from expface_kernels.options import LossOptions
from expface_kernels.pipeline import negatives
from tests.test_compat import theirs
from tests.test_compat.one_process import F64, B, C, D, build, compare, rows, step
from tests.tolerances import CLOSED_FORM, DRAWN_64_000, OPPOSITE_ROW, TEN_DIGITS, assert_close

# A margin object of theirs or ours and its scale, and the one of theirs that it must equal.
Pair = tuple[Any, float | None, nn.Module]
SAME: dict[str, Pair] = {
    f"{type(loss).__name__}-{i}": (loss, None, loss)
    for i, loss in enumerate(
        (
            theirs.ArcFace(64.0, 0.5),
            theirs.ExpFaceAuthorsArcFace(32.0, 0.3),
            theirs.CosFace(64.0, 0.4),
            theirs.CosFace(128.0, 0.4),
            theirs.CombinedMarginLoss(64, 1.0, 0.5, 0.0),
            theirs.CombinedMarginLoss(48, 1.0, 0.0, 0.4),
            theirs.CombinedMarginLoss(64, 1.0, 0.5, 0.0, 0.2),
            theirs.CombinedMarginLoss(128, 1.0, 0.5, 0.0, 0.2),
            theirs.PowerFace(64.0, 0.6),
            theirs.SphereFace(30.0, 1.5),
        )
    )
} | {
    "ours": (ExpFace(0.6), None, theirs.PowerFace(64.0, 0.6)),
    "ours, s=30": (ExpFace(0.6), 30.0, theirs.PowerFace(30.0, 0.6)),
}


@pytest.mark.parametrize("kind", ["random", "learnt", "behind"])
@pytest.mark.parametrize(("margin_loss", "scale", "original"), SAME.values(), ids=SAME)
@pytest.mark.filterwarnings("error:margin_loss")
def test_loss_and_both_gradients_are_theirs(
    margin_loss: Any, scale: float | None, original: nn.Module, kind: str
) -> None:
    x, w, y = rows(kind)
    module = build(margin_loss, w, scale=scale)
    compare(step(module, x, y), theirs.eager(original, x, w, y))
    found = step(build(margin_loss, w.float(), scale=scale), x.float(), y)
    truth = theirs.eager(original, x.float().double(), w.float().double(), y)
    single = theirs.eager(original, x.float(), w.float(), y)
    for one, other, eager in zip(found, truth, single, strict=True):
        assert_close(one, other, eager=eager, dtype=torch.float32)


@pytest.mark.parametrize("threshold", [0, 0.2])
def test_batches_of_any_size_and_dtype_follow_one_another(threshold: float) -> None:
    x, w, y = rows("random")
    margin_loss = theirs.CombinedMarginLoss(64, 1, 0.5, 0, threshold)
    module = build(margin_loss, w)
    for count in (B, 3, 1):
        compare(step(module, x[:count], y[:count]), theirs.eager(margin_loss, x[:count], w, y[:count]))
    nothing = step(module, x[:0], y[:0])
    alone = step(build(margin_loss, w[:1]), x, torch.zeros_like(y))  # a single class
    for loss, dx, dw in (nothing, alone):
        assert (float(loss), int(dx.count_nonzero()), int(dw.count_nonzero())) == (0, 0, 0)
    half = x.half()
    found = step(build(margin_loss, w.float()), half, y)
    dtypes = (torch.float32, torch.float16, torch.float32)
    assert (found[1].dtype, found[2].dtype) == dtypes[1:]
    for one, truth, dtype in zip(found, theirs.eager(margin_loss, half.double(), w, y), dtypes, strict=True):
        assert_close(one, truth, dtype=dtype)
    x = x.clone().requires_grad_()
    module.zero_grad()
    loss = module(x, y)
    loss.backward(retain_graph=True)
    once = x.grad.clone(), module.weight.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once[0])
    assert torch.equal(module.weight.grad, 2 * once[1])


def test_the_cosine_of_a_dropped_m2_is_theirs_and_they_are_told() -> None:
    """At cos θ = 0.5 InsightFace's (1, 0.3, 0.2) is 0.3; the formula with all three is 0.0217."""
    w = torch.eye(2, dtype=F64)
    x = torch.tensor([[0.5, -math.sqrt(0.75)]], dtype=F64)
    with pytest.warns(
        UserWarning, match=r"m1=1 and m2=0.3 are dropped.*CombinedMargin\(1, 0.3, 0.2\)"
    ) as told:
        module = PartialFC_V2(theirs.CombinedMarginLoss(1.0, 1, 0.3, 0.2), 2, 2).double()
    module.load_state_dict({"weight": w})
    assert told[0].filename == __file__
    expected = math.log1p(math.exp(-math.sqrt(0.75) - 0.3))
    assert float(step(module, x, torch.tensor([0]))[0]) == pytest.approx(expected, abs=CLOSED_FORM)
    full = build(CombinedMargin(1.0, 0.3, 0.2), w, scale=1.0)
    expected = math.log1p(math.exp(-math.sqrt(0.75) - 0.0217402383))
    assert float(step(full, x, torch.tensor([0]))[0]) == pytest.approx(expected, abs=TEN_DIGITS)


class Curricular(theirs.CosFace):
    """Somebody's own, with the attributes of another."""


class OldArcFace(nn.Module):
    """As InsightFace had it before it detached the gradient: neither s nor margin is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.cos_m = 64.0, 0.8


OldArcFace.__name__ = "ArcFace"


class WholeHead(nn.Module):
    """As face.evoLVe has it: a head with centres, under the name of a margin and with its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(C, D))
        self.s, self.m, self.easy_margin = 64.0, 0.5, True


WholeHead.__name__ = "ArcFace"


@pytest.mark.parametrize(
    ("margin_loss", "error"),
    [
        (Curricular(), "got Curricular; pass ArcFace.s, margin.*ExpFace.0.7., and its scale=64"),
        (lambda cosines, labels: cosines, "got function; pass ArcFace"),
        (None, "got NoneType; pass"),
        (theirs.CosFace, "got the class CosFace itself; pass"),
        (OldArcFace(), "expected ArcFace with the attribute 'margin', as it has had since 12/2022, got"),
        (
            WholeHead(),
            r"expected ArcFace without parameters.* got one with weight \(23, 16\): a head of its.*; pass",
        ),
        (theirs.CombinedMarginLoss(64, 1.1, 0.5, 0.0), r"m1=1.1.*pass expface_kernels.CombinedMargin\(1.1,"),
        (theirs.CombinedMarginLoss(64, 1, 0.5, -0.1), "m3 > 0, or m1 = 1 and m3 = 0"),
        (theirs.CosFace(64.0, True), "expected a finite number as CosFace.m, got True"),
        (theirs.CosFace(math.nan, 0.4), "expected a finite number as CosFace.s, got nan"),
        (theirs.CosFace(0.0, 0.4), "scale: expected a finite number above 0, got 0"),
        (theirs.ArcFace(64.0, 28.6), "in radians, not degrees"),
    ],
)
def test_what_is_not_known_is_refused_with_what_to_pass(margin_loss: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        PartialFC_V2(margin_loss, D, C)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"embedding_size": 0}, "embedding_size: expected at least 1, got 0"),
        ({"num_classes": 2.5}, "num_classes: expected an int, got float 2.5"),
        ({"sample_rate": 0.0}, "sample_rate: expected above 0 and at most 1, got 0.0"),
        ({"sample_rate": 1.5}, "sample_rate: expected above 0"),
        ({"fp16": 1}, "fp16: expected True or False, got int 1"),
        ({"scale": 30.0}, "scale: expected None with a margin that brings its own s, got 30.0 with CosFace"),
        ({"process_group": "nccl"}, "process_group: expected a torch.distributed.ProcessGroup"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], error: str) -> None:
    arguments = {"embedding_size": D, "num_classes": C} | options
    with pytest.raises((ValueError, TypeError), match=error):
        PartialFC_V2(theirs.CosFace(), **arguments)


def test_what_is_assigned_between_steps_counts() -> None:
    x, w, y = rows("random")
    margin_loss = theirs.ArcFace(64.0, 0.5)
    module = build(margin_loss, w)
    module(x, y)
    margin_loss.margin, margin_loss.s = 0.2, 32.0
    compare(step(module, x, y), theirs.eager(theirs.ArcFace(32.0, 0.2), x, w, y))
    module.margin_softmax = theirs.CosFace(64.0, 0.3)
    compare(step(module, x, y), theirs.eager(theirs.CosFace(64.0, 0.3), x, w, y))
    module.margin_softmax = ExpFace(0.6)
    compare(step(module, x, y), theirs.eager(theirs.PowerFace(64.0, 0.6), x, w, y))
    with pytest.raises(ValueError, match="margin_loss: expected"):
        module.margin_softmax = Curricular()
    for name, value in (
        ("sample_rate", 2),
        ("ignore_index", 0.5),
        ("backend", "cuda"),
        ("workspace_bytes", -1),
    ):
        with pytest.raises((TypeError, ValueError), match=name):
            setattr(module, name, value)


def test_the_loss_is_not_cut_off() -> None:
    """Theirs ends at −log 1e-30 = 69.08; a row on another class's centre, opposite to its own, has 128."""
    w = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=F64)
    x = torch.tensor([[-3.0, 0.001]], dtype=F64)
    y = torch.tensor([0])
    found = step(build(theirs.CosFace(64.0, 0.4), w), x, y)
    assert float(found[0]) == pytest.approx(64 * 2.4, abs=OPPOSITE_ROW)
    compare(found, theirs.eager(theirs.CosFace(64.0, 0.4), x, w, y))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("count", [B, 1, 0])
def test_labels_keep_their_shape_and_values(count: int, column: bool, dtype: torch.dtype) -> None:
    x, w, y = rows("random")
    labels = y[:count].to(dtype).reshape((-1, 1) if column else (-1,))
    before = labels.clone()
    for sample_rate in (1.0, 0.5):
        build(theirs.CosFace(), w, sample_rate=sample_rate)(x[:count], labels)
        assert labels.shape == before.shape
        assert torch.equal(labels, before)


@pytest.mark.parametrize("threshold", [0, 0.2])
def test_a_label_that_is_none_is_told_and_ignore_index_leaves_out(threshold: float) -> None:
    x, w, y = rows("random")
    margin_loss = theirs.CombinedMarginLoss(64, 1, 0.5, 0, threshold)
    module = build(margin_loss, w)
    for bad in (-1, C):
        with pytest.raises(
            ValueError, match=f"labels: expected 0 <= label < {C} or ignore_index=-100, got {bad} in"
        ):
            module(x, torch.where(torch.arange(B) == 3, bad, y))
    expected = theirs.eager(margin_loss, x[4:], w, y[4:])
    padded = x.clone()
    padded[:4] = torch.nan
    for nothing in (-100, -1):
        module.ignore_index = nothing
        loss, dx, dw = step(module, padded, torch.where(torch.arange(B) < 4, nothing, y))
        compare((loss, dx[4:], dw), expected)
        assert not dx[:4].any()


def test_an_unchecked_label_gives_nan_and_not_a_number_that_might_be_true() -> None:
    x, w, y = rows("random")
    bad, counted = torch.arange(B) == 3, torch.ones(B, dtype=torch.bool)
    for threshold in (None, 0.2):
        options = LossOptions(backend="cpu", negative_threshold=threshold)
        n = negatives(x, w, torch.where(bad, -2, y), counted, None, options)
        assert n.theta.isnan().tolist() == (torch.arange(B) == 3).tolist()


def test_the_weight_is_a_plain_parameter_alone_in_the_state() -> None:
    module = PartialFC_V2(theirs.CosFace(), 64, 1000)
    assert type(module.weight) is nn.Parameter
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert list(module.state_dict()) == ["weight"]
    assert (module.class_start, module.num_local, module.rank, module.world_size) == (0, 1000, 0, 1)
    other = PartialFC_V2(theirs.CosFace(), 64, 1000, sample_rate=0.5)
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other.weight, module.weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({"weight": torch.zeros(999, 64)})
    with pytest.raises(RuntimeError, match="Unexpected"):
        other.load_state_dict({**module.state_dict(), "sampling_step": torch.tensor(0)})


def test_centres_start_from_a_narrow_normal_that_manual_seed_sets() -> None:
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(PartialFC_V2(theirs.CosFace(), 64, 1000).weight.detach())
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert abs(float(made[0].mean())) < 2e-4  # 5 standard deviations
    assert float(made[0].std()) == pytest.approx(0.01, rel=DRAWN_64_000)


def test_it_converts_and_copies_like_any_module() -> None:
    x, w, y = rows("random")
    module = build(theirs.CosFace(), w.float())
    copied = copy.deepcopy(module).double()
    assert copied.weight.dtype == F64
    compare(step(copied, x, y), theirs.eager(theirs.CosFace(), x, w, y))
    assert module.weight.dtype == torch.float32
    assert "embedding_size=16, num_classes=23" in repr(module)


@pytest.mark.parametrize(("fp16", "around"), [(True, None), (False, torch.bfloat16), (True, torch.bfloat16)])
def test_fp16_says_what_products_are_in(
    fp16: bool, around: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    autocast_dtype = pipeline.autocast_dtype
    monkeypatch.setattr(pipeline, "autocast_dtype", lambda x: seen.append(autocast_dtype(x)))
    x, w, y = rows("random")
    with torch.autocast("cpu", dtype=around or torch.bfloat16, enabled=around is not None):
        build(theirs.CosFace(), w.float(), fp16=fp16)(x.float(), y)
    assert seen == [torch.float16 if fp16 else None]
