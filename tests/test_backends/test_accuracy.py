"""Every backend's loss and gradients against float64 truth: margins, scales, shapes, batches that hurt.

B rows · C classes · D features
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from expface_kernels import ArcFace, ExpFace
from expface_kernels.margins import MarginFunction
from tests.cases import (
    ALL_SCALES,
    AT_WORKING_SIZE,
    BACKENDS,
    BIG,
    IN_FLOAT64,
    INTERPRETED,
    KINDS,
    MARGINS,
    SCALES,
    SMALL_SHAPES,
    TARGET_GRADIENTS,
    batch,
    eager,
    leaves,
    loss_on,
    truth,
)
from tests.tolerances import assert_close, assert_rows_close, relative_error, row_cap

F32, F64 = torch.float32, torch.float64
NAMES = ("loss", "dx", "dw")
ROW_BY_ROW = ("near_centre", "opposite", "learnt")
Batch = tuple[Tensor, Tensor, Tensor]
T = TypeVar("T")


EVERY_MODE = [(margin, mode) for margin in MARGINS for mode in TARGET_GRADIENTS]
# The reference runs the truth's own code in float32: every third mode is enough. The interpreter is slow, and
# no kernel knows a margin: one exact and one detached.
STRIDES = {"reference": 3, "triton": 17 if INTERPRETED else 1}


def fewer_interpreted(values: Sequence[T], *kept: T) -> Sequence[T]:
    """All of them, or in the interpreter those that are kept."""
    assert set(kept) <= set(values)
    return kept if INTERPRETED else values


def _check(
    data: Batch,
    modes: Iterable[tuple[MarginFunction, str]],
    backend: str,
    *,
    scale: float = 64.0,
    rows: bool = False,
) -> None:
    """float32 loss, dx and dw in each (margin, target gradient), whole and, where asked for, row by row.

    Eager's error on one margin may be small by luck, so its worst over the modes is the yardstick.
    """
    modes = list(modes)[:: STRIDES.get(backend, 1)]
    options = {"scale": scale, "reduction": "none"}
    right = [truth(*data, margin, target_gradient=mode, **options) for margin, mode in modes]
    worst = dict.fromkeys(NAMES, 0.0)
    if backend == "reference":  # plain PyTorch itself: only the cap holds
        worst = dict.fromkeys(NAMES, float("nan"))
    else:
        for (margin, mode), expected in zip(modes, right, strict=True):
            beside = eager(*data, margin, dtype=F32, target_gradient=mode, **options)
            for name, other, value in zip(NAMES, beside, expected, strict=True):
                error = relative_error(other, value)
                worst[name] = error if error != error else max(worst[name], error)
    for (margin, mode), expected in zip(modes, right, strict=True):
        what = f"{margin!r}, {mode}, s={scale}: "
        x, w = leaves(*data[:2])
        loss = loss_on(backend, x, w, data[2], margin, target_gradient=mode, **options)
        assert loss.dtype == F32
        assert bool((loss >= 0).all())
        loss.sum().backward()
        for name, got, value in zip(NAMES, (loss, x.grad, w.grad), expected, strict=True):
            assert_close(got, value, eager=worst[name], dtype=F32, what=what + name)
        if rows:
            assert_rows_close(loss, expected[0], cap=row_cap(scale), what=what + "rows of loss")
            assert_rows_close(x.grad, expected[1], cap=row_cap(scale), what=what + "rows of dx")


@pytest.mark.parametrize("scale", fewer_interpreted(SCALES, 64.0, 128.0))
@pytest.mark.parametrize(
    "shape", fewer_interpreted(SMALL_SHAPES, (2, 3, 3), (17, 33, 31), (130, 9, 16)), ids=str
)
def test_every_margin_and_both_gradients_at_every_shape_and_scale(
    shape: tuple[int, int, int], scale: float, backend: str
) -> None:
    for kind in ("mixed", "learnt"):
        _check(batch(kind, *shape), EVERY_MODE, backend, scale=scale)


@pytest.mark.parametrize("scale", fewer_interpreted(SCALES, 64.0, 128.0))
@pytest.mark.parametrize("kind", KINDS)
def test_every_margin_and_both_gradients_on_every_kind_of_batch(
    kind: str, scale: float, backend: str
) -> None:
    _check(batch(kind, 24, 33, 48, seed=3), EVERY_MODE, backend, scale=scale)


@pytest.mark.parametrize("backend", AT_WORKING_SIZE)
@pytest.mark.parametrize("scale", SCALES)
def test_every_margin_and_both_gradients_at_working_size(scale: float, backend: str) -> None:
    _check(batch("random", *BIG), EVERY_MODE, backend, scale=scale)


@pytest.mark.parametrize("backend", AT_WORKING_SIZE)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_batch_and_scale_at_working_size(kind: str, scale: float, backend: str) -> None:
    modes = [(ExpFace(), "exact"), (ArcFace(), "detached")]
    _check(batch(kind, *BIG, seed=1), modes, backend, scale=scale, rows=kind in ROW_BY_ROW)


def test_two_threads_at_working_size() -> None:
    torch.set_num_threads(2)
    _check(batch("mixed", *BIG), [(ExpFace(), "exact")], "cpu")


@pytest.mark.parametrize("scale", fewer_interpreted(ALL_SCALES, 70.0, 256.0))
def test_random_centres_at_every_scale_up_to_256(scale: float, backend: str) -> None:
    # At s = 128 a constant shift in place of each row's maximum loses every row.
    modes = [(ExpFace(), "exact"), (ArcFace(), "exact"), (ExpFace(), "detached")]
    _check(batch("random", 32, 1031, 128, seed=2), modes, backend, scale=scale, rows=True)


@pytest.mark.parametrize("scale", fewer_interpreted(ALL_SCALES, 16.0, 70.0, 256.0))
def test_three_classes_with_every_row_opposite_all_of_them(scale: float, backend: str) -> None:
    # All logits near −s: exp(−128) is no float32, so sums without a maximum are 0.
    _check(batch("flat", 15, 3, 16), EVERY_MODE, backend, scale=scale, rows=True)


@pytest.mark.parametrize("scale", fewer_interpreted(SCALES, 64.0))
@pytest.mark.parametrize("kind", ROW_BY_ROW)
@pytest.mark.parametrize("features", fewer_interpreted((32, 512), 32))
def test_rows_at_their_centre_its_opposite_and_learnt_hold_row_by_row(
    features: int, kind: str, scale: float, backend: str
) -> None:
    _check(batch(kind, 20, 101, features, seed=4), EVERY_MODE, backend, scale=scale, rows=True)


@pytest.mark.parametrize("backend", IN_FLOAT64)
@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_float64_is_right_to_ten_digits(margin: MarginFunction, backend: str) -> None:
    for kind in KINDS:
        for scale in (1.0, 64.0, 256.0):
            x, w, y = batch(kind, 12, 41, 16, seed=5)
            right = truth(x, w, y, margin, scale=scale)
            a, b = leaves(x, w, F64)
            loss = loss_on(backend, a, b, y, margin, scale=scale)
            loss.backward()
            for got, expected in zip((loss, a.grad, b.grad), right, strict=True):
                assert_close(got, expected, dtype=F64, what=f"{kind}, s={scale}")


def _assert_gradcheck(margin: MarginFunction, name: str, reduction: str, workspace_bytes: int) -> None:
    x, w, y = batch("random", 4, 19, 5, seed=6)
    options = {"scale": 8.0, "reduction": reduction, "workspace_bytes": workspace_bytes}
    assert torch.autograd.gradcheck(
        lambda x, w: loss_on(name, x, w, y, margin, **options), leaves(x, 100 * w, F64)
    )


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_float64_passes_gradcheck_with_every_margin(margin: MarginFunction, small_tiles: int) -> None:
    _assert_gradcheck(margin, "cpu", "none", 4 * 8 * 8)  # one tile of three kept


@pytest.mark.parametrize("backend", IN_FLOAT64)
@pytest.mark.parametrize("workspace_bytes", [0, 2**20])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float64_passes_gradcheck_with_every_reduction(
    reduction: str, workspace_bytes: int, backend: str, small_tiles: int
) -> None:
    _assert_gradcheck(ExpFace(), backend, reduction, workspace_bytes)


@pytest.mark.parametrize("scale", fewer_interpreted(SCALES, 64.0, 128.0))
def test_one_feature_leaves_no_gradient_but_rounding(scale: float, backend: str) -> None:
    # Every cosine is ±1 and no direction is tangent: the truth is zero, reached by cancellation.
    x, w, y = batch("random", 5, 7, 1)
    a, b = leaves(x, w)
    loss = loss_on(backend, a, b, y, scale=scale, reduction="sum")
    loss.backward()
    right = truth(x, w, y, scale=scale, reduction="sum")
    assert_close(loss, right[0], dtype=F32)
    bound = 1e-6 * scale * 5
    assert float((a.grad * a.detach()).abs().max()) < bound
    assert float((b.grad * b.detach()).abs().max()) < bound


# x and w as stored; what is computed in is float32, or float64 beside a float64.
STORAGE = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float64),
]


@pytest.mark.parametrize("kind", fewer_interpreted(("random", "mixed", "wrong_class"), "mixed"))
@pytest.mark.parametrize(
    ("dtypes", "backend"),
    [(dtypes, name) for name in BACKENDS for dtypes in STORAGE if F64 not in dtypes or name in IN_FLOAT64],
    ids=str,
)
def test_16_bit_storage_is_judged_at_the_stored_values(
    dtypes: tuple[torch.dtype, torch.dtype], kind: str, backend: str
) -> None:
    x, w, y = batch(kind, 24, 65, 32, seed=7)
    x, w = x.to(dtypes[0]), (10 * w).to(dtypes[1])
    right = truth(x, w, y, reduction="sum")
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = loss_on(backend, a, b, y, reduction="sum")
    loss.backward()
    assert loss.dtype == (F64 if F64 in dtypes else F32)
    assert (a.grad.dtype, b.grad.dtype) == dtypes
    assert_close(loss, right[0], dtype=loss.dtype, what="loss")  # the loss itself is not 16 bit
    assert_close(a.grad, right[1], dtype=dtypes[0], what="dx")
    assert_close(b.grad, right[2], dtype=dtypes[1], what="dw")


def test_bfloat16_sums_over_many_rows_keep_growing(backend: str) -> None:
    # A sum of ones in bfloat16 stops at 256: 8192 rows pull at 4 centres.
    x, w, y = batch("random", 8192, 4, 16)
    x, w = x.abs().bfloat16(), w.bfloat16()  # all to one side, so that nothing cancels
    right = truth(x, w, y, reduction="sum")
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss_on(backend, a, b, y, reduction="sum").backward()
    assert_close(b.grad, right[2], dtype=torch.bfloat16)
