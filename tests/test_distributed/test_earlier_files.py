"""Pickled heads, states and checkpoints that version 0.1.0 wrote, before options had a class of their own.

`earlier/` holds a sampled head after two steps of SGD with momentum, a PartialFC_V2, and what the head found
in its third step: 9 classes, 6 features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from expface_kernels import CosFace, MarginSoftmaxHead
from expface_kernels.checkpoint import load_centres, load_sharded
from tests.tolerances import SUM_ORDER, relative_error

FILES = Path(__file__).parent / "earlier"


@pytest.fixture
def expected() -> dict[str, Any]:
    return torch.load(FILES / "expected.pt", weights_only=True)


def new_head() -> MarginSoftmaxHead:
    return MarginSoftmaxHead(
        6, 9, CosFace(0.25), scale=24.0, reduction="sum", sample_rate=0.6, seed=7, target_gradient="exact"
    )


def assert_goes_on(head: MarginSoftmaxHead, expected: dict[str, Any]) -> None:
    assert torch.equal(head.weight.detach(), expected["weight"])
    assert head.sampling_step == expected["step"] == 2
    loss = head(expected["x"], expected["y"])
    loss.backward()
    assert relative_error(loss, expected["loss"]) <= SUM_ORDER
    assert relative_error(head.weight.grad, expected["dw"]) <= SUM_ORDER


def test_a_pickled_head_goes_on_as_it_would_have(expected: dict[str, Any]) -> None:
    head = torch.load(FILES / "head.pt", weights_only=False)
    assert (head.scale, head.reduction, head.ignore_index, head.seed) == (24.0, "sum", -7, 7)
    assert (head.backend, head.workspace_bytes, head.target_gradient) == ("cpu", 4096, "exact")
    assert_goes_on(head, expected)
    head.scale = 12.0
    assert head.scale == 12.0


def test_a_pickled_partial_fc_computes_the_same(expected: dict[str, Any]) -> None:
    module = torch.load(FILES / "pfc.pt", weights_only=False)
    assert relative_error(module(expected["x"], expected["y"]), expected["pfc_loss"]) <= SUM_ORDER


def test_a_state_dict_loads(expected: dict[str, Any]) -> None:
    head = new_head()
    head.load_state_dict(expected["state"])
    assert_goes_on(head, expected)


def test_a_sharded_checkpoint_loads_with_its_optimizer(expected: dict[str, Any]) -> None:
    head = new_head()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5, momentum=0.1)
    load_sharded(FILES / "dcp", nn.ModuleDict({"head": head}), optimizer)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert optimizer.state[head.weight]["momentum_buffer"].abs().sum() > 0
    assert_goes_on(head, expected)


def test_centres_load(expected: dict[str, Any]) -> None:
    head = new_head()
    load_centres(FILES / "centres.safetensors", head.weight)
    assert torch.equal(head.weight.detach(), expected["weight"])
