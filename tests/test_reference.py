"""The truth is true: against the textbook, finite differences, and 50 digits where float64 cannot judge.

B rows · C classes · D features · theta angle to the own centre, radians
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor

from expface_kernels import ArcFace, ExpFace, NormFace
from expface_kernels.margins import MarginFunction
from expface_kernels.reference import cosine_lse, margin_cross_entropy, normalize, pair_angle
from tests.cases import MARGINS, TARGET_GRADIENTS, batch, gen, leaves, naive_loss, truth
from tests.tolerances import PAIR_ANGLE, assert_close, assert_rows_close

F64 = torch.float64


@pytest.mark.parametrize("target_gradient", TARGET_GRADIENTS)
@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_it_equals_the_textbook_where_that_is_sound(margin: MarginFunction, target_gradient: str) -> None:
    # Neither learnt (F.cross_entropy cancels there) nor at cos θ = ±1 (arccos): all the rest.
    sines = (*gen(6, 16, 70), torch.tensor([0, 34, 35, 63, 64, 69]))
    for x, w, y in (batch("random", 33, 65, 32), batch("learnt", 9, 20, 8), sines):
        for scale, reduction in ((1.0, "mean"), (16.0, "sum"), (64.0, "none")):
            if scale == 64 and w.shape[0] == 20:
                continue
            options = {"scale": scale, "reduction": reduction, "target_gradient": target_gradient}
            loss, dx, dw = truth(x, w, y, margin, **options)
            a, b = leaves(x, w, F64)
            expected = naive_loss(a, b, y, margin, **options)
            expected.sum().backward()
            assert_close(loss, expected, dtype=F64, what="loss")
            assert_close(dx, a.grad, dtype=F64, what="dx")
            assert_close(dw, b.grad, dtype=F64, what="dw")


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_its_gradient_is_that_of_finite_differences(margin: MarginFunction) -> None:
    x, w, y = batch("random", 4, 6, 5, seed=1)
    x, w = leaves(x, 100 * w, F64)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return margin_cross_entropy(x, w, y, margin, scale=8.0, reduction="none")

    assert torch.autograd.gradcheck(loss, (x, w))


def test_it_can_be_differentiated_twice() -> None:
    x, w, y = batch("random", 3, 4, 5)
    x, w = leaves(x, 100 * w, F64)
    assert torch.autograd.gradgradcheck(lambda x, w: margin_cross_entropy(x, w, y, scale=4.0), (x, w))


def _exact_loss(x: list, w: list, y: int, margin: MarginFunction, scale: float) -> mpmath.mpf:
    """One row's loss to 50 digits, from cosines: −log softmax of s·cos with psi at the target."""

    def unit(v: list) -> list:
        norm = mpmath.sqrt(mpmath.fsum(a * a for a in v))
        return [a / norm for a in v]

    xn = unit(x)
    logits = [scale * mpmath.fdot(xn, unit(centre)) for centre in w]
    theta = mpmath.acos(logits[y] / scale)
    if isinstance(margin, ExpFace):
        psi = mpmath.cos(mpmath.pi * (theta / mpmath.pi) ** mpmath.mpf(margin.m))
    else:
        psi = mpmath.cos(theta + mpmath.mpf(margin.m if isinstance(margin, ArcFace) else 0))
    logits[y] = scale * psi
    # log1p of the others' share: 50 digits would not do for 1 + 1e-60.
    return mpmath.log1p(mpmath.fsum(mpmath.exp(z - logits[y]) for j, z in enumerate(logits) if j != y))


@pytest.mark.parametrize("margin", [ExpFace(), ArcFace(), NormFace()], ids=repr)
@pytest.mark.parametrize("theta", [1e-6, 1e-3, math.radians(35), math.pi - 1e-3, math.pi - 1e-6])
def test_it_is_right_to_50_digits_where_float64_formulas_break(margin: MarginFunction, theta: float) -> None:
    x, w, _ = batch("random", 1, 3, 4, seed=2)
    w = 100 * w
    at = w[0] / w[0].norm()
    sideways = x[0] - (x[0] @ at) * at
    x = (3 * (math.cos(theta) * at + math.sin(theta) * sideways / sideways.norm()))[None]
    loss, dx, dw = truth(x, w, torch.tensor([0]), margin, scale=64.0)

    with mpmath.workdps(80):
        exact_x, exact_w = [mpmath.mpf(a) for a in x[0].tolist()], w.tolist()
        exact_w = [[mpmath.mpf(a) for a in row] for row in exact_w]

        def at_x(k: int, a: mpmath.mpf) -> mpmath.mpf:
            return _exact_loss([*exact_x[:k], a, *exact_x[k + 1 :]], exact_w, 0, margin, 64.0)

        def at_w(j: int, k: int, a: mpmath.mpf) -> mpmath.mpf:
            rows = [[*row[:k], a, *row[k + 1 :]] if i == j else row for i, row in enumerate(exact_w)]
            return _exact_loss(exact_x, rows, 0, margin, 64.0)

        h = mpmath.mpf(10) ** -25  # far below theta, far above 80 digits

        def slope(f, a: mpmath.mpf) -> float:
            return float((f(a + h) - f(a - h)) / (2 * h))

        right_loss = torch.tensor(float(_exact_loss(exact_x, exact_w, 0, margin, 64.0)), dtype=F64)
        right_dx = torch.tensor([slope(lambda a, k=k: at_x(k, a), exact_x[k]) for k in range(4)], dtype=F64)
        right_dw = torch.tensor(
            [[slope(lambda a, j=j, k=k: at_w(j, k, a), exact_w[j][k]) for k in range(4)] for j in range(3)],
            dtype=F64,
        )
    # The angle itself is known to 1e-16 only, so 1e-6 rad has 1e-10 of its direction: not the cap of float64.
    assert_rows_close(loss[None], right_loss[None], cap=1e-11, what="loss")
    assert_rows_close(dx, right_dx[None], cap=2e-9, what="dx")
    assert_rows_close(dw, right_dw, cap=2e-9, what="dw")


