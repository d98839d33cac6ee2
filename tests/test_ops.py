"""The ops themselves: labels, shards' −1, what is kept and for whom, opcheck, and no second derivative.

B rows · C classes · D features · x (B, D) · w (C, D) · y (B,) int64, −1: not on this shard
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from expface_kernels import margin_cross_entropy, ops, reference
from expface_kernels.backends.base import INVALID_TARGET, NO_TARGET
from tests.cases import BACKENDS, batch, leaves
from tests.tolerances import assert_close, assert_rows_close

F32, F64 = torch.float32, torch.float64
# The reference is plain torch and stays outside the op.
OP_BACKENDS = tuple(name for name in BACKENDS if name != "reference")
op_backend = pytest.mark.parametrize("name", OP_BACKENDS)


def _lse(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    name: str,
    *,
    class_subset: Tensor | None = None,
    scale: float = 64.0,
    keep: bool = True,
    workspace_bytes: int = 0,
    find_hardest: bool = False,
) -> tuple[Tensor, ...]:
    return ops.cosine_lse(
        *_arguments(x, w, y, name, class_subset, scale, keep, workspace_bytes, find_hardest)
    )


def _arguments(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    name: str,
    class_subset: Tensor | None = None,
    scale: float = 64.0,
    keep: bool = True,
    workspace_bytes: int = 0,
    find_hardest: bool = False,
) -> tuple[Any, ...]:
    s = torch.tensor(scale, dtype=F64)
    return (x, w, y, class_subset, s, name, keep, workspace_bytes, find_hardest, None)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ],
)
def test_labels_of_any_integer_dtype_become_positions(dtype: torch.dtype) -> None:
    labels = torch.tensor([3, 0, 99, 6]).to(dtype)
    subset = torch.tensor([0, 3, 6])
    assert ops.local_labels(labels, None, 7, 99).tolist() == [3, 0, NO_TARGET, 6]
    local = ops.local_labels(labels, subset, 7, 99)
    assert local.tolist() == [1, 0, NO_TARGET, 2]
    assert local.dtype == torch.int64
    assert labels.tolist() == [3, 0, 99, 6]


def test_an_ignore_index_inside_the_range_is_still_ignored() -> None:
    assert ops.local_labels(torch.tensor([2, 1, 2]), None, 7, 2).tolist() == [NO_TARGET, 1, NO_TARGET]


@op_backend
@pytest.mark.parametrize("workspace_bytes", [0, 2**20])
def test_a_row_without_a_target_here_sums_over_all_classes(
    name: str, workspace_bytes: int, small_tiles: int
) -> None:
    x, w, y = batch("mixed", 12, 30, 16)
    y[::3] = NO_TARGET
    g = torch.Generator().manual_seed(1)
    g_log_l, g_theta = torch.randn(2, 12, generator=g, dtype=F64)
    a, b = leaves(x, w, F64)
    log_l, theta, _ = reference.cosine_lse(a, b, y, 64.0)
    ((g_log_l * log_l).sum() + torch.where(y >= 0, g_theta * theta, 0.0).sum()).backward()

    p, q = leaves(x, w)
    got_l, got_theta, *_ = _lse(p, q, y, name, workspace_bytes=workspace_bytes)
    # H of a row without a target is ignored, even where it is NaN.
    h = torch.where(y >= 0, g_theta, torch.nan)
    torch.autograd.backward([got_l, got_theta], [g_log_l, h])
    assert_rows_close(got_l, log_l, cap=2e-5)
    assert_close(got_theta, theta, dtype=F64)
    assert bool((got_theta[::3] == 0).all())
    assert_close(p.grad, a.grad, dtype=F32)
    assert_close(q.grad, b.grad, dtype=F32)


@op_backend
def test_log_l_and_theta_have_their_own_gradients(name: str, small_tiles: int) -> None:
    x, w, y = batch("random", 4, 19, 5)
    x, w = leaves(x, 100 * w, F64)
    for output in (0, 1):

        def one(x: Tensor, w: Tensor, output: int = output) -> Tensor:
            return _lse(x, w, y, name, scale=8.0, workspace_bytes=8 * 4 * 8)[output]

        assert torch.autograd.gradcheck(one, (x, w))


@op_backend
def test_shards_add_up_to_the_whole(name: str) -> None:
    x, w, y = batch("mixed", 12, 30, 16)
    whole_l, whole_theta, *_ = _lse(x, w, y, name)
    parts, theta = [], torch.zeros(12, dtype=F64)
    for start, stop in ((0, 11), (11, 12), (12, 30)):
        here = torch.where((y >= start) & (y < stop), y - start, NO_TARGET)
        log_l, part, *_ = _lse(x, w[start:stop], here, name)
        parts.append(log_l)
        theta += part
    assert_close(torch.logsumexp(torch.stack(parts), 0), whole_l, dtype=F64)
    assert torch.equal(theta, whole_theta)


@op_backend
def test_a_label_that_could_not_be_checked_gives_a_nan_row_and_leaves_others_alone(name: str) -> None:
    x, w, y = batch("random", 5, 9, 8)
    right = _lse(x, w, y, name)
    y[2] = INVALID_TARGET
    log_l, theta, *_ = _lse(x, w, y, name)
    others = torch.arange(5) != 2
    assert theta.isnan().tolist() == (~others).tolist()
    assert torch.equal(log_l[others], right[0][others])
    assert torch.equal(theta[others], right[1][others])


@op_backend
@pytest.mark.parametrize("label", [NO_TARGET, 3])
def test_a_row_of_nan_has_a_sum_of_nan_on_every_shard(name: str, label: int) -> None:
    x, w, y = batch("random", 5, 9, 8)
    y[2] = label  # its target may be on another shard: then nothing else here tells that the row is NaN
    x[2, 4] = torch.nan
    for dtype in (F32, F64):
        log_l = _lse(x.to(dtype), w.to(dtype), y, name)[0]
        assert log_l.isnan().tolist() == [False, False, True, False, False]


@op_backend
def test_what_was_not_asked_for_has_size_0(name: str) -> None:
    x, w, y = batch("random", 5, 9, 8)
    _, _, workspace, tile_sums, cos, classes = _lse(x, w, y, name, keep=False, workspace_bytes=2**20)
    assert [t.numel() for t in (workspace, tile_sums, cos, classes)] == [0, 0, 0, 0]
    _, _, workspace, _, cos, classes = _lse(x, w, y, name, workspace_bytes=2**20, find_hardest=True)
    assert workspace.numel() >= 45
    assert cos.shape == classes.shape == (5,)


@op_backend
@pytest.mark.parametrize("need_dx", [True, False])
@pytest.mark.parametrize("need_dw", [True, False])
def test_the_backward_makes_only_the_gradients_asked_for(name: str, need_dx: bool, need_dw: bool) -> None:
    x, w, y = batch("random", 5, 9, 8)
    log_l, theta, workspace, *_ = _lse(x, w, y, name)
    s = torch.tensor(64.0, dtype=F64)
    dx, dw = ops.cosine_lse_backward(
        x, w, y, None, s, log_l, workspace, log_l, theta, name, 0, None, need_dx, need_dw
    )
    assert dx.shape == (x.shape if need_dx else (0,))
    assert dw.shape == (w.shape if need_dw else (0,))


@op_backend
def test_a_backward_without_keep_says_what_is_missing(name: str) -> None:
    x, w, y = batch("random", 5, 9, 8)
    log_l = _lse(x.requires_grad_(), w, y, name, keep=False)[0]
    with pytest.raises(RuntimeError, match="backward needs keep=True"):
        log_l.sum().backward()


@op_backend
def test_a_gradient_of_only_one_output_is_enough(name: str) -> None:
    x, w, y = batch("random", 5, 9, 8)
    x.requires_grad_()
    both = torch.autograd.grad(sum(t.sum() for t in _lse(x, w, y, name)[:2]), x)[0]
    each = [torch.autograd.grad(_lse(x, w, y, name)[i].sum(), x)[0] for i in (0, 1)]
    assert_close(each[0] + each[1], both, dtype=F64)


@op_backend
@pytest.mark.parametrize("wanted", ["x", "w"])
def test_a_second_derivative_raises_our_own_words(name: str, wanted: str) -> None:
    x, w, y = batch("random", 5, 9, 8)
    x, w = leaves(x, w, F64)
    loss = margin_cross_entropy(x, w, y, backend=name)
    first = torch.autograd.grad(loss, x if wanted == "x" else w, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="computes first derivatives only"):
        (first**2).sum().backward()


@op_backend
def test_a_forward_mode_derivative_is_refused_and_not_taken_for_zero(name: str) -> None:
    x, w, y = batch("random", 5, 9, 8)
    for position, given in enumerate((x, w)):

        def loss(changed: Tensor, at: int = position) -> Tensor:
            inputs = [x, w]
            inputs[at] = changed
            return margin_cross_entropy(*inputs, y, backend=name)

        with pytest.raises(RuntimeError, match="reverse-mode derivatives only"):
            torch.func.jvp(loss, (given,), (torch.ones_like(given),))


def test_the_reference_has_the_forward_mode_derivative() -> None:
    x, w, y = batch("random", 5, 9, 8)
    direction = torch.ones_like(x)
    _, along = torch.func.jvp(
        lambda x: margin_cross_entropy(x, w, y, backend="reference"), (x,), (direction,)
    )
    (dx,) = torch.autograd.grad(margin_cross_entropy(x.requires_grad_(), w, y, backend="reference"), x)
    assert_close(along, (dx * direction).sum(), dtype=F64)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@op_backend
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("subset", [True, False])
@pytest.mark.parametrize(
    ("dtypes", "rows"),
    [
        ((F32, F32), 6),
        ((torch.bfloat16, F32), 6),
        ((F32, torch.float16), 1),
        ((F32, F32), 0),
    ],
)
def test_opcheck_passes(
    name: str, dtypes: tuple[torch.dtype, torch.dtype], rows: int, subset: bool, keep: bool, small_tiles: int
) -> None:
    x, w, y = batch("random", rows, 19, 8)
    x, w = x.to(dtypes[0]).requires_grad_(keep), w.to(dtypes[1]).requires_grad_(keep)
    classes = torch.arange(0, 19, 2) if subset else None
    y = y // 2
    for workspace_bytes in (0, 8 * max(rows, 1) * 8, 2**20):
        arguments = _arguments(x, w, y, name, classes, 64.0, keep, workspace_bytes, find_hardest=not keep)
        result = torch.library.opcheck(
            torch.ops.expface_kernels.cosine_lse.default, arguments, test_utils=CHECKS
        )
        assert set(result.values()) == {"SUCCESS"}


@op_backend
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_opcheck_of_the_backward_passes(name: str, needs: tuple[bool, bool]) -> None:
    x, w, y = batch("random", 6, 19, 8)
    log_l, theta, workspace, *_ = _lse(x, w, y, name)
    s = torch.tensor(64.0, dtype=F64)
    arguments = (x, w, y, None, s, log_l, workspace, log_l / 100, theta, name, 0, None, *needs)
    torch.library.opcheck(torch.ops.expface_kernels.cosine_lse_backward.default, arguments)


@pytest.mark.parametrize("subset", [None, torch.tensor([0, 2, 5])])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_opcheck_of_the_labels_passes(dtype: torch.dtype, subset: Tensor | None) -> None:
    labels = torch.tensor([0, 5, 9, 2]).to(dtype)
    torch.library.opcheck(torch.ops.expface_kernels.local_labels.default, (labels, subset, 7, 9))


def test_no_output_of_the_op_is_an_input_or_shares_memory_with_another() -> None:
    x, w, y = batch("random", 5, 9, 8)
    for name in OP_BACKENDS:
        out = _lse(x, w, y, name, find_hardest=True, workspace_bytes=2**20)
        spans = [t.untyped_storage().data_ptr() for t in (x, w, y, *out) if t.numel()]
        assert len(set(spans)) == len(spans)
