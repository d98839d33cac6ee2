"""A sharded head in training: saved on four ranks, it goes on alike on three, two and one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from expface_kernels import MarginSoftmaxHead
from expface_kernels.checkpoint import load_centres, load_sharded, open_centres, save_centres, save_sharded
from tests.distributed import run_ranks
from tests.tolerances import assert_close

C, D, ROWS = 10, 6, 12
Training = tuple[nn.ModuleDict, torch.optim.Optimizer]


def build(group: dist.ProcessGroup | None, sample_rate: float, seed: int) -> Training:
    torch.manual_seed(0)
    backbone: nn.Module = nn.Linear(3, D).double()
    if group is not None:
        backbone = nn.parallel.DistributedDataParallel(backbone, process_group=group)
    head = MarginSoftmaxHead(
        D, C, process_group=group, sample_rate=sample_rate, seed=seed, dtype=torch.float64
    )
    model = nn.ModuleDict({"backbone": backbone, "head": head})
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def step(training: Training, group: dist.ProcessGroup | None) -> None:
    """The same 12 rows, however many ranks share them."""
    model, optimizer = training
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.arange(ROWS) % C
    model["head"](model["backbone"](x.chunk(size)[rank]), y.chunk(size)[rank]).backward()
    optimizer.step()
    optimizer.zero_grad()


def save(group: dist.ProcessGroup, folder: Path, sample_rate: float) -> None:
    training = build(group, sample_rate, seed=0)
    model, optimizer = training
    step(training, group)
    save_sharded(folder / "run", model, optimizer)
    save_centres(folder / "centres", model["head"].weight, optimizer)
    step(training, group)
    save_centres(folder / "after", model["head"].weight)


def go_on(group: dist.ProcessGroup | None, folder: Path, sample_rate: float) -> None:
    training = build(group, sample_rate, seed=5)
    model, optimizer = training
    load_sharded(folder / "run", model, optimizer)
    head = model["head"]
    if sample_rate < 1:
        assert head.sampling_step == 1
        return
    other = build(group, sample_rate, seed=6)
    load_centres(folder / "centres", other[0]["head"].weight, other[1])
    assert torch.equal(other[0]["head"].local_weight, head.local_weight)
    step(training, group)
    with open_centres(folder / "after") as after:
        expected = after.rows("weight", 0, C)[head.class_start : head.class_start + head.num_local]
    assert_close(head.local_weight, expected, dtype=torch.float64)


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_training_goes_on_on_fewer_ranks(sample_rate: float, tmp_path: Path) -> None:
    run_ranks(4, save, tmp_path, sample_rate)
    for size in (3, 2):
        run_ranks(size, go_on, tmp_path, sample_rate)
    go_on(None, tmp_path, sample_rate)
