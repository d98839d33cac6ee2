"""Labels and floats of every dtype, ignored rows, autocast on the CPU.

B rows · C classes · D features · x (B, D) embeddings · w (C, D) class centres · y (B,) labels
"""

from __future__ import annotations

import itertools

import pytest
import torch

from expface_kernels import margin_cross_entropy, reference
from tests.cases import batch, truth
from tests.steps import WIDE, assert_steps_close, differs, small, step
from tests.tolerances import CAPS, assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


@pytest.mark.parametrize("ignore_index", [-100, -1, 5, 1000])
def test_ignored_rows_count_for_nothing_whatever_their_label_is(ignore_index: int, backend: str) -> None:
    x, w, y = small()
    y = torch.where(y == 5, 6, y)
    y[[1, 4]] = ignore_index
    x[4] = torch.nan  # padding
    loss, dx, dw = step(x, w, y, scale=16.0, ignore_index=ignore_index, backend=backend)
    kept = [b for b in range(8) if b not in (1, 4)]
    expected, expected_dx, expected_dw = truth(x[kept], w, y[kept], scale=16.0)
    assert_steps_close((loss, dx[kept], dw), (expected, expected_dx, expected_dw))
    assert (dx[[1, 4]] == 0).all()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("shape", ["(B,)", "(B, 1)", "strided"])
def test_labels_may_be_of_any_integer_dtype_and_layout_and_stay_as_they_were(
    dtype: torch.dtype, shape: str, backend: str
) -> None:
    x, w, y = small()
    expected = step(x, w, y, backend=backend)
    labels = y.to(dtype)
    if shape == "(B, 1)":
        labels = labels[:, None]
    elif shape == "strided":
        labels = torch.stack([labels, torch.zeros_like(labels)], 1)[:, 0]
        assert not labels.is_contiguous()
    before, version = labels.clone(), labels._version
    assert not differs(step(x, w, labels, backend=backend), expected)
    assert labels.dtype == dtype
    assert torch.equal(labels, before)
    assert labels._version == version


# 156 is −100 and 255 is −1 in eight bits; 44 is 300 and 65436 is −100 in sixteen.
@pytest.mark.parametrize(
    ("dtype", "label", "ignore_index", "classes"),
    [
        (torch.uint8, 156, -100, 200),
        (torch.uint8, 255, -1, 256),
        (torch.uint8, 44, 300, 200),
        (torch.int8, 44, 300, 100),
        (torch.uint16, 65436, -100, 65437),
        (torch.int16, 4464, 70000, 5000),
    ],
)
def test_a_narrow_label_is_not_taken_for_the_ignore_index_that_it_would_wrap_to(
    dtype: torch.dtype, label: int, ignore_index: int, classes: int, backend: str
) -> None:
    x, w, _ = batch("random", 2, classes, 4)
    y = torch.tensor([label, 3])
    narrow = step(x, w, y.to(dtype), ignore_index=ignore_index, reduction="none", backend=backend)
    assert_steps_close(narrow, truth(x, w, y, ignore_index=ignore_index, reduction="none"))
    loss = reference.margin_cross_entropy(x, w, y.to(dtype), ignore_index=ignore_index, reduction="none")
    assert_close(loss, narrow[0], dtype=WIDE)


@pytest.mark.parametrize(("x_dtype", "w_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_any_mix_of_dtypes_gives_each_input_its_own(
    x_dtype: torch.dtype, w_dtype: torch.dtype, backend: str
) -> None:
    """The loss is float32, or float64 where an input is; truth is taken at the values as they are stored."""
    x, w, y = small()
    x, w = x.to(x_dtype), w.to(w_dtype)
    before, address = w.clone(), w.data_ptr()
    exact = truth(x, w, y)
    x.requires_grad_(), w.requires_grad_()
    loss = margin_cross_entropy(x, w, y, backend=backend)
    loss.backward()
    computed = WIDE if WIDE in (x_dtype, w_dtype) else torch.float32
    assert loss.dtype == computed
    assert_close(loss, exact[0], dtype=computed, what="loss")
    for name, leaf, grad in (("dx", x, exact[1]), ("dw", w, exact[2])):
        assert leaf.grad.dtype == leaf.dtype, name
        assert leaf.grad.shape == leaf.shape, name
        assert_close(leaf.grad, grad, dtype=max(leaf.dtype, computed, key=CAPS.__getitem__), what=name)
    assert w.dtype == w_dtype
    assert w.data_ptr() == address
    assert torch.equal(w, before)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("x_dtype", "w_dtype"), [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=str
)
def test_autocast_changes_neither_dtypes_nor_results_on_the_cpu(
    autocast: torch.dtype, x_dtype: torch.dtype, w_dtype: torch.dtype, backend: str
) -> None:
    x, w, y = small()
    x, w = x.to(x_dtype), w.to(w_dtype)
    outside = step(x, w, y, backend=backend)
    x, w = x.requires_grad_(), w.requires_grad_()
    with torch.autocast("cpu", dtype=autocast):
        loss = margin_cross_entropy(x, w, y, backend=backend)
    # Outside, as torch wants it: there the reference's own backward would be cast.
    dx, dw = torch.autograd.grad(loss, [x, w])
    assert [value.dtype for value in (loss, dx, dw)] == [torch.float32, x_dtype, w_dtype]
    assert not differs((loss, dx, dw), outside)


def test_a_linear_layer_under_autocast_feeds_the_loss_its_16_bit_rows() -> None:
    x, w, y = (value.float() if value.is_floating_point() else value for value in small())
    layer = torch.nn.Linear(16, 16)
    w.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = layer(x)
        loss = margin_cross_entropy(rows, w, y)
    loss.backward()
    assert rows.dtype == torch.bfloat16
    assert loss.dtype == layer.weight.grad.dtype == w.grad.dtype == torch.float32
    assert_close(loss, truth(rows, w, y)[0], dtype=torch.float32)
