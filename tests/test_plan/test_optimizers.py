"""What an optimizer holds and moves, against what is known of it."""

from __future__ import annotations

import pytest
import torch

from expface_kernels.plan.optimizers import FUSED, OPTIMIZERS, footprint

F32 = torch.float32


@pytest.mark.parametrize(
    ("name", "state"),
    [("sgd", 0), ("momentum", 1), ("adam", 2), ("adamw", 2), ("adagrad", 1), ("rmsprop", 1)],
)
def test_state_is_what_each_is_known_to_keep(name: str, state: int) -> None:
    for dtype in (F32, torch.bfloat16):
        for way in ("single", "foreach"):
            assert footprint(name, dtype, way).state == state


# Parameter, gradient and state are read, parameter and state written.
@pytest.mark.parametrize(
    ("name", "moved"), [("sgd", 3), ("momentum", 5), ("adam", 7), ("adamw", 7), ("adagrad", 5)]
)
def test_a_fused_update_moves_each_tensor_once_and_holds_nothing(name: str, moved: int) -> None:
    found = footprint(name, F32, "fused")
    assert (found.moved, found.temporary) == (moved, 0)
    assert set(FUSED) <= set(OPTIMIZERS)


def test_an_unfused_update_moves_more_by_its_operators() -> None:
    # param.add_(grad): two read, one written. Momentum: buf·m 2, + grad 3, param 3.
    assert footprint("sgd", F32, "single").moved == 3
    assert footprint("momentum", F32, "single").moved == 8
    assert footprint("momentum", F32, "foreach").moved == 8
    # Decay of plain SGD makes a gradient of its own: decoupled decay does not.
    assert footprint("sgd", F32, "single", 1e-4).temporary == 1
    assert footprint("adamw", F32, "single", 1e-4).temporary == footprint("adamw", F32, "single").temporary


def test_a_step_really_holds_its_temporaries() -> None:
    """Adam makes the root of the second moment, and then its quotient."""
    assert footprint("adam", F32, "single").temporary == 2
    assert footprint("adam", F32, "foreach").temporary == 1
