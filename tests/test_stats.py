"""BatchStats against brute force over all cosines, on every backend and in the reference; reductions.

B rows · C classes · D features
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from expface_kernels import ArcFace, BatchStats, ExpFace, margin_cross_entropy, reference
from expface_kernels.margins import MarginFunction
from expface_kernels.stats import reduce_rows
from tests.cases import ALL_SCALES, KINDS, MARGINS, batch, leaves
from tests.tolerances import assert_close

F32, F64 = torch.float32, torch.float64


def _brute_force(
    x: Tensor, w: Tensor, y: Tensor, margin: MarginFunction, scale: float, classes: list[int]
) -> list[dict[str, Any]]:
    """Per row, from nothing but cosines and a loop."""
    x, w = x.double(), w.double()
    cos = (x / x.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T
    rows = []
    for b, label in enumerate(y.tolist()):
        others = {j: float(cos[b, j]) for j in classes if j != label}
        xn, wn = x[b] / x[b].norm(), w[label] / w[label].norm()
        theta = 2 * torch.atan2((xn - wn).norm(), (xn + wn).norm())
        psi = margin(theta[None])[0]
        hardest = max(others, key=others.__getitem__, default=-1)
        best = others.get(hardest, -torch.inf)
        logits = torch.tensor([scale * float(psi), *(scale * c for c in others.values())], dtype=F64)
        rows.append(
            {
                "target_angle": float(theta),
                "target_cos": float(torch.cos(theta)),
                "margin_cos": float(psi),
                "lse": float(torch.logsumexp(logits, 0)),
                "hardest_negative_cos": best,
                "hardest_negative_class": hardest,
                "correct": float(torch.cos(theta)) > best,
            }
        )
    return rows


def _assert_stats(stats: BatchStats, rows: list[dict[str, Any]], dtype: torch.dtype) -> None:
    expected = {name: [row[name] for row in rows] for name in BatchStats._fields}
    assert stats.hardest_negative_class.tolist() == expected["hardest_negative_class"]
    assert stats.correct.tolist() == expected["correct"]
    for name in ("target_angle", "target_cos", "margin_cos"):  # the target path is float64 always
        assert_close(getattr(stats, name), torch.tensor(expected[name], dtype=F64), dtype=F64, what=name)
    for name in ("lse", "hardest_negative_cos"):
        assert_close(getattr(stats, name), torch.tensor(expected[name], dtype=F64), dtype=dtype, what=name)


def _stats(x: Tensor, w: Tensor, y: Tensor, name: str, **options: Any) -> BatchStats:
    """From a backend, or from the reference function for "truth"."""
    if name == "truth":
        return reference.margin_cross_entropy(x, w, y, return_stats=True, **options)[1]
    return margin_cross_entropy(x, w, y, backend=name, return_stats=True, **options)[1]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("scale", ALL_SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_stats_equal_brute_force(
    kind: str, scale: float, dtype: torch.dtype, backend: str, small_tiles: int
) -> None:
    x, w, y = batch(kind, 17, 29, 16)
    expected = _brute_force(x, w, y, ExpFace(), scale, list(range(29)))
    _assert_stats(_stats(x.to(dtype), w.to(dtype), y, backend, scale=scale), expected, dtype)
    _assert_stats(_stats(x, w, y, "truth", scale=scale), expected, F64)


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_stats_hold_the_margin(margin: MarginFunction, backend: str) -> None:
    x, w, y = batch("mixed", 17, 29, 16)
    expected = _brute_force(x, w, y, margin, 64.0, list(range(29)))
    for target_gradient in ("exact", "detached"):
        stats = _stats(x.float(), w.float(), y, backend, margin=margin, target_gradient=target_gradient)
        _assert_stats(stats, expected, F32)


@pytest.mark.parametrize("name", ["cpu", "reference", "truth"])
def test_with_a_subset_the_hardest_class_keeps_its_global_name(name: str, small_tiles: int) -> None:
    x, w, y = batch("random", 17, 61, 16)
    subset = torch.unique(torch.cat([y, torch.arange(1, 61, 3)]))
    expected = _brute_force(x, w, y, ExpFace(), 64.0, subset.tolist())
    _assert_stats(_stats(x, w, y, name, class_subset=subset), expected, F64)


@pytest.mark.parametrize("name", ["cpu", "reference", "truth"])
@pytest.mark.parametrize("filling", [torch.nan, 1.0])
def test_ignored_rows_hold_nan_and_no_class_and_change_no_other(name: str, filling: float) -> None:
    x, w, y = batch("random", 9, 21, 16)
    ignored = torch.arange(9) % 4 == 1
    expected = _stats(x, w, y, name)
    stats = _stats(torch.where(ignored[:, None], filling, x), w, torch.where(ignored, -100, y), name)
    for field in BatchStats._fields:
        value = getattr(stats, field)
        assert torch.equal(value[~ignored], getattr(expected, field)[~ignored]), field
        if field == "hardest_negative_class":
            assert (value[ignored] == -1).all()
        elif field == "correct":
            assert not value[ignored].any()
        else:
            assert value[ignored].isnan().all(), field


@pytest.mark.parametrize("name", ["cpu", "reference", "truth"])
def test_a_single_class_has_no_hardest_negative_and_is_correct(name: str) -> None:
    x, w, y = batch("random", 3, 1, 8)
    stats = _stats(x, w, y, name)
    assert stats.hardest_negative_cos.tolist() == [-torch.inf] * 3
    assert stats.hardest_negative_class.tolist() == [-1] * 3
    assert stats.correct.tolist() == [True] * 3
    assert_close(stats.lse, 64 * stats.margin_cos, dtype=F64)


@pytest.mark.parametrize("name", ["cpu", "reference", "truth"])
def test_a_row_of_nan_has_nan_figures_and_is_not_correct(name: str) -> None:
    x, w, y = batch("random", 5, 21, 16)
    expected = _stats(x, w, y, name)
    x[2, 3] = torch.nan
    stats = _stats(x, w, y, name)
    for field in ("target_angle", "target_cos", "margin_cos", "lse", "hardest_negative_cos"):
        assert getattr(stats, field).isnan().tolist() == [False, False, True, False, False], field
    assert not stats.correct[2]
    others = torch.arange(5) != 2
    for field in BatchStats._fields:
        assert torch.equal(getattr(stats, field)[others], getattr(expected, field)[others]), field


def test_an_empty_batch_has_empty_stats(backend: str) -> None:
    w = batch("random", 1, 21, 16)[1]
    for value in _stats(torch.empty(0, 16), w, torch.empty(0, dtype=torch.int64), backend):
        assert value.shape == (0,)


def test_stats_are_detached_and_of_the_documented_dtypes(backend: str) -> None:
    x, w, y = batch("random", 5, 21, 16)
    a, b = leaves(x, w)
    m = torch.full((5,), 0.3, requires_grad=True)
    loss, stats = margin_cross_entropy(a, b, y, ArcFace(m), backend=backend, return_stats=True)
    assert loss.requires_grad
    for field, value in zip(BatchStats._fields, stats, strict=True):
        assert not value.requires_grad, field
        assert value.shape == (5,), field
        assert value.dtype == {"hardest_negative_class": torch.int64, "correct": torch.bool}.get(field, F64)


def test_asking_for_stats_changes_neither_loss_nor_gradients(backend: str, small_tiles: int) -> None:
    x, w, y = batch("mixed", 9, 21, 16)
    results = []
    for asked in (False, True):
        a, b = leaves(x, w)
        out = margin_cross_entropy(a, b, y, backend=backend, return_stats=asked)
        loss = out[0] if asked else out
        loss.backward()
        results.append((loss.detach(), a.grad, b.grad))
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_reductions_count_what_counts() -> None:
    rows, counted = torch.tensor([1.0, 0.0, 4.0]), torch.tensor([True, False, True])
    assert torch.equal(reduce_rows(rows, counted, "none"), rows)
    assert float(reduce_rows(rows, counted, "sum")) == 5
    assert float(reduce_rows(rows, counted, "mean")) == 2.5
    assert float(reduce_rows(0 * rows, torch.zeros(3, dtype=torch.bool), "mean")) == 0
