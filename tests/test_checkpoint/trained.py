"""Centres and optimizer state whose every row is known by its global class id, on one process or many.

C classes · D features
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from expface_kernels.distributed.ranges import shard_ranges

D = 6
STEP = 7.0
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, betas=(0.8, 0.95)),
}
STATE_NAMES = {"sgd": {"momentum_buffer"}, "adamw": {"exp_avg", "exp_avg_sq", "step"}}


def truth(name: str, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(C, D) of the weight or of a state, all classes: row c depends on the name and c alone."""
    values = torch.empty(4096, D, dtype=torch.float64)
    values.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return values[:num_classes].to(dtype)


class Head(nn.Module):
    """The least that has class centres: a weight (C, D), a DTensor where a group shares it."""

    def __init__(
        self, num_classes: int, group: dist.ProcessGroup | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(shard(torch.zeros(num_classes, D, dtype=dtype), group))


def shard(whole: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's rows as a DTensor; all of them where there is no group."""
    if group is None:
        return whole.clone()
    mesh = DeviceMesh.from_group(group, "cpu")
    start, size = shard_ranges(whole.shape[0], dist.get_world_size(group))[dist.get_rank(group)]
    return DTensor.from_local(
        whole[start : start + size].clone(),
        mesh,
        [Shard(0)],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fill_with_truth(weight: Tensor, optimizer: torch.optim.Optimizer, start: int, num_classes: int) -> None:
    """One step so that there is state, then the known rows everywhere."""
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _set(weight, "weight", start, num_classes)
    for name, value in optimizer.state[weight].items():
        if value.dim():
            _set(value, name, start, num_classes)
        else:
            value.fill_(STEP)


@torch.no_grad()
def _set(tensor: Tensor, name: str, start: int, num_classes: int) -> None:
    rows = local(tensor)
    rows.copy_(truth(name, num_classes, rows.dtype)[start : start + rows.shape[0]])


def assert_is_truth(
    weight: Tensor, optimizer: torch.optim.Optimizer, kind: str, start: int, num_classes: int
) -> None:
    """Bit by bit, and nothing missing."""
    rows = local(weight)
    stop = start + rows.shape[0]
    assert torch.equal(rows, truth("weight", num_classes, rows.dtype)[start:stop])
    state = optimizer.state[weight]
    assert set(state) == STATE_NAMES[kind]
    for name, value in state.items():
        if name == "step":
            assert value.dim() == 0
            assert value.item() == STEP
        else:
            assert isinstance(value, DTensor) == isinstance(weight, DTensor)
            assert value.shape == weight.shape
            assert torch.equal(local(value), truth(name, num_classes, rows.dtype)[start:stop]), name


class Exploit:
    """What a hostile file holds: unpickled, it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def backbone() -> nn.Module:
    made = nn.Linear(3, D)
    with torch.no_grad():
        made.weight.copy_(torch.arange(3.0 * D).reshape(D, 3) / 7)
    return made


def model_of(num_classes: int, group: dist.ProcessGroup | None) -> nn.ModuleDict:
    return nn.ModuleDict({"backbone": backbone(), "head": Head(num_classes, group)})


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert_same(value, right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for ours, theirs in zip(left, right, strict=True):
            assert_same(ours, theirs)
    elif isinstance(left, Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


@contextlib.contextmanager
def failing(owner: Any, name: str, here: bool = True, at_call: int = 1) -> Iterator[None]:
    """Let one call of a method do its work and then raise OSError, where `here`."""
    done, calls = getattr(owner, name), 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        result = done(*args, **kwargs)
        calls += 1
        if here and calls == at_call:
            raise OSError(28, "No space left on device")
        return result

    setattr(owner, name, fail)
    try:
        yield
    finally:
        setattr(owner, name, done)
    assert calls >= at_call
