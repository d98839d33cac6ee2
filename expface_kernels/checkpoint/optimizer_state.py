"""An optimizer's state: of one weight, and as a part of a whole checkpoint, with no side effects.

torch makes up a state by a step at learning rate 0 wherever there is none, drops gradients for it, and leaves
both and the learning rates as they are if that step fails. Here everything is put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

OPTIMIZER = "optimizer"  # its entries in a checkpoint begin so
STATE = "state"
GROUPS = "param_groups"
NAMES = "params"  # of a group: the names of its parameters

Groups = list[dict[str, Any]]


def state_of(weight: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of `weight` by name, without what is None; ValueError if it is not trained."""
    parameter_group(weight, optimizer)
    state = optimizer.state.get(weight, {})
    return {name: value for name, value in state.items() if value is not None}


def parameter_group(weight: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's group that holds `weight`."""
    for group in optimizer.param_groups:
        if any(parameter is weight for parameter in group["params"]):
            return group
    raise ValueError(
        f"optimizer: expected one that trains weight, got a {type(optimizer).__name__} without it"
    )


def expected_state(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: list[Tensor]
) -> set[str] | None:
    """Return the names of the state that parameters have, or get by a step; None where that is not known."""
    if names := {name for parameter in parameters for name in state_of(parameter, optimizer)}:
        return names
    if type(optimizer) is torch.optim.SGD:
        return {"momentum_buffer"} if group["momentum"] else set()
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        return {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if group["amsgrad"] else set())
    return None


@contextlib.contextmanager
def put_back_on_failure(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put the optimizer's state, gradients and hyperparameters back if the block raises."""
    state = dict(optimizer.state)
    gradients = [(parameter, parameter.grad) for parameter in _parameters(optimizer)]
    groups = [dict(group) for group in optimizer.param_groups]
    try:
        yield
    except BaseException:
        optimizer.state.clear()
        optimizer.state.update(state)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)
        raise


def optimizer_to_save(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return state and groups under the names of parameters; the state is empty before the first step.

    ValueError for a parameter that `model` does not have.
    """
    parameters = _parameters(optimizer)
    _check_owned(model, optimizer)
    if optimizer.state or not parameters or any(p.grad is not None for p in parameters):
        return get_optimizer_state_dict(model, optimizer)
    # Of an optimizer without state torch asks for one by a step, unless there is a gradient.
    smallest = min(parameters, key=lambda parameter: parameter.numel())
    smallest.grad = torch.zeros_like(smallest)
    try:
        return get_optimizer_state_dict(model, optimizer)
    finally:
        smallest.grad = None


def saved_groups(metadata: Metadata) -> Groups:
    """Return the checkpoint's groups, with room for their values, which are in its files."""
    prefix = f"{OPTIMIZER}.{GROUPS}."
    groups: dict[int, dict[str, Any]] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if key.startswith(prefix):
            index, *path, last = key.removeprefix(prefix).split(".")
            inside = groups.setdefault(int(index), {})
            for name in path:
                inside = inside.setdefault(name, {})
            inside[last] = None
            if isinstance(entry, TensorStorageMetadata):
                inside[last] = torch.empty(entry.size, dtype=entry.properties.dtype)
    return [groups[index] for index in sorted(groups)]


def check_count(source: Path, saved: Groups, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless the checkpoint has as many groups of parameters."""
    expected, got = len(optimizer.param_groups), len(saved)
    if expected != got:
        hint = "" if got else "; it was saved without an optimizer"
        raise ValueError(
            f"{source}: expected as many groups of parameters as in the optimizer, {expected}, got "
            f"{got}{hint}"
        )


def ordered_groups(
    source: Path, saved: Groups, ours: Groups, metadata: Metadata, optimizer: torch.optim.Optimizer
) -> Groups:
    """Order the checkpoint's groups as the optimizer's, for each the one with the same parameters.

    What a group has besides ours, such as a scheduler's initial_lr, comes along. ValueError where parameters
    are grouped otherwise, or a hyperparameter is missing.
    """
    by_names = {frozenset(group[NAMES]): group for group in saved}
    ordered = []
    for index, group in enumerate(ours):
        names = group[NAMES]
        if frozenset(names) not in by_names:
            got = [_shortened(other[NAMES]) for other in saved]
            raise ValueError(
                f"{source}: expected a group of the parameters {_shortened(names)} as the optimizer's group "
                f"{index}, got groups of {', '.join(got)}"
            )
        theirs = by_names[frozenset(names)]
        missing = sorted(set(group) - set(theirs))
        if missing:
            raise ValueError(
                f"{source}: expected the hyperparameters of {type(optimizer).__name__} as those of the "
                f"optimizer's group {index}, got one without {missing}; "
                f"{_about_state(metadata, theirs, optimizer, index)}; pass optimizer=None for the model alone"
            )
        ordered.append({key: _near(value, group.get(key)) for key, value in theirs.items()} | {NAMES: names})
    return ordered


def state_to_fill(metadata: Metadata, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Make up a state of each parameter that has one in the checkpoint, for the engine to write into.

    The optimizer's own state and gradients are dropped.
    """
    optimizer.state.clear()
    optimizer.zero_grad(set_to_none=True)
    made_up: Any = get_optimizer_state_dict(model, optimizer)[STATE]
    # A parameter has none before the first step, or where it was never trained.
    return {name: state for name, state in made_up.items() if _has_state(metadata, name)}


def set_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], groups: Groups
) -> None:
    """Make `state` and `groups`, whose order is the optimizer's, its own."""
    if state:
        lenient = StateDictOptions(strict=False)  # not all need have state; what is missing was checked
        set_optimizer_state_dict(model, optimizer, {STATE: state, GROUPS: groups}, options=lenient)
        return
    optimizer.state.clear()
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in saved.items() if key != NAMES})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check_owned(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    owned = {id(parameter) for parameter in model.parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in owned:
                raise ValueError(
                    f"optimizer: expected parameters of model only, got one of shape "
                    f"{tuple(parameter.shape)} in group {index} that is not"
                )


def _has_state(metadata: Metadata, name: str) -> bool:
    return any(key.startswith(f"{OPTIMIZER}.{STATE}.{name}.") for key in metadata.state_dict_metadata)


def _about_state(
    metadata: Metadata, saved: dict[str, Any], optimizer: torch.optim.Optimizer, index: int
) -> str:
    """Describe what a saved group has of an optimizer's state, and what ours keeps, where that is known."""
    starts = tuple(f"{OPTIMIZER}.{STATE}.{name}." for name in saved[NAMES])
    keys = metadata.state_dict_metadata
    got = {key.removeprefix(start) for start in starts for key in keys if key.startswith(start)}
    text = f"the state that was saved is {sorted(got) if got else 'none'}"
    group = optimizer.param_groups[index]
    expected = expected_state(optimizer, group, group["params"])
    return f"{text}, that of {type(optimizer).__name__} is {sorted(expected)}" if expected else text


def _near(value: Any, ours: Any) -> Any:
    """Move a number that the optimizer keeps in a tensor to where that tensor is."""
    return value.to(ours.device) if isinstance(value, Tensor) and isinstance(ours, Tensor) else value


def _shortened(names: list[str]) -> str:
    return str(names) if len(names) <= 4 else f"[{', '.join(map(repr, names[:3]))}, … {len(names)} in all]"
