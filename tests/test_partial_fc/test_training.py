"""Training over many ranks: twenty steps are those of one process, and clipping and scaling act as one.

B rows of a rank · N rows of all ranks · F features of an image · D of an embedding · C classes
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from expface_kernels import MarginSoftmaxHead
from tests.distributed import run_ranks
from tests.test_partial_fc.steps import own_slice
from tests.tolerances import SHARDED, relative_error

F, D = 32, 64
STEPS, LR = 20, 0.01
# Rows of each rank, uneven; the second of three and of four brings none.
ROWS = {1: (9,), 2: (6, 3), 3: (5, 0, 4), 4: (4, 0, 2, 3)}
CLASSES = {1: (10, 1001, 1003), 2: (10, 1001, 1003), 3: (10, 1001, 1003), 4: (5, 10, 1001, 1003)}
DTYPES = (torch.float64, torch.float32)
Trained = tuple[list[Tensor], Tensor]


def images(step: int, classes: int, dtype: torch.dtype, rows: int = 9) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(rows, F, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(classes, (rows,), generator=g)


def new_backbone(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(F, D), nn.PReLU(), nn.Linear(D, D)).to(dtype)


def local(tensor: Any) -> Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def train(group: Any, classes: int, dtype: torch.dtype) -> Trained:
    """Twenty SGD steps of backbone and head: the backbone's parameters and this process's centres."""
    rank, world = (0, 1) if group is None else (group.rank(), group.size())
    own = slice(None) if group is None else own_slice(ROWS[world], rank)
    module = new_backbone(dtype)
    head = MarginSoftmaxHead(D, classes, process_group=group, dtype=dtype)
    backbone = module if group is None else DistributedDataParallel(module, process_group=group)
    optimizer = torch.optim.SGD([*module.parameters(), *head.parameters()], lr=LR)
    for step in range(STEPS):
        x, y = images(step, classes, dtype)
        loss = head(backbone(x[own]), y[own])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.detach() for p in module.parameters()], local(head.weight).clone()


def train_all(group: Any) -> dict[tuple[int, torch.dtype], Trained]:
    return {(c, dtype): train(group, c, dtype) for c in CLASSES[group.size()] for dtype in DTYPES}


@pytest.fixture(scope="module")
def alone() -> dict[tuple[int, torch.dtype], Trained]:
    """What one process arrives at."""
    return {(c, dtype): train(None, c, dtype) for c in CLASSES[4] for dtype in DTYPES}


@pytest.mark.parametrize("world", CLASSES)
def test_twenty_steps_arrive_where_one_process_does(
    world: int, alone: dict[tuple[int, torch.dtype], Trained]
) -> None:
    on_ranks = run_ranks(world, train_all)
    for (classes, dtype), (modules, _) in on_ranks[0].items():
        right_modules, right = alone[classes, dtype]
        start = MarginSoftmaxHead(D, classes, dtype=dtype).weight.detach()
        assert relative_error(right, start) > 0.01  # it did go somewhere
        found = torch.cat([result[classes, dtype][1] for result in on_ranks])
        where = f"{classes} classes, {dtype}"
        assert relative_error(found, right) <= SHARDED[dtype], f"{where}: centres"
        for i, (a, b) in enumerate(zip(modules, right_modules, strict=True)):
            assert relative_error(a, b) <= SHARDED[dtype], f"{where}: backbone {i}"
        for result in on_ranks[1:]:
            assert all(torch.equal(a, b) for a, b in zip(modules, result[classes, dtype][0], strict=True))
    if world == 4:
        assert on_ranks[3][5, torch.float64][1].shape == (0, D)
