"""An optimizer in a whole checkpoint: its groups are those it was saved with, or nothing is touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from expface_kernels.checkpoint import load_sharded, optimizer_state, save_sharded
from tests.test_checkpoint.trained import D, Head, assert_same

C = 7
RATES = {"backbone": 0.1, "head": 0.7}
Make = Callable[[nn.ModuleDict], torch.optim.Optimizer]


def model_of() -> nn.ModuleDict:
    return nn.ModuleDict({"backbone": nn.Linear(3, D), "head": Head(C)})


def one_group(model: nn.ModuleDict) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.8)


def two_groups(model: nn.ModuleDict) -> torch.optim.Optimizer:
    groups = [{"params": list(model[name].parameters()), "lr": lr} for name, lr in RATES.items()]
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-3)


def swapped(model: nn.ModuleDict) -> torch.optim.Optimizer:
    groups = [{"params": list(model[name].parameters())} for name in reversed(RATES)]
    return torch.optim.SGD(groups, lr=9.0, momentum=0.1)


def cut_otherwise(model: nn.ModuleDict) -> torch.optim.Optimizer:
    weight, bias = model["backbone"].parameters()
    return torch.optim.SGD([{"params": [weight]}, {"params": [bias, model["head"].weight]}], lr=9.0)


def stepped(make: Make) -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
    """Trained for a step, with gradients for the next."""
    model = model_of()
    optimizer = make(model)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.rand_like(parameter)
        if not optimizer.state:
            optimizer.step()
    return model, optimizer


def everything(model: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        }
    )


def assert_refused(
    directory: Path, make: Make, message: str, error: type[Exception] = ValueError, had_stepped: bool = True
) -> None:
    """And nothing is lost: neither a value, a gradient, the state nor a hyperparameter."""
    model, optimizer = stepped(make)
    if not had_stepped:
        optimizer.state.clear()
    before = everything(model, optimizer)
    with pytest.raises(error, match=message):
        load_sharded(directory, model, optimizer)
    assert_same(everything(model, optimizer), before)


def saved(folder: Path, make: Make | None) -> Path:
    model, optimizer = stepped(make or one_group)
    save_sharded(folder / "saved", model, None if make is None else optimizer)
    return folder / "saved"


def adam(model: nn.ModuleDict) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=5.0)


def plain_sgd(model: nn.ModuleDict) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


COUNT = "groups of parameters as in the optimizer"
MOMENTUM, MOMENTS = r"\['momentum_buffer'\]", r"\['exp_avg', 'exp_avg_sq', 'step'\]"


@pytest.mark.parametrize("had_stepped", [True, False])
@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (None, one_group, f"{COUNT}, 1, got 0; it was saved without an optimizer"),
        # Loaded by their number, the only group would give the head the backbone's learning rate.
        (one_group, two_groups, f"{COUNT}, 2, got 1$"),
        (two_groups, one_group, f"{COUNT}, 1, got 2$"),
        (
            two_groups,
            cut_otherwise,
            r"expected a group of the parameters \['backbone.weight'\] as the optimizer's group 0, got "
            r"groups of \['backbone.weight', 'backbone.bias'\], \['head.weight'\]",
        ),
        # An optimizer without state cannot be told by it.
        (plain_sgd, adam, r"of the optimizer's group 0, got one without \['amsgrad', 'betas'"),
        (one_group, adam, rf"of Adam .*; the state that was saved is {MOMENTUM}, that of Adam is {MOMENTS};"),
        (adam, one_group, rf"of SGD .*; the state that was saved is {MOMENTS}, that of SGD is {MOMENTUM};"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused(
    theirs: Make | None, ours: Make, message: str, had_stepped: bool, tmp_path: Path
) -> None:
    directory = saved(tmp_path, theirs)
    assert_refused(directory, ours, message, had_stepped=had_stepped)
    load_sharded(directory, model_of())  # without an optimizer, as the message says


@pytest.mark.parametrize("had_stepped", [True, False])
def test_groups_in_another_order_get_their_own_hyperparameters(had_stepped: bool, tmp_path: Path) -> None:
    model, optimizer = stepped(two_groups)
    if not had_stepped:
        optimizer.state.clear()
    save_sharded(tmp_path / "saved", model, optimizer)
    other_model, other = stepped(swapped)
    load_sharded(tmp_path / "saved", other_model, other)
    head, backbone = other.param_groups
    assert (head["lr"], backbone["lr"]) == (RATES["head"], RATES["backbone"])
    assert head["momentum"] == backbone["momentum"] == 0.9
    assert head["params"] == [other_model["head"].weight]
    for ours, theirs in zip(model.parameters(), other_model.parameters(), strict=True):
        assert_same(dict(optimizer.state.get(ours, {})), dict(other.state.get(theirs, {})))


def test_what_a_scheduler_keeps_in_a_group_comes_along(tmp_path: Path) -> None:
    """`last_epoch=` of a scheduler that goes on wants it there."""
    model, optimizer = stepped(two_groups)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    save_sharded(tmp_path / "saved", model, optimizer)
    model, other = stepped(two_groups)
    load_sharded(tmp_path / "saved", model, other)
    assert [group["lr"] for group in other.param_groups] == [rate / 2 for rate in RATES.values()]
    torch.optim.lr_scheduler.StepLR(other, 1, gamma=0.5, last_epoch=scheduler.last_epoch)
    assert [group["initial_lr"] for group in other.param_groups] == list(RATES.values())


def test_a_learning_rate_in_a_tensor(tmp_path: Path) -> None:
    make = lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.25))  # noqa: E731
    directory = saved(tmp_path, make)
    model, optimizer = stepped(make)
    optimizer.param_groups[0]["lr"].fill_(3.0)
    load_sharded(directory, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == torch.tensor(0.25)


def strange(model: nn.ModuleDict) -> torch.optim.Optimizer:
    optimizer = one_group(model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 5))]})
    return optimizer


def test_a_parameter_outside_the_model(tmp_path: Path) -> None:
    message = r"optimizer: expected parameters of model only, got one of shape \(4, 5\) in group 1"
    model, optimizer = stepped(strange)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        save_sharded(tmp_path / "new", model, optimizer)
    assert_same(everything(model, optimizer), before)
    assert not list(tmp_path.iterdir())
    assert_refused(saved(tmp_path, two_groups), strange, message)


@pytest.mark.parametrize("gradients", [True, False])
def test_gradients_stay_where_torch_fails(
    gradients: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a hook of the optimizer")

    model, optimizer = stepped(one_group)
    optimizer.state.clear()
    if not gradients:
        optimizer.zero_grad()
    before = everything(model, optimizer)
    monkeypatch.setattr(optimizer_state, "get_optimizer_state_dict", fail)
    with pytest.raises(RuntimeError, match="a hook of the optimizer"):
        save_sharded(tmp_path / "saved", model, optimizer)
    assert_same(everything(model, optimizer), before)


def test_saving_makes_no_step(tmp_path: Path) -> None:
    """One at learning rate 0 would call hooks, and fail where an optimizer takes sparse gradients only."""
    model = model_of()
    optimizer = torch.optim.SparseAdam(model["head"].parameters())
    save_sharded(tmp_path / "saved", model, optimizer)
    assert not optimizer.state
    assert model["head"].weight.grad is None


def test_a_step_that_fails_while_loading_costs_nothing(tmp_path: Path) -> None:
    """Torch makes up the state by one, with learning rates set to 0."""

    def make(model: nn.ModuleDict) -> torch.optim.Optimizer:
        optimizer = two_groups(model)

        def fail(*_: Any) -> None:
            if all(group["lr"] == 0 for group in optimizer.param_groups):
                raise RuntimeError("no step today")

        optimizer.register_step_pre_hook(fail)
        return optimizer

    assert_refused(saved(tmp_path, two_groups), make, "no step today", RuntimeError)
