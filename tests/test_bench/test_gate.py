from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from bench import peers, plans
from bench.cases import DEFAULT, Case
from bench.gate import (
    ROUNDED,
    ROUNDED_COSINES,
    check,
    check_all,
    disagreeing_losses,
    gate_case,
    limit_of,
    tiled_case,
    truth,
)
from expface_kernels.backends import cpu
from expface_kernels.margin_spec import MARGINS
from expface_kernels.testing.policy import CAPS
from tests.test_bench import strange_peers

CASE = Case(rows=16, classes=100, features=32)
STRANGE = strange_peers.__name__


@pytest.mark.parametrize("target_gradient", ["exact", "detached"])
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("name", ["ours", "ours@0", "eager"])
def test_peers_agree_with_the_truth(name: str, margin: str, target_gradient: str) -> None:
    inputs = dataclasses.replace(CASE, margin=margin, target_gradient=target_gradient).inputs()
    gate = check(name, inputs, truth(inputs))
    assert gate.passed, gate
    assert len(gate.errors) == 3


def test_the_other_target_gradient_is_wrong_in_both_gradients_and_right_in_the_loss() -> None:
    exact = CASE.inputs()
    detached = dataclasses.replace(exact, case=dataclasses.replace(CASE, target_gradient="detached"))
    gate = check("eager", detached, truth(exact))
    loss, dx, dw = gate.errors
    assert not gate.passed
    assert loss < gate.limit < min(dx, dw)


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [("SHIFTED", "wrong"), ("WITHOUT_WEIGHT_GRADIENT", "missing"), ("RAISING", "out of order")],
)
def test_a_wrong_peer_does_not_pass(attribute: str, reason: str) -> None:
    inputs = CASE.inputs()
    gate = check(f"{STRANGE}:{attribute}", inputs, truth(inputs))
    assert not gate.passed
    assert gate.reason is not None
    assert reason in gate.reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_baseline_that_rounds_its_cosines_is_measured_with_a_note(dtype: str) -> None:
    case = gate_case(dataclasses.replace(plans.GPU.main, device="cpu", dtype=dtype))
    names = ["ours", "eager", "pml_arcface", f"{STRANGE}:SHIFTED"]
    ours, eager, metric_learning, shifted = check_all(names, case)
    assert ours.limit == CAPS[torch.bfloat16]
    assert (ours.passed, ours.note, ours.dtype) == (True, None, dtype)
    assert eager.passed
    assert (metric_learning.passed, metric_learning.note) == (True, ROUNDED)
    assert max(metric_learning.errors) > CAPS[torch.bfloat16]
    assert not shifted.passed


def test_ours_and_float32_have_no_more_room_than_the_policy_gives() -> None:
    half = dataclasses.replace(CASE, autocast="bfloat16")
    for name in ("ours", "ours@0", "ours_sampled"):
        assert limit_of(peers.get(name), half) == CAPS[torch.bfloat16]
    assert limit_of(peers.get("eager"), half) == ROUNDED_COSINES
    for name in ("ours", "eager", "partial_fc"):
        assert limit_of(peers.get(name), CASE) == CAPS[torch.float32]


@pytest.fixture
def plans_made(monkeypatch: pytest.MonkeyPatch) -> list[cpu.TilePlan]:
    """Every plan of tiles that the cpu backend makes."""
    made: list[cpu.TilePlan] = []
    make = cpu.TilePlan.of

    def recorded(*arguments: Any) -> cpu.TilePlan:
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(cpu.TilePlan, "of", recorded)
    return made


@pytest.mark.parametrize(
    ("name", "kept"), [("ours", True), ("ours_sampled", True), ("ours@0", False), ("ours@99000000", True)]
)
def test_ours_is_gated_over_several_tiles_some_of_them_kept(
    name: str, kept: bool, plans_made: list[cpu.TilePlan]
) -> None:
    (gate,) = check_all([name], gate_case(DEFAULT), tiled=tiled_case(DEFAULT))
    assert gate.passed, gate
    assert gate.limit == CAPS[torch.float32]
    one, several = plans_made[0], plans_made[-1]
    assert len(list(one.tiles())) == 1
    assert len(list(several.tiles())) >= 3
    assert (0 < several.kept_tiles < len(list(several.tiles()))) == kept


@pytest.mark.parametrize("backward", [True, False])
def test_what_is_wrong_in_a_later_tile_only_does_not_pass(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = cpu.TilePlan.tiles
    monkeypatch.setattr(cpu.TilePlan, "tiles", lambda plan: list(tiles(plan))[:2])
    case = dataclasses.replace(DEFAULT, backward=backward)
    assert check_all(["ours"], gate_case(case))[0].passed
    gate, eager = check_all(["ours", "eager"], gate_case(case), tiled=tiled_case(case))
    assert not gate.passed
    assert gate.reason == "its answer is wrong, over several tiles"
    assert eager.passed


@pytest.mark.parametrize(
    ("losses", "odd"),
    [
        ({"ours": 5.0, "eager": 5.00001, "compiled": 4.99999}, set()),
        ({"ours": 5.0, "eager": 5.00001, "compiled": 5.1}, {"compiled"}),
        ({"ours": 5.0, "eager": math.nan, "compiled": 5.0}, {"eager"}),
        ({"ours": 5.0, "eager": 6.0}, {"ours", "eager"}),  # of two nobody knows which
        ({"ours": 5.0}, set()),
        ({"ours": math.inf}, {"ours"}),
    ],
    ids=["near", "one", "nan", "two", "alone", "infinite"],
)
def test_losses_of_the_timed_size_have_to_agree(losses: dict[str, float], odd: set[str]) -> None:
    case = Case(rows=4, classes=100, features=8)
    assert set(disagreeing_losses({name: (case, loss) for name, loss in losses.items()})) == odd
    # Other terms, other losses.
    own = {name: (dataclasses.replace(case, seed=i), loss) for i, (name, loss) in enumerate(losses.items())}
    assert set(disagreeing_losses(own)) == {name for name, loss in losses.items() if not math.isfinite(loss)}
