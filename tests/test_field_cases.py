"""What users of other loss heads reported, one test for each kind: the symptom, and where it was seen.

IF is InsightFace, PML pytorch-metric-learning, CCE cut-cross-entropy, TE TransformerEngine. Reports about
shards and samplers belong to the tests of those.
B rows · C classes · D features · x (B, D) · w (C, D) · y (B,)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from expface_kernels import (
    ArcFace,
    CosFace,
    ExpFace,
    MarginSoftmaxHead,
    NormFace,
    margin_cross_entropy,
    reference,
)
from expface_kernels.margins import MarginFunction
from tests.cases import MARGINS, batch, gen, leaves, truth
from tests.steps import step
from tests.tolerances import (
    FLOOR,
    LOSS_OF_16_BIT_INPUTS,
    assert_close,
    assert_rows_close,
    one_rounding,
    relative_error,
    row_cap,
)

WIDE = torch.float64
Y6 = torch.tensor([0, 34, 35, 63, 64, 69])
HALVES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_rows_equal_to_their_centre_have_no_nan_and_no_pull(margin: MarginFunction, backend: str) -> None:
    # ArcFace ports, IF-PyTorch 93, arcface-pytorch 32: √(1 − cos²) where rounding makes cos larger than 1.
    w = batch("random", 0, 40, 512)[1].float()
    y = torch.arange(16)
    # A hard centre 0.3 rad from each target, or every row would be learnt and all gradients vanish.
    w[16:32] = w[y] + 0.3 * w[16:32]
    x = w[y]
    assert (F.normalize(x).pow(2).sum(1) > 1).any()  # the input does what it is here for
    loss, dx, dw = step(x, w, y, margin, reduction="none", backend=backend)
    for value in (loss, dx, dw):
        assert torch.isfinite(value).all()
    # Whatever the slope of the margin, at angle 0 the target pulls nowhere: without its slope dx is the same.
    unpulled = step(x, w, y, lambda theta: margin(theta.detach()), reduction="none", backend=backend)[1]
    assert torch.equal(dx, unpulled)
    assert (dx.abs().amax(dim=1) > 0).all()
    assert F.cosine_similarity(dx.double(), x.double()).abs().max() <= FLOOR


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["at the centre", "opposite"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("target_gradient", ["exact", "detached"])
def test_gradients_at_cosine_plus_and_minus_one_are_finite_and_right(
    sign: float, dtype: torch.dtype, target_gradient: str, backend: str
) -> None:
    # NeMo 11025, speechbrain 1276: arccos has no slope at ±1, and a clamp to 1 − 1e-7 is 1 in 16 bit.
    _, w, y = batch("random", 12, 30, 64)
    w = w.to(dtype)
    x = sign * w[y]
    for margin in MARGINS:
        options = {"scale": 16.0, "target_gradient": target_gradient}
        got = step(x, w, y, margin, backend=backend, **options)
        exact = truth(x, w, y, margin, **options)
        for name, value, right in zip(("loss", "dx", "dw"), got, exact, strict=True):
            assert torch.isfinite(value).all(), f"{margin}: {name}"
            computed = torch.float32 if name == "loss" else dtype
            assert_close(value, right, dtype=computed, what=f"{margin}: {name}")


@pytest.mark.parametrize(("m", "length"), [(0.7, 0.0349), (0.5, 1.57), (0.4, None)])
def test_the_pull_of_expface_stays_bounded_next_to_the_centre(m: float, length: float | None) -> None:
    # ExpFace's form: dpsi/dcos grows without bound as θ → 0 (350 at 1e-4), dpsi/dθ is what acts on the row.
    for theta in (1e-4, 1e-6, 1e-9, 0.0):
        x = torch.tensor([[math.cos(theta), math.sin(theta)]], dtype=WIDE, requires_grad=True)
        psi = ExpFace(m)(reference.pair_angle(x, torch.tensor([[1.0, 0.0]], dtype=WIDE)))
        pull = float(torch.linalg.vector_norm(torch.autograd.grad(psi.sum(), x)[0]))
        assert math.isfinite(pull)
        if m == 0.4:
            assert pull < 100
        elif theta == 1e-4:
            assert f"{pull:.3g}" == f"{length:.3g}"


@pytest.mark.parametrize(
    ("margin", "target_gradient", "norm"),
    [
        (ArcFace(0.5), "exact", 9.774895794200),
        (ExpFace(0.7), "exact", 9.549152273040),
        (ArcFace(0.5), "detached", 10.373952320537),
        (ExpFace(0.7), "detached", 10.373952320536),
    ],
)
def test_both_gradients_of_the_margin_exist_and_are_the_known_ones(
    margin: MarginFunction, target_gradient: str, norm: float, backend: str
) -> None:
    # IF 2309, IF 2255, unicom 11: is the no_grad around the margin a bug? Both are meant, each has a name.
    # The numbers come from 40-digit arithmetic: arccos in float64 loses the last two of these.
    x, w = gen(6, 16, 70)
    dx = step(x, w, Y6, margin, target_gradient=target_gradient, backend=backend)[1]
    assert_close(torch.linalg.vector_norm(dx), torch.tensor(norm, dtype=WIDE), dtype=WIDE)


@pytest.mark.parametrize("scale", [64.0, 128.0, 256.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loss_above_69_is_told_as_it_is(scale: float, dtype: torch.dtype, backend: str) -> None:
    # IF 1437: stuck at 69.08 = −log 1e-30, a clamp. The row lies on the other class, opposite to its own.
    w = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=dtype, requires_grad=True)
    x = torch.tensor([[-3.0, 0.5]], dtype=dtype, requires_grad=True)
    loss = margin_cross_entropy(x, w, torch.tensor([0]), NormFace(), scale=scale, backend=backend)
    loss.backward()
    expected, dx, _ = truth(x, w, torch.tensor([0]), NormFace(), scale=scale)
    assert loss > 69.08
    assert_close(loss, expected, dtype=torch.float32)
    assert_close(x.grad, dx, dtype=dtype)  # no clamp cuts the gradient either


def test_a_smaller_last_batch_is_the_mean_over_the_rows_there_are(backend: str) -> None:
    # IF 2015 and 1105: buffers sized by the first batch.
    head = MarginSoftmaxHead(16, 20, scale=16.0, backend=backend).double()
    for rows in (32, 3, 1, 32):
        x, _, y = batch("random", rows, 20, 16, seed=rows)
        x.requires_grad_()
        loss = head(x, y)
        dx, dw = torch.autograd.grad(loss, (x, head.weight))
        expected = truth(x, head.weight, y, scale=16.0, target_gradient="detached")
        for value, right in zip((loss, dx, dw), expected, strict=True):
            assert_close(value, right, dtype=WIDE)


def test_two_batches_accumulated_are_one_of_twice_the_size(backend: str) -> None:
    # IF 2258: gradient accumulation.
    x, _, y = batch("random", 8, 20, 16)
    head = MarginSoftmaxHead(16, 20, scale=16.0, backend=backend).double()
    whole = head(x, y)
    whole.backward()
    expected = head.weight.grad.clone()
    for together in (True, False):  # both forwards before a backward: neither may use the other's buffers
        head.weight.grad = None
        if together:
            ((head(x[:4], y[:4]) + head(x[4:], y[4:])) / 2).backward()
        else:
            for part in (slice(0, 4), slice(4, 8)):
                (head(x[part], y[part]) / 2).backward()
        assert_close(head.weight.grad, expected, dtype=WIDE)


def test_gradients_of_the_centres_are_summed_in_float32(backend: str) -> None:
    # Megatron PR 2206, CCE 14, Liger 512: summed in bf16, where 256 + 1 is 256.
    x, w, y = batch("random", 8192, 32, 128)
    x, w = x.bfloat16(), w.bfloat16()
    exact = truth(x, w, y, CosFace(), scale=8.0)[2]
    dw = step(x, w, y, CosFace(), scale=8.0, backend=backend)[2]
    assert dw.dtype == torch.bfloat16
    assert relative_error(dw, exact) < one_rounding(torch.bfloat16)  # the last one, and nothing before it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_are_not_rounded_to_16_bit(dtype: torch.dtype, backend: str) -> None:
    # Liger 1432, TE 3193: cosines or logits in 16 bit before the float32 cast; a logit of 64 moves by 0.13.
    x, w, y = batch("mixed", 64, 200, 128)
    x, w = x.to(dtype), w.to(dtype)
    rows = margin_cross_entropy(x, w, y, reduction="none", backend=backend)
    exact = reference.margin_cross_entropy(x.double(), w.double(), y, reduction="none")
    assert (rows.double() - exact).abs().max() < LOSS_OF_16_BIT_INPUTS


@pytest.mark.parametrize("frozen", ["no_grad", "inference_mode", "nothing wanted", "x", "w"])
def test_evaluation_and_frozen_inputs_give_the_same_loss(frozen: str, backend: str) -> None:
    # Liger 930: evaluation under no_grad fails.
    x, w, y = batch("random", 8, 20, 16)
    expected, dx, dw = step(x, w, y, backend=backend)
    x, w = leaves(x, w, WIDE)
    if frozen in ("no_grad", "inference_mode"):
        with torch.no_grad() if frozen == "no_grad" else torch.inference_mode():
            loss = margin_cross_entropy(x, w, y, backend=backend)
    else:
        x.requires_grad_(frozen == "w"), w.requires_grad_(frozen == "x")
        loss = margin_cross_entropy(x, w, y, backend=backend)
    assert torch.equal(loss, expected)
    assert loss.requires_grad == (frozen in ("x", "w"))
    if loss.requires_grad:
        loss.backward()
        live, right = (w, dw) if frozen == "x" else (x, dx)
        assert_close(live.grad, right, dtype=WIDE)
        assert (x if frozen == "x" else w).grad is None


def test_no_probability_of_an_unlearnt_row_is_too_small_to_count(backend: str) -> None:
    # CCE: a fixed threshold of 2⁻¹². At random init every probability is below it, and together they are all.
    x, w, y = batch("random", 4, 20000, 16)
    options: dict[str, Any] = {"scale": 1.0, "reduction": "sum"}
    exact = truth(x, w, y, NormFace(), **options)
    probabilities = F.softmax(F.normalize(x) @ F.normalize(w).T, dim=1)
    assert probabilities.max() < 2**-12
    got = step(x.float(), w.float(), y, NormFace(), backend=backend, **options)
    for name, value, right in zip(("loss", "dx", "dw"), got, exact, strict=True):
        assert_close(value, right, dtype=torch.float32, what=name)


def test_constants_of_a_margin_are_read_at_every_step_not_at_construction(backend: str) -> None:
    # wespeaker, PML: cos m and sin m computed once in __init__; a later m changes half of the formula.
    x, _, y = batch("random", 8, 20, 16)
    for boundary in ("none", "monotonic", "easy"):
        head = MarginSoftmaxHead(16, 20, ArcFace(0.1, boundary), backend=backend)
        head(x, y)
        head.margin.m = 0.6
        fresh = MarginSoftmaxHead(16, 20, ArcFace(0.6, boundary), backend=backend)
        assert torch.equal(head(x, y), fresh(x, y))
        head.margin = CosFace(0.2)
        assert torch.equal(head(x, y), MarginSoftmaxHead(16, 20, CosFace(0.2), backend=backend)(x, y))


def test_offsets_past_two_to_the_31_reach_the_last_class() -> None:
    # fla 1082, Liger 804, pytorch 85005: class · D in 32 bit. All but two centres are never written, so that
    # the 4.3 GB of the matrix are pages of zeros that take no memory.
    classes, features, scale = 2**31 // 512 + 1, 512, 16.0
    w = torch.from_numpy(np.zeros((classes, features), np.float16))
    ends = torch.zeros(2, features, dtype=WIDE)
    ends[0, :2], ends[1, 1:3] = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    w[0], w[-1] = ends.half()
    x = ends.float() + 0.25 * torch.cos(torch.arange(2.0 * features).view(2, features))
    x.requires_grad_()
    y = torch.tensor([classes - 1, 0])
    loss, stats = margin_cross_entropy(x, w, y, NormFace(), scale=scale, backend="cpu", return_stats=True)
    loss.backward()
    assert stats.hardest_negative_class.tolist() == [0, classes - 1]

    # A centre of zeros has the cosine 0 with everything: what is left are the two at the ends.
    exact = x.detach().double().requires_grad_()
    cos = F.normalize(exact) @ F.normalize(ends).T
    log_l = torch.logaddexp(scale * cos.diagonal(), torch.tensor(classes - 2.0, dtype=WIDE).log())
    rows = F.softplus(log_l - scale * cos.flip(1).diagonal())
    rows.mean().backward()
    assert_close(loss, rows.mean(), dtype=torch.float32)
    assert_rows_close(x.grad, exact.grad, cap=row_cap(scale))
