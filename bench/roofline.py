"""What the triton backend's cost model says of a case: bytes beside the gradients, and the least time."""

from __future__ import annotations

import functools

from bench.cases import DTYPES, Case
from expface_kernels.workshop import costs, recording

DEFAULT_ARCH = "sm_90"


def gpu_of(card: str) -> str | None:
    """The name in `costs.GPUS` of a card as its driver calls it; None for one whose rates are not known."""
    return next((name for name in costs.GPUS if name in card.lower()), None)


@functools.cache
def _costs(case: Case, workspace_bytes: int, arch: str) -> costs.Costs:
    dtype = DTYPES[case.dtype]
    product = None if case.autocast is None else case.product_dtype
    return costs.costs(
        recording.Case(
            case.rows,
            case.classes,
            case.features,
            dtype,
            dtype,
            scale=case.scale,
            workspace_bytes=workspace_bytes,
            product_dtype=product,
        ),
        arch,
    )


def extra_bytes(case: Case, workspace_bytes: int) -> int:
    """Peak bytes of ours beside inputs and gradients."""
    return _costs(case, workspace_bytes, DEFAULT_ARCH).extra


def seconds(case: Case, workspace_bytes: int, card: str) -> float | None:
    """The roofline of ours on that card; None where the card's rates are not known."""
    name = gpu_of(card)
    if name is None:
        return None
    gpu = costs.GPUS[name]
    return _costs(case, workspace_bytes, gpu.arch).milliseconds(gpu) / 1e3
