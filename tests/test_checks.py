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
U64 = torch.tensor([0, 2**64 - 1, 2, 3], dtype=torch.uint64)

Errors = list[tuple[str, Any, type[Exception], str]]
"""(argument, its wrong value, kind of error, text after "argument: expected ")."""


def call(**changes: Any) -> Any:
    """margin_cross_entropy of good arguments with some replaced."""
    return margin_cross_entropy(**{"embeddings": X, "weight": W, "labels": Y, **changes})


def build(**changes: Any) -> MarginSoftmaxHead:
    return MarginSoftmaxHead(**{"embedding_size": 6, "num_classes": 10, **changes})


def raises(kind: type[Exception], text: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(text)}$")


def table(errors: Errors) -> Any:
    """A test for each row."""
    rows = [(name, value, kind, f"{name}: expected {text}") for name, value, kind, text in errors]
    return pytest.mark.parametrize(
        ("name", "value", "kind", "text"), rows, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(rows)]
    )


def test_the_unchanged_call_is_fine() -> None:
    assert torch.isfinite(call())


def label(value: int, row: int, dtype: torch.dtype = torch.int64) -> tuple[str, Any, type[Exception], str]:
    """One label out of range."""
    labels = Y.to(dtype, copy=True)
    labels[row] = value
    return "labels", labels, ValueError, f"0 <= label < 10 or ignore_index=-100, got {value} in row {row}"


def subset(classes: list[int], came: str) -> tuple[str, Any, type[Exception], str]:
    text = f"sorted classes without repeats in [0, 10), got {came}"
    return "class_subset", torch.tensor(classes), ValueError, text


IN_DISORDER = "some of them repeated or not in order"
VALUES: Errors = [
    *(label(*at, dtype) for at in ((10, 0), (-1, 2), (127, 0)) for dtype in (torch.int64, torch.int8)),
    *(label(value, 1) for value in (2**31, 2**63 - 1, -(2**63), -101)),
    ("labels", Y + 1, ValueError, "0 <= label < 10 or ignore_index=-100, got 10 in row 3"),
    ("labels", U64, ValueError, f"0 <= label < 10 or ignore_index=-100, got {2**64 - 1} in row 1"),
    subset([3, 0, 9], f"3 classes from 0 to 9, {IN_DISORDER}"),
    subset([0, 3, 3, 9], f"4 classes from 0 to 9, {IN_DISORDER}"),
    subset([0, 3, 10], "3 classes from 0 to 10"),
    subset([-1, 0, 3, 9], "4 classes from -1 to 9"),
    subset([9, 3, 0, -1], f"4 classes from -1 to 9, {IN_DISORDER}"),
]


@table(VALUES)
def test_values_that_a_backend_must_not_read(
    name: str, value: Any, kind: type[Exception], text: str, backend: str
) -> None:
    with raises(kind, text):
        call(**{name: value}, backend=backend)


