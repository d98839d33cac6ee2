"""Users' mistakes: each raises an error that names the argument, what was expected and what came.

B rows · C classes · D features; every call here has B = 4, C = 10, D = 6 but for the one thing that is wrong
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expface_kernels import ArcFace, ExpFace, MarginSoftmaxHead, backends, margin_cross_entropy
from expface_kernels.backends import native
from expface_kernels.functional import topk_cosine

X, W, Y = torch.ones(4, 6), torch.eye(10, 6) + 1, torch.tensor([0, 3, 3, 9])


def call(**changes: Any) -> Any:
    """margin_cross_entropy of good arguments with some replaced."""
    return margin_cross_entropy(**{"embeddings": X, "weight": W, "labels": Y, **changes})


def raises(kind: type[Exception], text: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(text)}$")


def test_the_unchanged_call_is_fine() -> None:
    assert torch.isfinite(call())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8], ids=str)
@pytest.mark.parametrize(("label", "row"), [(10, 0), (-1, 2), (-2, 3), (11, 1), (127, 0), (-101, 2)])
def test_a_label_out_of_range_names_itself_and_its_row(
    label: int, row: int, dtype: torch.dtype, backend: str
) -> None:
    labels = Y.to(dtype, copy=True)
    labels[row] = label
    with raises(
        ValueError, f"labels: expected 0 <= label < 10 or ignore_index=-100, got {label} in row {row}"
    ):
        call(labels=labels, backend=backend)


def test_labels_that_count_from_one_are_caught_at_the_last_class(backend: str) -> None:
    with raises(ValueError, "labels: expected 0 <= label < 10 or ignore_index=-100, got 10 in row 3"):
        call(labels=Y + 1, backend=backend)


def test_the_ignore_index_in_force_is_the_one_in_the_text() -> None:
    labels = torch.tensor([0, -1, -100, 2])
    with raises(ValueError, "labels: expected 0 <= label < 10 or ignore_index=-1, got -100 in row 2"):
        call(labels=labels, ignore_index=-1)


@pytest.mark.parametrize("label", [10, 2**31, 2**63 - 1, -(2**63)])
def test_huge_labels_are_out_of_range_too(label: int) -> None:
    labels = torch.tensor([0, label, 3, 4])
    with raises(ValueError, f"labels: expected 0 <= label < 10 or ignore_index=-100, got {label} in row 1"):
        call(labels=labels)


def test_unsigned_labels_past_the_signed_range_raise() -> None:
    labels = torch.tensor([0, 2**64 - 1, 2, 3], dtype=torch.uint64)
    with pytest.raises(
        ValueError,
        match=r"^labels: expected 0 <= label < 10 or ignore_index=-100, got 18446744073709551615 in row 1$",
    ):
        call(labels=labels)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bool, torch.complex64], ids=str
)
def test_labels_that_are_not_integers_raise(dtype: torch.dtype) -> None:
    with raises(TypeError, f"labels: expected an integer dtype, got {dtype}"):
        call(labels=torch.ones(4).to(dtype))


@pytest.mark.parametrize("shape", [(), (3,), (5,), (1, 4), (4, 2), (4, 1, 1), (2, 2), (0,)])
def test_labels_of_another_shape_raise(shape: tuple[int, ...]) -> None:
    with raises(ValueError, f"labels: expected shape (4,) or (4, 1), got {shape}"):
        call(labels=torch.zeros(shape, dtype=torch.int64))


NOT_TENSORS: tuple[Any, ...] = (None, [0, 3, 3, 9], 3, "labels", torch.ones(2).numpy())


@pytest.mark.parametrize("value", NOT_TENSORS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    ("name", "shape"),
    [("embeddings", "(B, D)"), ("weight", "(C, D)"), ("labels", "(B,)"), ("class_subset", "(S,)")],
)
def test_what_is_not_a_tensor_raises(name: str, shape: str, value: Any) -> None:
    if name == "class_subset" and value is None:
        return  # its default
    with raises(TypeError, f"{name}: expected a tensor {shape}, got {type(value).__name__}"):
        call(**{name: value})


@pytest.mark.parametrize("shape", [(), (6,), (1, 4, 6)])
@pytest.mark.parametrize(("name", "expected"), [("embeddings", "(B, D)"), ("weight", "(C, D)")])
def test_rows_and_centres_must_be_matrices(name: str, expected: str, shape: tuple[int, ...]) -> None:
    with raises(ValueError, f"{name}: expected shape {expected}, got {shape}"):
        call(**{name: torch.ones(shape)})


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", ["embeddings", "weight"])
def test_rows_and_centres_must_be_of_a_supported_float(name: str, dtype: torch.dtype) -> None:
    value = (X if name == "embeddings" else W).to(dtype)
    with raises(TypeError, f"{name}: expected float32, float64, bfloat16 or float16, got {dtype}"):
        call(**{name: value})


def test_a_weight_the_other_way_round_raises() -> None:
    with raises(ValueError, "embeddings: expected 10 features as in weight (6, 10), got shape (4, 6)"):
        call(weight=W.T)


def test_a_weight_without_classes_or_features_raises() -> None:
    with raises(ValueError, "weight: expected at least one class and one feature, got shape (0, 6)"):
        call(weight=W[:0])
    with raises(ValueError, "weight: expected at least one class and one feature, got shape (10, 0)"):
        call(embeddings=X[:, :0], weight=W[:, :0])


@pytest.mark.parametrize(
    ("name", "like", "home"),
    [
        ("embeddings", "weight", "cpu"),
        ("weight", "weight", "meta"),
        ("labels", "embeddings", "cpu"),
        ("class_subset", "weight", "cpu"),
    ],
)
def test_tensors_on_different_devices_raise(name: str, like: str, home: str) -> None:
    here = {"embeddings": X, "weight": W, "labels": Y, "class_subset": torch.arange(10)}[name]
    # A weight elsewhere is reported from the embeddings' side.
    subject, came = ("embeddings", "cpu") if name == "weight" else (name, "meta")
    with raises(ValueError, f"{subject}: expected on {home} like {like}, got on {came}"):
        call(**{name: here.to("meta")})


@pytest.mark.parametrize(
    ("subset", "came"),
    [
        ([3, 0, 9], "3 classes from 0 to 9, some of them repeated or not in order"),
        ([0, 3, 3, 9], "4 classes from 0 to 9, some of them repeated or not in order"),
        ([0, 3, 10], "3 classes from 0 to 10"),
        ([-1, 0, 3, 9], "4 classes from -1 to 9"),
        ([9, 3, 0, -1], "4 classes from -1 to 9, some of them repeated or not in order"),
    ],
)
def test_a_subset_out_of_order_or_range_raises(subset: list[int], came: str, backend: str) -> None:
    with raises(ValueError, f"class_subset: expected sorted classes without repeats in [0, 10), got {came}"):
        call(class_subset=torch.tensor(subset), backend=backend)


@pytest.mark.parametrize("shape", [(0,), (), (10, 1)])
def test_a_subset_that_is_empty_or_no_list_raises(shape: tuple[int, ...]) -> None:
    with raises(ValueError, f"class_subset: expected shape (S,) with S >= 1, got {shape}"):
        call(class_subset=torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float32], ids=str)
def test_a_subset_of_another_dtype_raises(dtype: torch.dtype) -> None:
    with raises(TypeError, f"class_subset: expected int64, got {dtype}"):
        call(class_subset=torch.ones(10).to(dtype))


@pytest.mark.parametrize("subset", [[0, 3], [0, 9], [3, 9], [4, 5]])
def test_a_label_that_the_subset_lacks_raises(subset: list[int], backend: str) -> None:
    row = next(b for b, label in enumerate(Y.tolist()) if label not in subset)
    text = (
        f"labels: every counted label must be in class_subset, got {int(Y[row])} in row {row}, which is not"
    )
    with raises(ValueError, text):
        call(class_subset=torch.tensor(subset), backend=backend)


def test_a_label_out_of_range_is_that_with_a_subset_too() -> None:
    with raises(ValueError, "labels: expected 0 <= label < 10 or ignore_index=-100, got 12 in row 0"):
        call(labels=Y + 12, class_subset=torch.tensor([0, 3, 9]))


MAKERS = pytest.mark.parametrize(
    "make", [call, lambda **options: MarginSoftmaxHead(6, 10, **options)], ids=["function", "head"]
)


@MAKERS
@pytest.mark.parametrize("value", [1e-7, 1e7, 1e300, 1e-300])
def test_a_scale_that_float32_cannot_bear_raises(make: Any, value: float) -> None:
    with raises(ValueError, f"scale: expected 1e-06 to 1e+06, where float32 suffices, got {value}"):
        make(scale=value)


@MAKERS
@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.inf, -math.inf, math.nan])
def test_a_scale_out_of_range_raises(make: Any, value: float) -> None:
    with raises(ValueError, f"scale: expected a finite number above 0, got {value}"):
        make(scale=value)


@MAKERS
@pytest.mark.parametrize("value", ["64", True, None, torch.ones(())], ids=lambda value: type(value).__name__)
def test_a_number_of_another_type_raises(make: Any, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^scale: expected a number, got {type(value).__name__}"):
        make(scale=value)


@MAKERS
def test_a_gradient_tolerance_of_0_is_accepted_with_a_warning(make: Any) -> None:
    with pytest.warns(DeprecationWarning, match="gradient_tolerance: has no effect"):
        make(gradient_tolerance=0)


@MAKERS
@pytest.mark.parametrize("value", [1e-3, -1e-3, 1.0, math.nan])
def test_a_gradient_tolerance_is_not_offered_yet(make: Any, value: float) -> None:
    text = f"gradient_tolerance: expected 0 (exact), the only one this version has, got {value}"
    with raises(ValueError, text):
        make(gradient_tolerance=value)


@MAKERS
@pytest.mark.parametrize(
    ("name", "choices"),
    [("reduction", "('mean', 'sum', 'none')"), ("target_gradient", "('exact', 'detached')")],
)
@pytest.mark.parametrize("value", ["average", None, "Exact", 1, ["mean"]], ids=repr)
def test_an_unknown_choice_raises_with_the_known_ones(make: Any, name: str, choices: str, value: Any) -> None:
    with raises(ValueError, f"{name}: expected one of {choices}, got {value!r}"):
        make(**{name: value})


@pytest.mark.parametrize("value", ["cuda", "", None, "CPU"], ids=repr)
def test_an_unknown_backend_raises_with_the_known_ones(value: Any) -> None:
    text = f"backend: expected one of ['auto', 'reference', 'cpu', 'triton'], got {value!r}"
    with raises(ValueError, text):
        call(backend=value)
    with raises(ValueError, text):
        topk_cosine(X, W, 1, backend=value)
    with raises(ValueError, text):
        MarginSoftmaxHead(6, 10, backend=value)(X, Y)


@MAKERS
@pytest.mark.parametrize("name", ["ignore_index", "workspace_bytes"])
@pytest.mark.parametrize("value", [0.0, "0", None, True, torch.ones((), dtype=torch.int64)], ids=repr)
def test_an_integer_of_another_type_raises(make: Any, name: str, value: Any) -> None:
    with raises(TypeError, f"{name}: expected an int, got {type(value).__name__} {value!r}"):
        make(**{name: value})


@MAKERS
def test_a_negative_workspace_raises(make: Any) -> None:
    with raises(ValueError, "workspace_bytes: expected at least 0, got -1"):
        make(workspace_bytes=-1)


@MAKERS
def test_a_margin_that_is_not_callable_or_a_class_raises(make: Any) -> None:
    with raises(TypeError, "margin: expected a callable theta -> psi such as ExpFace(), got float"):
        make(margin=0.5)
    with raises(TypeError, "margin: expected a callable theta -> psi such as ExpFace(), got str"):
        make(margin="ArcFace")
    for kind in (ExpFace, ArcFace, torch.nn.Identity):
        text = f"margin: expected an instance such as {kind.__name__}(), got the class itself"
        with raises(TypeError, text):
            make(margin=kind)


@MAKERS
@pytest.mark.parametrize(
    "name", ["label_smoothing", "weights", "m", "s", "temperature", "num_sub_centers", "Scale"]
)
def test_unknown_keywords_raise(make: Any, name: str) -> None:
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'"):
        make(**{name: 0.1})


def test_options_are_keywords_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        margin_cross_entropy(X, W, Y, ExpFace(), 64.0)
    with pytest.raises(TypeError, match="positional"):
        MarginSoftmaxHead(6, 10, ExpFace(), 64.0)


@pytest.mark.parametrize("name", ["embedding_size", "num_classes"])
def test_sizes_of_a_head_are_integers_of_at_least_one(name: str) -> None:
    sizes = {"embedding_size": 6, "num_classes": 10}
    for value in (0, -3):
        with raises(ValueError, f"{name}: expected at least 1, got {value}"):
            MarginSoftmaxHead(**{**sizes, name: value})
    for value in (6.0, "6", True, None):
        with raises(TypeError, f"{name}: expected an int, got {type(value).__name__} {value!r}"):
            MarginSoftmaxHead(**{**sizes, name: value})


def test_sizes_of_a_head_may_be_integers_of_any_kind() -> None:
    head = MarginSoftmaxHead(np.int32(6), np.int64(10), seed=np.uint8(3))
    assert [type(n) for n in (head.embedding_size, head.num_classes, head.seed)] == [int, int, int]
    assert MarginSoftmaxHead(6, Y.max() + 1).num_classes == int(Y.max()) + 1
    with raises(TypeError, f"num_classes: expected an int, got ndarray {np.zeros(2)!r}"):
        MarginSoftmaxHead(6, np.zeros(2))


def test_seed_and_dtype_of_a_head_are_checked() -> None:
    with raises(TypeError, "seed: expected an int, got float 0.5"):
        MarginSoftmaxHead(6, 10, seed=0.5)
    with raises(TypeError, "dtype: expected float32, float64, bfloat16 or float16, got str 'float16'"):
        MarginSoftmaxHead(8, 4, dtype="float16")
    text = f"num_classes: expected at most 2**59 numbers of centres, got 512·{10**18}"
    with raises(ValueError, text):
        MarginSoftmaxHead(512, 10**18)
    with raises(TypeError, "return_stats: expected True or False, got str 'no'"):
        MarginSoftmaxHead(6, 10)(X, Y, return_stats="no")
    with raises(TypeError, "dtype: expected float32, float64, bfloat16 or float16, got torch.int64"):
        MarginSoftmaxHead(6, 10, dtype=torch.int64)


def test_k_outside_the_classes_raises(backend: str) -> None:
    head = MarginSoftmaxHead(6, 10, backend=backend)
    with raises(ValueError, "k: expected at most the 10 classes there are, got 11"):
        head.topk(X, 11)
    for k in (0, -1):
        with raises(ValueError, f"k: expected at least 1, got {k}"):
            head.topk(X, k)
    for k in (1.0, True, None):
        with raises(TypeError, f"k: expected an int, got {type(k).__name__} {k!r}"):
            head.topk(X, k)
    with raises(ValueError, "embeddings: expected 6 features as in weight (10, 6), got shape (4, 5)"):
        head.topk(X[:, :5], 1)


def test_cpu_tensors_with_the_triton_backend_raise_and_name_the_reference() -> None:
    assert backends.available()["triton"] != "ok"
    for attempt in (lambda: call(backend="triton"), lambda: topk_cosine(X, W, 1, backend="triton")):
        with pytest.raises(RuntimeError, match=r'^backend "triton" cannot .*backend="reference"'):
            attempt()


def test_a_broken_extension_is_reported_and_never_replaced_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("_C.so: wrong ELF class")

    assert backends.available()["cpu"] == "ok"
    monkeypatch.setattr(native, "_load", broken)
    reason = "the C++ extension does not load: _C.so: wrong ELF class"
    assert backends.available()["cpu"] == reason
    assert backends.available()["reference"] == "ok"
    text = f'backend "cpu" cannot serve this call: {reason}. backend="reference" always can, slowly'
    head = MarginSoftmaxHead(6, 10)
    for attempt in (call, lambda: call(backend="cpu"), lambda: head(X, Y), lambda: head.topk(X, 1)):
        with raises(RuntimeError, text):
            attempt()
    assert torch.isfinite(call(backend="reference"))


def test_nothing_is_computed_from_a_mistake() -> None:
    """A raise leaves neither a gradient nor a changed input behind."""
    w = W.clone().requires_grad_()
    before: Tensor = w.detach().clone()
    with pytest.raises(ValueError, match=r"^labels"):
        call(weight=w, labels=Y + 1)
    assert w.grad is None
    assert torch.equal(w.detach(), before)
