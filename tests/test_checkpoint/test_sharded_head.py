"""A sharded head in training: saved on four ranks, it goes on alike on four, three, two and one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from expface_kernels import MarginSoftmaxHead
from expface_kernels.checkpoint import load_centres, load_sharded, save_centres, save_sharded
from tests.distributed import run_ranks
from tests.tolerances import assert_close

# 26 classes on each of four ranks, of which a sample takes 15: more than the 12 rows, fewer than all.
C, D, ROWS, RATE = 103, 6, 12, 0.6
DRAWN = 3  # samples before the checkpoint
Training = tuple[nn.ModuleDict, torch.optim.Optimizer]


def build(group: dist.ProcessGroup | None, foreach: bool) -> Training:
    torch.manual_seed(0)
    backbone: nn.Module = nn.Linear(3, D).double()
    if group is not None:
        backbone = nn.parallel.DistributedDataParallel(backbone, process_group=group)
    head = MarginSoftmaxHead(D, C, process_group=group, dtype=torch.float64)
    model = nn.ModuleDict({"backbone": backbone, "head": head})
    groups = [{"params": list(backbone.parameters())}, {"params": [head.weight], "lr": 0.2}]
    return model, torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=foreach)


def loss_of(training: Training, group: dist.ProcessGroup | None) -> Tensor:
    """Of the same 12 rows, however many ranks share them."""
    model, _ = training
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.arange(ROWS) * 8 % C
    loss: Tensor = model["head"](model["backbone"](x.chunk(size)[rank]), y.chunk(size)[rank])
    return loss


def step(training: Training, group: dist.ProcessGroup | None) -> Tensor:
    loss = loss_of(training, group)
    loss.backward()
    training[1].step()
    training[1].zero_grad()
    return loss.detach()


def start(group: dist.ProcessGroup | None, rate: float, foreach: bool) -> Training:
    """A step that is the same on any ranks, and, since samples are not, none of them has changed a value."""
    training = build(group, foreach)
    step(training, group)
    training[0]["head"].sample_rate = rate
    for _ in range(DRAWN):
        with torch.no_grad():
            loss_of(training, group)
    return training


def save(group: dist.ProcessGroup, folder: Path, rate: float, foreach: bool) -> None:
    model, optimizer = start(group, rate, foreach)
    save_sharded(folder / "run", model, optimizer)
    save_centres(folder / "centres", model["head"].weight, optimizer)


def go_on(group: dist.ProcessGroup | None, folder: Path, rate: float, foreach: bool) -> None:
    """From the checkpoint, and on as many ranks without one."""
    uninterrupted, resumed, other = start(group, rate, foreach), build(group, foreach), build(group, foreach)
    with torch.no_grad():
        for parameter in resumed[0].parameters():
            parameter.zero_()
    resumed[0]["head"].sample_rate = rate
    load_sharded(folder / "run", *resumed)
    head = resumed[0]["head"]
    load_centres(folder / "centres", other[0]["head"].weight, other[1])
    assert torch.equal(other[0]["head"].local_weight, head.local_weight)
    assert head.sampling_step == (DRAWN if rate < 1 else 0)
    head.eval()
    with torch.no_grad():
        full = float(loss_of(resumed, group))
    head.train()
    for i in range(3):
        loss, expected = step(resumed, group), step(uninterrupted, group)
        assert_close(loss, expected, dtype=torch.float64)
        assert i or rate == 1 or float(loss) != full, "it does not sample"
        for ours, theirs in zip(resumed[0].parameters(), uninterrupted[0].parameters(), strict=True):
            assert_close(local(ours), local(theirs), dtype=torch.float64)


def local(tensor: Tensor) -> Tensor:
    rows: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return rows.detach()


@pytest.mark.parametrize(("rate", "foreach"), [(1.0, False), (RATE, True)])
def test_training_goes_on_on_as_many_and_on_fewer_ranks(rate: float, foreach: bool, tmp_path: Path) -> None:
    """With foreach, GPUs' default, plain and sharded parameters are in groups of their own."""
    run_ranks(4, save, tmp_path, rate, foreach)
    for size in (4, 3, 2):
        run_ranks(size, go_on, tmp_path, rate, foreach)
    go_on(None, tmp_path, rate, foreach)


def in_wrappers(group: dist.ProcessGroup, folder: Path) -> None:
    """DDP and torch.compile change what a head without a group is called in the state_dict."""

    def build(rate: float, wrapper: str) -> nn.Module:
        torch.manual_seed(0)
        head = MarginSoftmaxHead(D, C, sample_rate=rate)
        parts = nn.ModuleDict({"backbone": nn.Linear(3, D), "head": head})
        if wrapper == "none":
            return parts
        if wrapper == "compile":
            return torch.compile(parts)
        return nn.parallel.DistributedDataParallel(parts, process_group=group)

    def head_of(model: nn.Module) -> MarginSoftmaxHead:
        return next(module for module in model.modules() if isinstance(module, MarginSoftmaxHead))

    for wrapper in ("none", "compile", "ddp"):
        for then, now in ((0.5, 0.5), (0.5, 1.0), (1.0, 0.5)):
            saved, loaded = build(then, wrapper), build(now, wrapper)
            for model, draws in ((saved, 2), (loaded, 1)):
                for _ in range(draws):
                    head_of(model)(torch.randn(4, D), torch.arange(4))
            with torch.no_grad():
                head_of(saved).weight.fill_(2.0)
            directory = folder / f"{wrapper}-{then}-{now}"
            save_sharded(directory, saved)
            load_sharded(directory, loaded)
            assert (head_of(loaded).weight == 2).all()
            # As by load_state_dict: a step that was saved is taken over, one that was not stays.
            assert head_of(loaded).sampling_step == (2 if then < 1 else 1)


def test_sampling_may_be_switched_on_or_off_between_runs_and_inside_ddp_and_compile(tmp_path: Path) -> None:
    run_ranks(1, in_wrappers, tmp_path)
