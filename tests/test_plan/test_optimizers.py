"""The factors of torch's optimizers, against steps of them."""

from __future__ import annotations

import pytest
import torch

from expface_kernels.plan.optimizers import FUSED, OPTIMIZERS, Footprint, footprint
from expface_kernels.workshop.traffic import PeakMemory, TrafficCounter

WAYS = [(name, way) for name in OPTIMIZERS for way in ("single", "foreach") if name != "sparse-adam"]


def measured(name: str, way: str, weight_decay: float) -> Footprint:
    """Return what a second step holds and moves; the first makes the state."""
    kind, arguments = OPTIMIZERS[name]
    arguments = {**arguments, "weight_decay": weight_decay, "foreach": way == "foreach"}
    if way == "fused":
        arguments = {**arguments, "foreach": None, "fused": True}
    parameter = torch.nn.Parameter(torch.ones(128, 128))
    parameter.grad = torch.ones_like(parameter)
    optimizer = getattr(torch.optim, kind)([parameter], **arguments)
    optimizer.step()
    with PeakMemory() as memory, TrafficCounter() as traffic:
        optimizer.step()
    # Step counters and the like are a few bytes, not a share of the parameter.
    state = sum(
        value.nbytes
        for value in optimizer.state[parameter].values()
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape
    )
    held = (state, memory.peak, traffic.bytes)
    return Footprint(*(round(nbytes / parameter.nbytes, 2) for nbytes in held))


@pytest.mark.parametrize("weight_decay", [0.0, 1e-4])
@pytest.mark.parametrize(("name", "way"), [*WAYS, *((name, "fused") for name in FUSED)])
def test_each_factor_is_what_a_step_takes(name: str, way: str, weight_decay: float) -> None:
    assert footprint(name, way, weight_decay) == measured(name, way, weight_decay)