SHAPES = {"embeddings": "(B, D)", "weight": "(C, D)", "labels": "(B,)", "class_subset": "(S,)"}
FLOATS = "float32, float64, bfloat16 or float16"
TENSORS: Errors = [
    *(
        (name, value, TypeError, f"a tensor {shape}, got {type(value).__name__}")
        for name, shape in SHAPES.items()
        for value in (None, [0, 3, 3, 9], 3, "labels", np.ones(2))
        if name != "class_subset" or value is not None
    ),
    *(
        (name, torch.ones(shape), ValueError, f"shape {SHAPES[name]}, got {shape}")
        for name in ("embeddings", "weight")
        for shape in ((), (6,), (1, 4, 6))
    ),
    *(
        (name, value.to(dtype), TypeError, f"{FLOATS}, got {dtype}")
        for name, value in (("embeddings", X), ("weight", W))
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
    *(
        ("labels", torch.ones(4).to(dtype), TypeError, f"an integer dtype, got {dtype}")
        for dtype in (torch.float32, torch.float16, torch.bool, torch.complex64)
    ),
    *(
        ("labels", Y.new_zeros(shape), ValueError, f"shape (4,) or (4, 1), got {shape}")
        for shape in ((), (3,), (5,), (1, 4), (4, 2), (4, 1, 1), (2, 2), (0,))
    ),
    *(
        ("class_subset", Y.new_zeros(shape), ValueError, f"shape (S,) with S >= 1, got {shape}")
        for shape in ((0,), (), (10, 1))
    ),
    *(
        ("class_subset", torch.ones(10).to(dtype), TypeError, f"int64, got {dtype}")
        for dtype in (torch.int32, torch.bool, torch.float32)
    ),
    ("embeddings", X[:, :5], ValueError, "6 features as in weight (10, 6), got shape (4, 5)"),
    ("embeddings", X.to("meta"), ValueError, "on cpu like weight, got on meta"),
    ("labels", Y.to("meta"), ValueError, "on cpu like embeddings, got on meta"),
    ("class_subset", torch.arange(10, device="meta"), ValueError, "on cpu like weight, got on meta"),
    ("weight", W[:0], ValueError, "at least one class and one feature, got shape (0, 6)"),
    *(
        ("backend", value, ValueError, f"one of ['auto', 'reference', 'cpu', 'triton'], got {value!r}")
        for value in ("cuda", "", None, "CPU")
    ),
]


@table(TENSORS)
def test_tensors_and_backends_of_the_function(
    name: str, value: Any, kind: type[Exception], text: str
) -> None:
    with raises(kind, text):
        call(**{name: value})
    if name == "backend":
        with raises(kind, text):
            topk_cosine(X, W, 1, backend=value)
        with raises(kind, text):
            build(backend=value)


def no_number(name: str, kind: str, value: Any) -> tuple[str, Any, type[Exception], str]:
    return name, value, TypeError, f"{kind}, got {type(value).__name__} {value!r}"


OPTIONS: Errors = [
    *(("scale", value, ValueError, f"a finite number above 0, got {value}") for value in (0, -1.0, math.inf)),
    ("scale", math.nan, ValueError, "a finite number above 0, got nan"),
    *(
        ("scale", value, ValueError, f"1e-06 to 1e+06, where float32 suffices, got {value}")
        for value in (1e-7, 1e7, 1e300, 1e-300)
    ),
    *(("scale", value, TypeError, f"a number, got {type(value).__name__}") for value in ("64", True, None)),
    *(
        no_number(name, "an int", value)
        for name in ("ignore_index", "workspace_bytes")
        for value in (0.0, "0", None, True, torch.ones((), dtype=torch.int64))
    ),
    ("workspace_bytes", -1, ValueError, "at least 0, got -1"),
    *(
        (name, value, ValueError, f"one of {choices}, got {value!r}")
        for name, choices in (
            ("reduction", "('mean', 'sum', 'none')"),
            ("target_gradient", "('exact', 'detached')"),
        )
        for value in ("average", None, "Exact", 1, ["mean"])
    ),
    *(
        ("margin", value, TypeError, f"a callable theta -> psi such as ExpFace(), got {type(value).__name__}")
        for value in (0.5, "ArcFace")
    ),
    *(
        ("margin", kind, TypeError, f"an instance such as {kind.__name__}(), got the class itself")
        for kind in (ExpFace, ArcFace, torch.nn.Identity)
    ),
    *(
        ("gradient_tolerance", value, ValueError, f"0 (exact), the only one this version has, got {value}")
        for value in (1e-3, -1e-3, 1.0, math.nan)
    ),
]


@table(OPTIONS)
def test_options_of_the_function_and_of_a_head_built_or_assigned_to(
    name: str, value: Any, kind: type[Exception], text: str
) -> None:
    for make in (call, build):
        with raises(kind, text):
            make(**{name: value})
    if name != "gradient_tolerance":  # a head keeps none
        head = build()
        before = getattr(head, name)
        with raises(kind, text):
            setattr(head, name, value)
        assert getattr(head, name) is before


HEAD: Errors = [
    *(
        (name, n, ValueError, f"at least 1, got {n}")
        for name in ("embedding_size", "num_classes")
        for n in (0, -3)
    ),
    *(
        no_number(name, "an int", value)
        for name in ("embedding_size", "num_classes")
        for value in (6.0, "6", True, None)
    ),
    no_number("num_classes", "an int", np.zeros(2)),
    ("num_classes", 10**18, ValueError, f"at most 2**59 numbers of centres, got 6·{10**18}"),
    no_number("seed", "an int", 0.5),
    ("dtype", "float16", TypeError, f"{FLOATS}, got str 'float16'"),
    ("dtype", torch.int64, TypeError, f"{FLOATS}, got torch.int64"),
    ("embedding_grad_scale", 1.0, ValueError, "None without process_group, got 1.0"),
    ("equal_rows", True, ValueError, "False without process_group, got True"),
]


@table(HEAD)
def test_arguments_of_a_head(name: str, value: Any, kind: type[Exception], text: str) -> None:
    with raises(kind, text):
        build(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("sample_rate", value) for value in (0.0, 1.5, True)),
        ("sparse_grad", 1),
        ("equal_rows", None),
        *(("embedding_grad_scale", value) for value in (0, math.inf, "sum")),
        ("process_group", "world"),
    ],
)
def test_options_of_a_head_for_samples_and_ranks(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected") as built:
        build(**{name: value})
    if name != "process_group":
        head = build()
        before = getattr(head, name)
        with pytest.raises(type(built.value), match=f"^{name}: expected"):
            setattr(head, name, value)
        assert getattr(head, name) is before


K: Errors = [
    ("k", 11, ValueError, "at most the 10 classes there are, got 11"),
    *(("k", k, ValueError, f"at least 1, got {k}") for k in (0, -1)),
    *(no_number("k", "an int", k) for k in (1.0, True, None)),
]


@table(K)
def test_k_outside_the_classes(name: str, value: Any, kind: type[Exception], text: str, backend: str) -> None:
    with raises(kind, text):
        build(backend=backend).topk(X, value)


def test_mistakes_that_take_two_arguments(backend: str) -> None:
    with raises(ValueError, "labels: expected 0 <= label < 10 or ignore_index=-1, got -100 in row 2"):
        call(labels=torch.tensor([0, -1, -100, 2]), ignore_index=-1, backend=backend)
    with raises(ValueError, "labels: expected 0 <= label < 10 or ignore_index=-100, got 12 in row 0"):
        call(labels=Y + 12, class_subset=torch.tensor([0, 3, 9]), backend=backend)
    with raises(ValueError, "weight: expected at least one class and one feature, got shape (10, 0)"):
        call(embeddings=X[:, :0], weight=W[:, :0], backend=backend)
    with raises(ValueError, "embeddings: expected 10 features as in weight (6, 10), got shape (4, 6)"):
        call(weight=W.T, backend=backend)
    with raises(ValueError, "embeddings: expected on meta like weight, got on cpu"):
        call(weight=W.to("meta"), backend=backend)
    with raises(TypeError, "return_stats: expected True or False, got str 'no'"):
        build(backend=backend)(X, Y, return_stats="no")
    with raises(ValueError, "embeddings: expected 6 features as in weight (10, 6), got shape (4, 5)"):
        build(backend=backend).topk(X[:, :5], 1)


@pytest.mark.parametrize("subset", [[0, 3], [0, 9], [3, 9], [4, 5]])
def test_a_label_that_the_subset_lacks_raises(subset: list[int], backend: str) -> None:
    row = next(b for b, label in enumerate(Y.tolist()) if label not in subset)
    text = (
        f"labels: every counted label must be in class_subset, got {int(Y[row])} in row {row}, which is not"
    )
    with raises(ValueError, text):
        call(class_subset=torch.tensor(subset), backend=backend)


@pytest.mark.parametrize("make", [call, build])
def test_keywords_that_there_are_not_and_one_that_is_deprecated(make: Any) -> None:
    for name in ("label_smoothing", "weights", "m", "s", "Scale"):
        with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'"):
            make(**{name: 0.1})
    with pytest.warns(DeprecationWarning, match="gradient_tolerance: has no effect"):
        make(gradient_tolerance=0)


def test_options_are_keywords_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        margin_cross_entropy(X, W, Y, ExpFace(), 64.0)
    with pytest.raises(TypeError, match="positional"):
        MarginSoftmaxHead(6, 10, ExpFace(), 64.0)


def test_sizes_of_a_head_may_be_integers_of_any_kind() -> None:
    head = MarginSoftmaxHead(np.int32(6), np.int64(10), seed=np.uint8(3))
    assert [type(n) for n in (head.embedding_size, head.num_classes, head.seed)] == [int, int, int]
    assert MarginSoftmaxHead(6, Y.max() + 1).num_classes == int(Y.max()) + 1


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
    head = build()
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
