from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from bench.cases import TARGET_DEGREES, Case
from expface_kernels.margin_spec import MARGINS

CASE = Case(rows=6, classes=40, features=16)


def test_the_same_seed_gives_the_same_tensors_and_another_one_does_not() -> None:
    first, again, other = CASE.inputs(), CASE.inputs(), Case(6, 40, 16, seed=1).inputs()
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.w, again.w)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.w, other.w)


def test_drawing_inputs_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    CASE.inputs()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_inputs_have_the_shapes_and_dtype_of_the_case_and_want_gradients(dtype: str) -> None:
    inputs = Case(6, 40, 16, dtype=dtype).inputs()
    assert inputs.x.shape == (6, 16)
    assert inputs.w.shape == (40, 16)
    assert inputs.labels.shape == (6,)
    assert inputs.x.dtype == inputs.w.dtype == getattr(torch, dtype)
    assert inputs.x.is_leaf
    assert inputs.w.is_leaf
    assert inputs.x.requires_grad
    assert inputs.w.requires_grad


def test_target_angles_cover_what_the_case_promises() -> None:
    inputs = Case(rows=200, classes=300, features=64).inputs()
    angles = F.cosine_similarity(inputs.x, inputs.w[inputs.labels]).acos().rad2deg()
    low, high = TARGET_DEGREES
    assert low - 0.1 < angles.min() < low + 5
    assert high - 5 < angles.max() < high + 0.1


def test_sizes_are_bytes_and_operations() -> None:
    case = Case(rows=2, classes=3, features=5, dtype="float64")
    assert case.gradient_bytes == (2 + 3) * 5 * 8
    assert case.flops == 6 * 2 * 3 * 5


def test_at_most_shrinks_and_never_grows() -> None:
    assert CASE.at_most(4, 10) == Case(rows=4, classes=10, features=16)
    assert CASE.at_most(10**6, 10**6) == CASE


@pytest.mark.parametrize("margin", MARGINS)
def test_every_margin_can_be_made(margin: str) -> None:
    psi = Case(1, 1, 1, margin=margin).margin_function()(torch.tensor([1.0]))
    assert psi.shape == (1,)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", 0),
        ("classes", -1),
        ("features", 0),
        ("dtype", "int8"),
        ("margin", "none"),
        ("scale", 0.0),
        ("scale", math.nan),
        ("scale", math.inf),
        ("target_gradient", "both"),
    ],
)
def test_a_field_out_of_range_is_named(field: str, value: object) -> None:
    fields: dict[str, object] = {"rows": 1, "classes": 1, "features": 1, field: value}
    with pytest.raises(ValueError, match=f"{field}: expected"):
        Case(**fields)  # type: ignore[arg-type]
