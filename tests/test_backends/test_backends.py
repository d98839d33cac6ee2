"""What every backend promises beside accuracy: layouts, subsets, gradients as asked for, refusals by name.

B rows · C classes · D features
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from expface_kernels import ArcFace, ExpFace, backends, margin_cross_entropy, ops
from expface_kernels.backends import native
from expface_kernels.options import LossOptions
from expface_kernels.pipeline import negatives
from tests import sanitizer
from tests.cases import batch, device_of, leaves, loss_on, truth
from tests.test_backends.steps import F32, assert_true, is_zero, run
from tests.tolerances import assert_close

F64 = torch.float64


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
    loss, dx, dw = run(x, w, y, backend, class_subset=subset)
    assert_true((loss, dx, dw[subset]), right)
    assert is_zero(dw[torch.ones(61, dtype=torch.bool).index_fill(0, subset, False)])


def _over_subset(
    x: Tensor, w: Tensor, subset: Tensor, y: Tensor, backend: str, workspace_bytes: int, sparse_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(log l, dx, dw) of some loss on the CPU, from the half of the function that looks at no values.

    y (B,): positions in the subset, which is taken as it lies in memory.
    """
    device = device_of(backend)
    a, b = (t.to(device, copy=True).requires_grad_() for t in (x, w))
    counted = torch.ones(y.shape[0], dtype=torch.bool, device=device)
    options = LossOptions(
        scale=16.0, workspace_bytes=workspace_bytes, backend=backend, sparse_grad=sparse_grad
    )
    n = negatives(a, b, y.to(device), counted, subset, options)
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
    # A class that is listed twice has two gradients, of which any may stay beside the NaN.
    monkeypatch.setattr(sanitizer, "COLLISIONS_ARE_FAULTS", False)
    x, w, y = batch("random", 4, 21, 16)
    y = torch.tensor([0, 3, -100, 0])
    loss, _, dw = run(x, w, y, backend, class_subset=torch.tensor(subset), reduction="none")
    assert loss.isnan().tolist() == [True, True, False, True]
    assert float(loss[2]) == 0
    assert dw.shape == w.shape


def test_a_subset_of_all_classes_changes_nothing(backend: str) -> None:
    x, w, y = batch("mixed", 9, 61, 16)
    for got, right in zip(
        run(x, w, y, backend, class_subset=torch.arange(61)), run(x, w, y, backend), strict=True
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


@pytest.mark.parametrize("frozen", ["embeddings", "weight", "both"])
def test_only_what_wants_a_gradient_gets_one(frozen: str, backend: str) -> None:
    x, w, y = batch("random", 9, 21, 16)
    right = run(x, w, y, backend)
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
    assert torch.equal(loss, run(x, w, y, backend)[0])


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
    rerun = run(x, w, y, backend, workspace_bytes=workspace_bytes)[1:]
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
    assert is_zero(results[1][0][[0, 5]])


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
