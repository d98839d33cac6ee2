"""The pool of buffers: never one buffer for two tensors, no new memory once a training loop is under way."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
import torch

from expface_kernels import margin_cross_entropy
from expface_kernels.backends import workspace as pool
from tests.cases import batch, leaves
from tests.tolerances import SUM_ORDER


@pytest.fixture(autouse=True)
def _own_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_free", [])  # what earlier tests still hold returns to the other list


def _span(tensor: torch.Tensor) -> range:
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numel", [0, 1, 7, 1000])
def test_a_loan_has_the_size_and_dtype_asked_for_and_is_aligned(numel: int, dtype: torch.dtype) -> None:
    tensor = pool.allocate(numel, dtype)
    assert (tensor.shape, tensor.dtype) == ((numel,), dtype)
    assert numel == 0 or tensor.data_ptr() % 64 == 0
    tensor.fill_(1)  # writable to its end
    assert tensor.sum() == numel


def test_two_live_loans_never_overlap() -> None:
    loans = [pool.allocate(numel, torch.float32) for numel in (100, 100, 50, 1000, 1)]
    del loans[1]
    loans += [pool.allocate(100, torch.float32), pool.allocate(10, torch.float64)]
    for i, tensor in enumerate(loans):
        for other in loans[:i]:
            assert not set(_span(tensor)) & set(_span(other))


def test_a_buffer_comes_back_when_its_tensor_dies_and_serves_smaller_needs_too() -> None:
    first = pool.allocate(1000, torch.float32)
    address = first.data_ptr()
    del first
    assert pool.allocate(900, torch.float32).data_ptr() == address
    assert pool.allocate(500, torch.float64).data_ptr() == address


def test_a_view_keeps_its_buffer_from_coming_back() -> None:
    whole = pool.allocate(1000, torch.float32)
    view = whole[10:20].view(2, 5)
    address = whole.data_ptr()
    del whole
    other = pool.allocate(1000, torch.float32)
    assert other.data_ptr() != address
    del view
    assert pool.allocate(1000, torch.float32).data_ptr() == address


def test_a_tensor_saved_for_the_backward_keeps_its_buffer() -> None:
    factor = pool.allocate(100, torch.float32).fill_(2.0)
    x = torch.ones(100, requires_grad=True)
    loss = (x * factor).sum()
    del factor
    scribble = pool.allocate(100, torch.float32).fill_(-1.0)
    loss.backward()
    assert torch.equal(x.grad, torch.full((100,), 2.0))
    del scribble


def test_the_smallest_buffer_that_fits_is_taken() -> None:
    large, small = pool.allocate(10_000, torch.float32), pool.allocate(100, torch.float32)
    small_address, large_address = small.data_ptr(), large.data_ptr()
    del large, small
    taken = pool.allocate(90, torch.float32)
    assert taken.data_ptr() == small_address
    assert pool.allocate(9_000, torch.float32).data_ptr() == large_address


def test_a_buffer_a_little_too_small_is_given_up_and_clear_gives_up_all() -> None:
    for numel in (10_000, 11_000, 19_000):  # each takes the place of the one before
        loan = pool.allocate(numel, torch.float32)
        assert not pool._free
        del loan
        assert len(pool._free) == 1
    pool.clear()
    assert not pool._free


def test_heads_of_several_shapes_that_take_turns_keep_their_buffers() -> None:
    addresses: list[set[int]] = []
    for _ in range(3):
        loans = {numel: pool.allocate(numel, torch.float32) for numel in (100_000, 10_000, 1_000_000)}
        addresses.append({loan.data_ptr() for loan in loans.values()})
        del loans
    assert addresses[0] == addresses[1] == addresses[2]


def test_what_nobody_borrows_for_long_goes_back_to_the_system() -> None:
    large = pool.allocate(1_000_000, torch.float32)
    del large
    loans = 0
    while any(free.nbytes > 10**6 for _, free in pool._free):
        pool.allocate(10_000, torch.float32)  # and returned
        loans += 1
    assert loans == pool.MAX_IDLE // 2 + 1


@pytest.mark.parametrize("keep", [0, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_loop_stops_asking_for_memory(
    keep: int, dtype: torch.dtype, small_tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    empty = np.empty

    def counted(nbytes: int, dtype: type) -> np.ndarray:
        made.append(nbytes)
        return empty(nbytes, dtype)

    monkeypatch.setattr(pool.np, "empty", counted)
    x, w, y = batch("random", 16, 100, 8)
    for step in range(5):
        if step == 3:
            made.clear()
        a, b = leaves(x, w, dtype)
        margin_cross_entropy(a, b, y, workspace_bytes=keep, backend="cpu").backward()
    assert made == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_kept_survive_later_steps(dtype: torch.dtype, small_tiles: int) -> None:
    x, w, y = batch("random", 16, 100, 8)
    kept = []
    for _ in range(3):
        a, b = leaves(x, w, dtype)
        margin_cross_entropy(a, b, y, backend="cpu").backward()
        kept.append((b.grad, b.grad.clone(), b.grad.detach()[3:5], b.grad[3:5].clone()))
        b.grad = None
        a, b = leaves(-x, w, dtype)
        margin_cross_entropy(a, b, y, backend="cpu").backward()
    for whole, whole_then, part, part_then in kept:
        assert torch.equal(whole, whole_then)
        assert torch.equal(part, part_then)


def test_two_forwards_before_their_backwards_hold_two_workspaces(small_tiles: int) -> None:
    x, w, y = batch("random", 16, 100, 8)
    other, _, labels = batch("random", 16, 100, 8, seed=5)
    grads = []
    for together in (False, True):
        a, b = leaves(x, w)
        c = other.float().requires_grad_()
        if together:
            first = margin_cross_entropy(a, b, y, backend="cpu")
            second = margin_cross_entropy(c, b, labels, backend="cpu")
            (first + second).backward()
        else:
            margin_cross_entropy(a, b, y, backend="cpu").backward()
            margin_cross_entropy(c, b, labels, backend="cpu").backward()
        grads.append((a.grad, c.grad, b.grad))
    for alone, both in zip(*grads, strict=True):
        torch.testing.assert_close(both, alone, rtol=SUM_ORDER, atol=SUM_ORDER * float(alone.abs().max()))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_threads_may_borrow_at_the_same_time() -> None:
    failures: list[BaseException] = []

    def borrow(seed: int) -> None:
        sizes = (1, 10, 100, 1000, 10_000)
        try:
            for step in range(20_000):
                numel = sizes[(step * 7 + seed) % 5]
                loan = pool.allocate(numel, torch.float32)
                assert loan.shape == (numel,)
        except BaseException as error:  # reported by the test itself
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet inside a call
    try:
        threads = [threading.Thread(target=borrow, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
