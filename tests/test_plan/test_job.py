"""A job's sizes, and what is no job."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expface_kernels.plan import Job
from expface_kernels.plan.job import op_config_of


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"classes": 0}, "classes"),
        ({"features": 0}, "features"),
        ({"batch": -1}, "batch"),
        ({"ranks": 0}, "ranks"),
        ({"device": "h1000"}, "device"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": "float64", "device": "h100"}, "dtype"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"autocast": "float32"}, "autocast"),
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"workspace_bytes": -1}, "workspace_bytes"),
        ({"memory_bytes": 0}, "memory_bytes"),
        ({"reserved_bytes": -1}, "reserved_bytes"),
        ({"memory_bytes": 1000, "reserved_bytes": 900}, "reserved_bytes: expected less than 90%"),
        ({"device": "h100", "reserved_bytes": 80 * 10**9}, "reserved_bytes"),
        ({"sparse_grad": True, "optimizer": "sgd", "ranks": 2}, "sparse_grad"),
        ({"sparse_grad": True, "optimizer": "adam"}, "sparse_grad"),
        ({"sparse_grad": True, "optimizer": "sgd", "weight_decay": 1e-4}, "sparse_grad"),
        ({"optimizer": "sparse-adam"}, "optimizer"),
        ({"fused": True, "optimizer": "rmsprop"}, "fused"),
        ({"fused": True, "optimizer": "sgd", "sparse_grad": True}, "fused: .* got sparse_grad"),
        ({"classes": 10**18}, "classes · features"),
        ({"classes": 10**300, "features": 10**300}, r"got some 10\*\*600"),
        ({"batch": 10**17, "features": 1}, "batch · classes"),
        ({"features": 10**12, "batch": 10**6}, "batch · features"),
        ({"ranks": 10**18}, "batch · ranks · features"),
        ({"workspace_bytes": 10**19}, "workspace_bytes"),
    ],
)
def test_what_is_out_of_range_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Job(**{"classes": 10, **options})


@pytest.mark.parametrize(
    "options", [{"classes": 1e6}, {"fused": 1}, {"sparse_grad": "no"}, {"weight_decay": "much"}], ids=str
)
def test_another_type_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        Job(**{"classes": 10, **options})


@pytest.mark.parametrize(("classes", "ranks"), [(10, 4), (1003, 4), (5, 4), (3, 7)])
def test_the_fullest_rank_is_planned_as_dtensor_cuts(classes: int, ranks: int) -> None:
    local = torch.arange(classes).chunk(ranks)
    assert Job(classes=classes, ranks=ranks).local_classes == max(len(part) for part in local)


def test_autocast_is_the_embeddings_dtype_and_what_the_op_is_told() -> None:
    job = Job(classes=10, device="h100", autocast="bfloat16")
    assert (job.row_dtype, job.centre_dtype) == (torch.bfloat16, torch.float32)
    assert op_config_of(job).product_dtype == torch.bfloat16
    assert op_config_of(Job(classes=10)).product_dtype is None


def test_what_the_head_may_use_is_left_by_the_backbone() -> None:
    job = Job(classes=10, memory_bytes=1000, reserved_bytes=300)
    assert job.capacity_bytes == 600  # 90% of the memory can be filled
    assert Job(classes=10).capacity_bytes > 0  # this machine's own
