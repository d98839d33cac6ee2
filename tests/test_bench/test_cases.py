from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from bench.cases import TARGET_DEGREES, Case

CASE = Case(rows=6, classes=40, features=16)


def test_the_same_seed_gives_the_same_tensors_and_another_one_does_not() -> None:
    first, again, other = CASE.inputs(), CASE.inputs(), Case(6, 40, 16, seed=1).inputs()
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.w, again.w)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.w, other.w)


def test_target_angles_cover_what_the_case_promises() -> None:
    inputs = Case(rows=200, classes=300, features=64).inputs()
    angles = F.cosine_similarity(inputs.x, inputs.w[inputs.labels]).acos().rad2deg()
    low, high = TARGET_DEGREES
    assert low - 0.1 < angles.min() < low + 5
    assert high - 5 < angles.max() < high + 0.1


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
