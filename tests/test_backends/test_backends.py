"""What every backend promises beside accuracy: layouts, subsets, ignored rows, edges, and refusals by name.

B rows · C classes · D features
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from expface_kernels import ArcFace, ExpFace, backends, functional, margin_cross_entropy, ops
from expface_kernels.backends import native
from tests.cases import SCALES, TARGET_GRADIENTS, batch, device_of, leaves, loss_on, truth
from tests.tolerances import assert_close, assert_rows_close

F32, F64 = torch.float32, torch.float64


def _run(x: Tensor, w: Tensor, y: Tensor, backend: str, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dw) in float32, from the sum of the losses."""
    a, b = leaves(x, w)
    loss = loss_on(backend, a, b, y, **options)
    loss.sum().backward()
    return loss.detach(), a.grad, b.grad


def _assert_true(got: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    for name, actual, expected in zip(("loss", "dx", "dw"), got, right, strict=True):
        assert_close(actual, expected, dtype=F32, what=name)


def _is_zero(tensor: Tensor) -> bool:
    return bool((tensor == 0).all())


def test_every_backend_under_test_can_run_here(backend: str) -> None:
    assert backends.available()[backend] == "ok"


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.T.contiguous().T,
    "strided": lambda t: torch.stack([t, -t], dim=2)[..., 0],
    "every second row": lambda t: torch.stack([t, -t], dim=1).flatten(0, 1)[::2],
    "offset": lambda t: torch.cat([t.new_zeros(1, t.shape[1]), t])[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_any_strides_give_the_same_result(layout: str, dtype: torch.dtype, backend: str) -> None:
    x, w, y = batch("mixed", 9, 21, 16)
    x, w = x.to(dtype), w.to(dtype)
    right = truth(x, w, y, reduction="sum")
    device = device_of(backend)
    a, b = (LAYOUTS[layout](t.to(device)).detach().requires_grad_() for t in (x, w))
    assert layout == "offset" or not (a.is_contiguous() or b.is_contiguous())
    loss = margin_cross_entropy(a, b, y.to(device), reduction="sum", backend=backend)
    loss.backward()
    assert_close(loss.cpu(), right[0], dtype=F32)
    assert_close(a.grad.cpu(), right[1], dtype=dtype)
    assert_close(b.grad.cpu(), right[2], dtype=dtype)


def test_expanded_rows_and_centres_sum_their_gradients(backend: str) -> None:
    device = device_of(backend)
    x, w, _ = batch("random", 1, 5, 16)
    y = torch.tensor([0, 3, 4])
    right = truth(x.expand(3, 16).clone(), w, y, reduction="sum")
    a, b = leaves(x.to(device), w.to(device))
    loss = margin_cross_entropy(a.expand(3, 16), b, y.to(device), reduction="sum", backend=backend)
    loss.backward()
    assert_close(a.grad.cpu(), right[1].sum(0, keepdim=True), dtype=F32)
    assert_close(b.grad.cpu(), right[2], dtype=F32)

    x = batch("random", 3, 5, 16)[0]
    right = truth(x, w[:1].expand(5, 16).clone(), y, reduction="sum")
    a, b = leaves(x.to(device), w[:1].to(device))
    loss = margin_cross_entropy(a, b.expand(5, 16), y.to(device), reduction="sum", backend=backend)
    loss.backward()
    assert_close(a.grad.cpu(), right[1], dtype=F32)
    assert_close(b.grad.cpu(), right[2].sum(0, keepdim=True), dtype=F32)


@pytest.mark.parametrize("kind", ["random", "mixed"])
def test_a_class_subset_equals_the_gathered_centres(kind: str, backend: str, small_tiles: int) -> None:
    x, w, y = batch(kind, 9, 61, 16)
    subset = torch.unique(torch.cat([y, torch.tensor([0, 2, 17, 33, 58, 60])]))
    right = truth(x, w[subset], torch.searchsorted(subset, y))
    loss, dx, dw = _run(x, w, y, backend, class_subset=subset)
    _assert_true((loss, dx, dw[subset]), right)
    assert _is_zero(dw[torch.ones(61, dtype=torch.bool).index_fill(0, subset, False)])


def _over_subset(
    x: Tensor, w: Tensor, subset: Tensor, y: Tensor, backend: str, workspace_bytes: int, sparse_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(log l, dx, dw) of some loss on the CPU, from the half of the function that looks at no values.

    y (B,): positions in the subset, which is taken as it lies in memory.
    """
    device = device_of(backend)
    a, b = (t.to(device, copy=True).requires_grad_() for t in (x, w))
    n = functional.negatives_of(
        a,
        b,
        y.to(device),
        counted=torch.ones(y.shape[0], dtype=torch.bool, device=device),
        scale=16.0,
        class_subset=subset,
        workspace_bytes=workspace_bytes,
        backend=backend,
        find_hardest=False,
        sparse_grad=sparse_grad,
    )
    (n.log_l.sum() - 3 * n.theta.sum()).backward()
    return n.log_l.detach().cpu(), a.grad.cpu(), b.grad.cpu()


def _with_subset(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, w, labels as positions in a subset of the 61 classes, the subset."""
    x, w, y = batch("mixed", 9, 61, 16)
    subset = torch.unique(torch.cat([y, torch.tensor([0, 2, 17, 33, 58, 60])]))
    return x.to(dtype), w.to(dtype), torch.searchsorted(subset, y), subset


@pytest.mark.parametrize("workspace_bytes", [0, 2**20])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
def test_a_strided_class_subset_gives_the_same_bits(
    dtype: torch.dtype, workspace_bytes: int, backend: str, small_tiles: int
) -> None:
    x, w, y, subset = _with_subset(dtype)
    subset = subset.to(device_of(backend))
    strided = torch.stack([subset, 60 - subset], 1)[:, 0]
    assert not strided.is_contiguous()
    right, got = (_over_subset(x, w, s, y, backend, workspace_bytes, False) for s in (subset, strided))
    assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


@pytest.mark.parametrize(
    "subset",
    [[0, 3, 2**40], [-(2**40), 0, 3], [0, 3, 3], [3, 0, 5], [2**62, -(2**63), 5], [0, 3, 21]],
    ids=str,
)
def test_a_bad_class_subset_on_a_gpu_gives_nan_and_stays_within_memory(
    subset: list[int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "on_cpu", lambda values: False)  # as there, where nobody may wait
    x, w, y = batch("random", 4, 21, 16)
    y = torch.tensor([0, 3, -100, 0])
    loss, _, dw = _run(x, w, y, backend, class_subset=torch.tensor(subset), reduction="none")
    assert loss.isnan().tolist() == [True, True, False, True]
    assert float(loss[2]) == 0
    assert dw.shape == w.shape


def test_a_subset_of_all_classes_changes_nothing(backend: str) -> None:
    x, w, y = batch("mixed", 9, 61, 16)
    for got, right in zip(
        _run(x, w, y, backend, class_subset=torch.arange(61)), _run(x, w, y, backend), strict=True
    ):
        assert torch.equal(got, right)


@pytest.mark.parametrize("workspace_bytes", [0, 2**20])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_a_sparse_gradient_is_the_subsets_rows_of_the_dense_one(
    dtype: torch.dtype, workspace_bytes: int, backend: str, small_tiles: int
) -> None:
    x, w, positions, subset = _with_subset(dtype)
    positions[2] = -1  # a row whose target is another shard's
    found = {}
    for sparse_grad in (False, True):
        here = subset.to(device_of(backend))
        found[sparse_grad] = _over_subset(x, w, here, positions, backend, workspace_bytes, sparse_grad)
    dense, sparse = found[False], found[True]
    assert torch.equal(dense[0], sparse[0])
    assert torch.equal(dense[1], sparse[1])
    rows = sparse[2].coalesce()
    assert rows.shape == w.shape
    assert rows.dtype == dtype
    assert torch.equal(rows.indices()[0], subset)
    assert torch.equal(rows.values(), dense[2][subset])
    assert dense[2][subset].abs().amax(1).min() > 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("filling", [torch.nan, torch.inf, 0.0, 1e30])
def test_ignored_rows_add_nothing_whatever_they_hold(filling: float, reduction: str, backend: str) -> None:
    x, w, y = batch("mixed", 9, 21, 16)
    right = truth(x, w, y, reduction=reduction)
    order = torch.tensor([9, 0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 11])
    padded = torch.cat([x, torch.full((3, 16), filling, dtype=F64)])[order]
    labels = torch.cat([y, torch.full((3,), 255)])[order]
    real = order < 9
    loss, dx, dw = _run(padded, w, labels, backend, reduction=reduction, ignore_index=255)
    assert _is_zero(dx[~real])
    if reduction == "none":
        assert _is_zero(loss[~real])
        loss = loss[real]
    _assert_true((loss, dx[real], dw), right)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("filling", [torch.nan, 1.0])
def test_all_rows_ignored_is_loss_0_and_gradients_0(filling: float, reduction: str, backend: str) -> None:
    x, w, _ = batch("random", 4, 21, 16)
    labels = torch.full((4,), -100)
    for value in _run(torch.full_like(x, filling), w, labels, backend, reduction=reduction):
        assert _is_zero(value)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_batch_is_loss_0_and_gradients_0(reduction: str, backend: str) -> None:
    w = batch("random", 4, 21, 16)[1]
    loss, dx, dw = _run(
        torch.empty(0, 16), w, torch.empty(0, dtype=torch.int64), backend, reduction=reduction
    )
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert _is_zero(loss)
    assert dx.shape == (0, 16)
    assert _is_zero(dw)


@pytest.mark.parametrize("target_gradient", TARGET_GRADIENTS)
@pytest.mark.parametrize("kind", ["random", "near_centre", "opposite"])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_single_class_is_loss_0_and_gradients_0(
    rows: int, kind: str, target_gradient: str, backend: str
) -> None:
    x, w, y = batch(kind, rows, 1, 8)
    for scale in (1.0, 64.0, 256.0):
        for value in _run(x, w, y, backend, scale=scale, target_gradient=target_gradient):
            assert _is_zero(value)


def test_a_shard_that_holds_only_the_target_of_some_rows_is_no_nan(backend: str) -> None:
    x, w, _ = batch("random", 3, 9, 8)
    subset = torch.tensor([4])
    for value in _run(x, w, torch.full((3,), 4), backend, class_subset=subset):
        assert _is_zero(value)


def test_repeated_labels_add_up(backend: str) -> None:
    x, w, _ = batch("random", 40, 21, 16)
    for y in (torch.full((40,), 7), torch.arange(40) % 2 + 3):
        _assert_true(_run(x, w, y, backend, reduction="sum"), truth(x, w, y, reduction="sum"))


def _zeroed(x: Tensor, row: int) -> Tensor:
    x = x.clone()
    x[row] = 0
    return x


@pytest.mark.parametrize("scale", SCALES)
def test_a_row_of_zeros_has_no_gradient_and_a_finite_loss(scale: float, backend: str) -> None:
    x, w, y = batch("random", 6, 21, 16)
    x = _zeroed(x, 2)
    right = truth(x, w, y, scale=scale, reduction="sum")
    got = _run(x, w, y, backend, scale=scale, reduction="sum")
    _assert_true(got, right)
    assert _is_zero(got[1][2])
    assert_rows_close(got[1], right[1], cap=4e-5)


@pytest.mark.parametrize("length", [0.0, 1e-13, 9e-13])
def test_a_centre_shorter_than_eps_has_no_gradient(length: float, backend: str) -> None:
    x, w, y = batch("random", 12, 5, 16)
    w = w.clone()
    w[3] *= length / w[3].norm()
    w = w.float().double()
    for labels in (y, torch.full_like(y, 3)):  # as one of the negatives, and as the target
        right = truth(x, w, labels, reduction="sum")
        got = _run(x, w, labels, backend, reduction="sum")
        _assert_true(got, right)
        assert _is_zero(got[2][3])


@pytest.mark.parametrize("workspace_bytes", [0, 2**20])
def test_lengths_of_centres_from_1e_minus_6_to_1e3_mix(workspace_bytes: int, backend: str) -> None:
    x, w, y = batch("mixed", 20, 41, 16)
    lengths = 10 ** torch.linspace(-6, 3, 41, dtype=F64)[torch.randperm(41)]
    w = (w / w.norm(dim=1, keepdim=True) * lengths[:, None]).float().double()
    right = truth(x, w, y, reduction="sum")
    loss, dx, dw = _run(x, w, y, backend, reduction="sum", workspace_bytes=workspace_bytes)
    assert_close(loss, right[0], dtype=F32)
    assert_close(dx, right[1], dtype=F32)
    # Short centres have long gradients, which alone would decide the norm: make them equals.
    assert_close(dw * lengths[:, None], right[2] * lengths[:, None], dtype=F32, what="dw·|w|")


@pytest.mark.parametrize("length", [1e-10, 1e-9, 1e-6, 1e4, 1e15])
def test_lengths_of_rows_and_centres_neither_overflow_nor_vanish(length: float, backend: str) -> None:
    x, w, y = batch("random", 12, 21, 16)
    x, w = (
        (length * x / x.norm(dim=1, keepdim=True)).float().double(),
        (length * w / w.norm(dim=1, keepdim=True)).float().double(),
    )
    right = truth(x, w, y, reduction="sum")
    for workspace_bytes in (0, 2**20):
        _assert_true(_run(x, w, y, backend, reduction="sum", workspace_bytes=workspace_bytes), right)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("whole_row", [False, True])
def test_a_row_with_nan_or_inf_loses_its_own_loss_only(bad: float, whole_row: bool, backend: str) -> None:
    x, w, y = batch("mixed", 9, 21, 16)
    right = truth(x, w, y, reduction="none")
    x = x.clone()
    x[4] = torch.where(torch.arange(16) >= (0 if whole_row else 15), bad, x[4])
    others = torch.arange(9) != 4
    for workspace_bytes in (0, 2**20):
        loss, dx, _ = _run(x, w, y, backend, reduction="none", workspace_bytes=workspace_bytes)
        assert loss.isnan().tolist() == (~others).tolist()
        assert_rows_close(loss[others], right[0][others], cap=2e-5, what="loss")
        assert_rows_close(dx[others], right[1][others], cap=2e-5, what="dx")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_centre_with_nan_makes_every_counted_loss_nan(bad: float, backend: str) -> None:
    x, w, y = batch("random", 9, 21, 16)
    w = w.clone()
    w[3, 5] = bad
    y[0], y[1] = -100, 3
    loss, dx, _ = _run(x, w, y, backend, reduction="none")
    assert loss.isnan().tolist() == [False, *[True] * 8]
    assert float(loss[0]) == 0
    assert _is_zero(dx[0])


@pytest.mark.parametrize("frozen", ["embeddings", "weight", "both"])
def test_only_what_wants_a_gradient_gets_one(frozen: str, backend: str) -> None:
    x, w, y = batch("random", 9, 21, 16)
    right = _run(x, w, y, backend)
    a, b = leaves(x, w)
    a.requires_grad_(frozen == "weight")
    b.requires_grad_(frozen == "embeddings")
    loss = loss_on(backend, a, b, y)
    assert torch.equal(loss.detach(), right[0])
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
    for leaf, expected in ((a, right[1]), (b, right[2])):
        assert (leaf.grad is None) if not leaf.requires_grad else torch.equal(leaf.grad, expected)


def test_a_margin_parameter_gets_its_gradient_even_beside_frozen_inputs(backend: str) -> None:
    x, w, y = batch("random", 9, 21, 16)
    dtype = F32 if backend == "triton" else F64
    x, w = x.to(dtype), w.to(dtype)
    grads = []
    for name in (backend, "reference"):
        m = torch.full((9,), 0.4, dtype=F64, requires_grad=True)
        loss_on(name, x, w, y, ArcFace(m.to(device_of(name))), scale=16.0).backward()
        grads.append(m.grad)
    assert float(grads[0].abs().min()) > 0
    assert_close(grads[0], grads[1], dtype=dtype)


def test_no_grad_gives_the_same_loss(backend: str) -> None:
    x, w, y = batch("mixed", 9, 21, 16)
    a, b = leaves(x, w)
    with torch.no_grad():
        loss = loss_on(backend, a, b, y)
    assert not loss.requires_grad
    assert torch.equal(loss, _run(x, w, y, backend)[0])


@pytest.mark.parametrize("workspace_bytes", [0, 9 * 8 * 4, 2**20])
def test_the_sum_of_two_heads_has_the_sum_of_their_gradients(
    workspace_bytes: int, backend: str, small_tiles: int
) -> None:
    data = [batch("random", 9, 21, 16, seed=seed) for seed in (1, 2)]
    w = data[0][1]
    right = [truth(x, w, y, ExpFace()) for x, _, y in data]
    b = w.float().requires_grad_()
    rows = [x.float().requires_grad_() for x, _, _ in data]
    losses = [
        loss_on(backend, a, b, y, workspace_bytes=workspace_bytes)
        for a, (_, _, y) in zip(rows, data, strict=True)
    ]
    sum(losses).backward()
    assert_close(rows[0].grad, right[0][1], dtype=F32)
    assert_close(rows[1].grad, right[1][1], dtype=F32)
    assert_close(b.grad, right[0][2] + right[1][2], dtype=F32)


@pytest.mark.parametrize("workspace_bytes", [0, 9 * 8 * 4, 2**20])
def test_a_second_backward_over_one_graph_gives_the_same_bits(
    workspace_bytes: int, backend: str, small_tiles: int
) -> None:
    x, w, y = batch("mixed", 9, 21, 16)
    a, b = leaves(x, w)
    loss = loss_on(backend, a, b, y, workspace_bytes=workspace_bytes)
    first = torch.autograd.grad(loss, (a, b), retain_graph=True)
    for _ in range(2):
        again = torch.autograd.grad(loss, (a, b), retain_graph=True)
        assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))
    rerun = _run(x, w, y, backend, workspace_bytes=workspace_bytes)[1:]
    assert all(torch.equal(p, q) for p, q in zip(first, rerun, strict=True))


@pytest.mark.parametrize("workspace_bytes", [0, 2**20])
def test_a_factor_of_65536_scales_gradients_exactly(workspace_bytes: int, backend: str) -> None:
    x, w, y = batch("mixed", 9, 21, 16)
    grads = []
    for factor in (1.0, 65536.0):
        a, b = leaves(x, w)
        (factor * loss_on(backend, a, b, y, workspace_bytes=workspace_bytes)).backward()
        grads.append((a.grad * (65536 / factor), b.grad * (65536 / factor)))
    for plain, scaled in zip(*grads, strict=True):
        # float32's smallest numbers, below 1e-38, have fewer digits before than after.
        assert torch.equal(
            torch.where(plain.abs() < 1e-33, 0.0, plain), torch.where(plain.abs() < 1e-33, 0.0, scaled)
        )


def test_row_weights_scale_each_row_by_its_own(backend: str) -> None:
    x, w, y = batch("mixed", 9, 21, 16)
    weights = torch.tensor([0.0, 1.0, 2.0, 1e-3, 1e3, 0.0, 5.0, -1.0, 1.0], dtype=F64)
    results = []
    for name, dtype in (("reference", F64), (backend, F32)):
        a, b = leaves(x, w, dtype)
        rows = loss_on(name, a, b, y, reduction="none")
        (rows.double() * weights).sum().backward()
        results.append((a.grad, b.grad))
    for right, got in zip(*results, strict=True):
        assert_close(got, right, dtype=F32)
    assert _is_zero(results[1][0][[0, 5]])


def test_inputs_are_left_as_they_were(backend: str) -> None:
    before = [t.to(device_of(backend)) for t in batch("mixed", 9, 21, 16)]
    before[:2] = [t.float() for t in before[:2]]
    x, w, y = (t.clone() for t in before)
    x.requires_grad_()
    margin_cross_entropy(x, w, y, backend=backend)
    w.requires_grad_()
    margin_cross_entropy(x, w, y, backend=backend).backward()
    assert all(torch.equal(a.detach(), b) for a, b in zip((x, w, y), before, strict=True))
    assert (x._version, w._version, y._version) == (0, 0, 0)


def test_auto_takes_the_cpu_backend_for_cpu_tensors() -> None:
    x, w, _ = batch("random", 2, 3, 4)
    assert backends.resolve("auto", x, w) == "cpu"
    assert backends.resolve("auto", x.float(), w) == "cpu"


def test_auto_takes_the_reference_only_for_float64_on_a_gpu() -> None:
    class Elsewhere:
        device = torch.device("cuda")

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    assert backends.resolve("auto", Elsewhere(F64), Elsewhere(F32)) == "reference"
    assert backends.resolve("auto", Elsewhere(F32), Elsewhere(torch.bfloat16)) == "triton"


def test_an_unknown_backend_is_refused_by_name() -> None:
    x, w, y = batch("random", 2, 3, 4)
    with pytest.raises(ValueError, match=r"backend: expected one of .*'cpu'.*got 'cuda'"):
        margin_cross_entropy(x, w, y, backend="cuda")


def test_a_broken_extension_raises_its_reason_and_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("undefined symbol: GLIBC_9.9")

    monkeypatch.setattr(native, "_load", broken)
    x, w, y = batch("random", 2, 3, 4)
    with pytest.raises(RuntimeError, match=r'GLIBC_9\.9.*backend="reference"'):
        margin_cross_entropy(x, w, y)
    assert "GLIBC_9.9" in backends.available()["cpu"]
    assert backends.available()["reference"] == "ok"
    margin_cross_entropy(x, w, y, backend="reference")