@pytest.mark.parametrize("theta", [0.0, 1e-9, 1e-3, 1.0, math.pi / 2, 3.0, math.pi - 1e-9, math.pi])
def test_the_angle_keeps_its_digits_at_both_ends(theta: float) -> None:
    x = torch.tensor([[2.0, 0.0]], dtype=F64)
    w = torch.tensor([[3 * math.cos(theta), 3 * math.sin(theta)]], dtype=F64)
    assert float(pair_angle(x, w)) == pytest.approx(theta, rel=PAIR_ANGLE[0], abs=PAIR_ANGLE[1])


@pytest.mark.parametrize("factor", [4.0, 3.0, -4.0, -3.0])
def test_on_the_axis_the_target_has_no_gradient_and_nothing_is_nan(factor: float) -> None:
    # 4·w normalises to the bits of w; 3·w misses them by a rounding, whose direction is noise.
    _, w, _ = batch("random", 1, 20, 8)
    x, centres = leaves(factor * w, w, F64)
    pair_angle(x, centres).sum().backward()
    for grad in (x.grad, centres.grad):  # noise would have length 1/|w|, about 40
        assert_close(grad, torch.zeros_like(w), dtype=F64, absolute=1e-14)


def test_the_negatives_leave_out_the_target_and_only_that() -> None:
    x, w, y = batch("random", 6, 9, 4)
    log_l, _, cosines = cosine_lse(x, w, torch.where(torch.arange(6) == 0, -1, y), 16.0)
    every = (x / x.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T
    for b in range(6):
        others = [j for j in range(9) if b == 0 or j != int(y[b])]
        assert_close(log_l[b], torch.logsumexp(16 * every[b, others], 0), dtype=F64)
        assert torch.isinf(cosines[b]).sum() == 9 - len(others)


def test_a_vector_below_the_smallest_norm_has_no_gradient() -> None:
    for length in (0.0, 1e-13):
        v = torch.tensor([[length, 0.0], [3.0, 4.0]], dtype=F64, requires_grad=True)
        out = normalize(v)
        out.sum().backward()
        assert torch.equal(out[0].detach(), v[0].detach() / 1e-12)
        assert torch.equal(v.grad[0], torch.zeros(2, dtype=F64))
        assert bool((v.grad[1] != 0).all())


def test_ignored_rows_count_for_nothing_whatever_they_hold() -> None:
    x, w, y = batch("mixed", 7, 9, 4)
    padded, labels = torch.cat([x, x[:3]]), torch.cat([y, torch.full((3,), -7)])
    padded[7], padded[8] = torch.nan, torch.inf
    for reduction in ("mean", "sum"):
        expected = truth(x, w, y, reduction=reduction)
        loss, dx, dw = truth(padded, w, labels, reduction=reduction, ignore_index=-7)
        assert_close(loss, expected[0], dtype=F64)
        assert_close(dx[:7], expected[1], dtype=F64)
        assert torch.equal(dx[7:], torch.zeros(3, 4, dtype=F64))
        assert_close(dw, expected[2], dtype=F64)
    loss, dx, dw = truth(padded[7:], w, labels[7:], ignore_index=-7)
    assert (float(loss), float(dx.abs().max()), float(dw.abs().max())) == (0.0, 0.0, 0.0)


def test_a_class_subset_is_the_loss_over_the_gathered_centres() -> None:
    x, w, y = batch("mixed", 7, 9, 4)
    subset = torch.unique(torch.cat([y, torch.tensor([0, 8])]))
    positions = torch.searchsorted(subset, y)
    loss, dx, dw = truth(x, w, y, class_subset=subset)
    expected = truth(x, w[subset], positions)
    assert_close(loss, expected[0], dtype=F64)
    assert_close(dx, expected[1], dtype=F64)
    assert_close(dw[subset], expected[2], dtype=F64)
    others = torch.ones(9, dtype=torch.bool).index_fill(0, subset, False)
    assert torch.equal(dw[others], torch.zeros_like(dw[others]))


def test_one_class_has_loss_zero_and_gradients_zero() -> None:
    x, w, _ = batch("random", 3, 1, 4)
    for value in truth(x, w, torch.zeros(3, dtype=torch.int64)):
        assert torch.equal(value, torch.zeros_like(value))


def test_a_per_row_margin_parameter_gets_its_own_gradient() -> None:
    x, w, y = batch("random", 5, 7, 4)
    m = torch.linspace(0.1, 0.6, 5, dtype=F64, requires_grad=True)
    for target_gradient in TARGET_GRADIENTS:

        def loss(m: Tensor, target_gradient: str = target_gradient) -> Tensor:
            return margin_cross_entropy(x, w, y, ArcFace(m), scale=8.0, target_gradient=target_gradient)

        assert torch.autograd.gradcheck(loss, (m,))
