"""PartialFC_V2 over ranks: each step is that of one process on all rows, and arguments are compared."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from expface_kernels import ArcFace, ExpFace, MarginSoftmaxHead, clip_grad_norm_
from expface_kernels.compat.insightface import PartialFC_V2, Sampler
from expface_kernels.distributed.ranges import insightface_ranges
from tests import cases
from tests.distributed import run_ranks
from tests.test_compat import theirs
from tests.tolerances import assert_close

# Ten classes on three or four ranks: InsightFace cuts them otherwise than DTensor.
C, D, B = 10, 6, 9
F64 = torch.float64
# Rows of each rank, by number of ranks.
UNEVEN = {1: (9,), 2: (2, 7), 3: (5, 0, 4)}


def whole() -> tuple[Tensor, Tensor, Tensor]:
    return cases.batch("random", B, C, D)


def share(group: dist.ProcessGroup, counts: tuple[int, ...]) -> slice:
    """This rank's rows."""
    ends = list(accumulate(counts))
    rank = dist.get_rank(group)
    return slice(ends[rank] - counts[rank], ends[rank])


def build(group: dist.ProcessGroup | None, margin_loss: Any, w: Tensor, **options: Any) -> PartialFC_V2:
    """A module with this rank's part of the centres w (C, D), float64."""
    module = PartialFC_V2(margin_loss, w.shape[1], w.shape[0], process_group=group, **options).double()
    with torch.no_grad():
        module.weight.copy_(w[module.class_start : module.class_start + module.num_local])
    return module


MARGINS: dict[str, Callable[[], Any]] = {
    "arcface": lambda: theirs.ArcFace(64.0, 0.5),
    "powerface": lambda: theirs.PowerFace(32.0, 0.7),
    "cosface-128": lambda: theirs.CosFace(128.0, 0.4),
    "filtered": lambda: theirs.CombinedMarginLoss(64, 1, 0.5, 0, 0.2),
    "filtered-128": lambda: theirs.CombinedMarginLoss(128, 1, 0.5, 0, 0.2),
}


def one_step(group: dist.ProcessGroup) -> None:
    x, w, y = whole()
    size = dist.get_world_size(group)
    mine = share(group, UNEVEN[size])
    for name, margin_loss in MARGINS.items():
        module = build(group, margin_loss(), w)
        assert (module.class_start, module.num_local) == insightface_ranges(C, size)[dist.get_rank(group)]
        labels = y[mine, None].clone()
        own = x[mine].clone().requires_grad_()
        loss = module(own, labels)
        loss.backward()
        assert torch.equal(labels, y[mine, None])
        expected, dx, dw = theirs.eager(margin_loss(), x, w, y)
        held = slice(module.class_start, module.class_start + module.num_local)
        assert_close(loss, expected, dtype=F64, what=name)
        assert_close(own.grad, size * dx[mine], dtype=F64, what=name)
        assert_close(module.weight.grad, dw[held], dtype=F64, what=name)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_step_is_that_of_one_process_with_all_rows(ranks: int) -> None:
    run_ranks(ranks, one_step)


def train_with_ddp(group: dist.ProcessGroup) -> tuple[int, Tensor, Tensor]:
    x, w, y = whole()
    mine = share(group, UNEVEN[2])
    torch.manual_seed(4)
    backbone = DistributedDataParallel(nn.Linear(D, D, bias=False).double(), process_group=group)
    module = build(group, theirs.ArcFace(32.0, 0.3), w)
    optimizer = torch.optim.SGD(
        [{"params": backbone.parameters()}, {"params": module.parameters()}], lr=0.02, momentum=0.9
    )
    for _ in range(3):
        optimizer.zero_grad()
        module(backbone(x[mine]), y[mine]).backward()
        clip_grad_norm_(backbone.parameters(), 0.05, sharded=module.parameters(), process_group=group)
        optimizer.step()
    return module.class_start, module.weight.detach(), backbone.module.weight.detach()


def test_with_a_ddp_backbone_training_is_that_of_one_process() -> None:
    x, w, y = whole()
    torch.manual_seed(4)
    backbone = nn.Linear(D, D, bias=False).double()
    head = MarginSoftmaxHead(D, C, ArcFace(0.3), scale=32.0, dtype=F64)
    with torch.no_grad():
        head.weight.copy_(w)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        head(backbone(x), y).backward()
        assert float(torch.nn.utils.clip_grad_norm_(parameters, 0.05)) > 0.1
        optimizer.step()
    for start, weight, of_backbone in run_ranks(2, train_with_ddp):
        assert_close(weight, head.weight[start : start + len(weight)], dtype=F64)
        assert_close(of_backbone, backbone.weight, dtype=F64)


def in_the_default_group(group: dist.ProcessGroup) -> tuple[Any, ...]:
    """Four ranks are the workers' default group; of three classes the last rank has none."""
    x, w, y = cases.batch("random", 8, 3, D)
    torch.manual_seed(7)
    fresh = PartialFC_V2(theirs.CosFace(), D, C)
    wide = PartialFC_V2(theirs.CosFace(), D, C).double()
    module = build(None, theirs.CosFace(), w)
    mine = share(group, (2, 2, 2, 2))
    own = x[mine].clone().requires_grad_()
    module(own, y[mine]).backward()
    expected = theirs.eager(theirs.CosFace(), x, w, y)
    assert_close(own.grad, 4 * expected[1][mine], dtype=F64)
    assert module.weight.grad is not None
    assert module.weight.grad.shape == module.weight.shape
    assert list(module.state_dict()) == ["weight"]
    assert wide.weight.dtype == F64
    return module.world_size, module.num_local, fresh.class_start, fresh.weight.detach()


def test_no_group_given_is_the_default_group() -> None:
    found = run_ranks(4, in_the_default_group)
    assert [(world, held) for world, held, _, _ in found] == [(4, 1), (4, 1), (4, 1), (4, 0)]
    assert [start for _, _, start, _ in found] == [0, 3, 6, 8]
    # All ranks had one seed, and yet no centre is there twice: they are those of one process.
    torch.manual_seed(7)
    assert torch.equal(torch.cat([rows for *_, rows in found]), PartialFC_V2(theirs.CosFace(), D, C).weight)


def sampled_step(group: dist.ProcessGroup) -> list[tuple[int, int]]:
    """Each rank takes a sample; drawn again from the same seed, the step is the eager one over both."""
    x, w, y = cases.batch("random", B, 40, D)
    mine = share(group, UNEVEN[2])
    taken = []
    for name, rate in (("arcface", 0.5), ("filtered", 0.5), ("arcface", 0.01)):
        module = build(group, MARGINS[name](), w, sample_rate=rate)
        start, held = module.class_start, module.num_local
        here = (y >= start) & (y < start + held)
        torch.manual_seed(11)
        sample = Sampler(module.num_sample, module.rank)(torch.where(here, y - start, -1), held)
        torch.manual_seed(11)
        own = x[mine].clone().requires_grad_()
        loss = module(own, y[mine])
        loss.backward()
        samples: list[Any] = [None, None]
        dist.all_gather_object(samples, sample + start, group=group)
        classes = torch.cat(samples)
        expected, dx, dw = theirs.eager(MARGINS[name](), x, w[classes], torch.searchsorted(classes, y))
        assert_close(loss, expected, dtype=F64)
        assert_close(own.grad, 2 * dx[mine], dtype=F64)
        ours = (classes >= start) & (classes < start + held)
        assert_close(module.weight.grad[sample], dw[ours], dtype=F64)
        assert set(module.weight.grad.any(dim=1).nonzero()[:, 0].tolist()) <= set(sample.tolist())
        taken.append((len(sample), len(torch.unique(y[here]))))
    return taken


def test_each_rank_takes_a_sample_of_their_size() -> None:
    found = run_ranks(2, sampled_step)
    for (half, _), (filtered, _), (alone, targets) in found:
        assert (half, filtered) == (10, 10)
        assert alone == targets
    assert found[0] != found[1]


def refused(group: dist.ProcessGroup) -> list[str]:
    rank = dist.get_rank(group)
    x, w, y = whole()

    def told(act: Callable[[], Any]) -> str:
        try:
            act()
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    def differently(**options: Any) -> str:
        arguments = {"margin_loss": theirs.CosFace(), "embedding_size": D, "num_classes": C} | options
        return told(lambda: PartialFC_V2(**arguments, process_group=group))

    module = build(group, theirs.CosFace(), w)
    bad = torch.where(torch.arange(B) == 2, -1, y) if rank == 1 else y
    replicated = nn.ModuleDict({"net": nn.Linear(2, 2), "head": module})
    return [
        differently(num_classes=C + rank),
        differently(sample_rate=0.5 + rank / 10),
        differently(margin_loss=theirs.CosFace(64.0 if rank else 32.0)),
        differently(margin_loss=theirs.CombinedMarginLoss(64, 1, 0, 0, rank / 10)),
        differently(margin_loss=theirs.CosFace() if rank else None),
        told(lambda: module(x, bad)),
        told(lambda: DistributedDataParallel(replicated, process_group=group)),
    ]


def test_ranks_that_disagree_or_fail_are_named_on_every_rank() -> None:
    both = run_ranks(2, refused)
    for index, text in (
        (0, "num_classes: expected the same on every rank of process_group, got 10 on rank 0, 11 on rank 1"),
        (
            1,
            "sample_rate: expected the same on every rank of process_group, got 0.5 on rank 0, 0.6 on rank 1",
        ),
        (2, "scale: expected the same on every rank of process_group, got 32.0 on rank 0, 64.0 on rank 1"),
        (3, "interclass_filtering_threshold: expected the same on every rank of process_group, got 0.0 on"),
        (
            6,
            "RuntimeError: DistributedDataParallel: expected a module without a sharded head, got one with "
            "head.weight",
        ),
    ):
        for told in both:
            assert text in told[index]
    assert both[0][4].startswith("ValueError: margin_loss: expected a margin that is known")
    assert both[1][4].startswith("ValueError: rank 0 of process_group refused PartialFC_V2: margin_loss:")
    assert both[1][5].startswith(
        "ValueError: labels: expected 0 <= label < 10 or ignore_index=-100, got -1 in"
    )
    assert "rank 1 of process_group refused this call: labels: expected 0 <= label" in both[0][5]


def stepping(group: dist.ProcessGroup) -> dict[str, str]:
    """What each rank is told where rank 1 changes something between steps, and how a step goes afterwards."""
    x, w, y = whole()
    odd = dist.get_rank(group) == 1
    margin_loss = theirs.CombinedMarginLoss(64, 1, 0.5, 0)
    module = build(group, margin_loss, w)
    told = {}

    def step() -> str:
        try:
            module(x, y)
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def changed(owner: Any, name: str, value: Any) -> str:
        usual = getattr(owner, name)
        if odd:
            setattr(owner, name, value)
        found = step()
        setattr(owner, name, usual)
        return found

    told["scale"] = changed(margin_loss, "s", 0.0)
    told["not theirs"] = changed(margin_loss, "m1", 1.5)
    told["margin"] = changed(margin_loss, "m2", 0.4)
    told["filter"] = changed(margin_loss, "interclass_filtering_threshold", 0.2)
    told["fp16"] = changed(module, "fp16", True)
    told["backend"] = changed(module, "backend", "triton")
    told["after all"] = step()
    module.backend, margin_loss.interclass_filtering_threshold = "triton", 0.2
    told["a filter looks at no backend"] = step()
    return told


def test_what_one_rank_changes_between_steps_is_told_to_all() -> None:
    for rank, told in enumerate(run_ranks(2, stepping)):
        refused = "ValueError: " if rank == 1 else "ValueError: rank 1 of process_group refused this call: "
        same = "expected the same on every rank of process_group, got"
        assert told["scale"] == refused + "scale: expected a finite number above 0, got 0.0"
        assert told["not theirs"].startswith(refused + "margin_loss: expected CombinedMarginLoss with m3 > 0")
        assert f"margin: {same} ArcFace(m=0.5, boundary=none) on rank 0, ArcFace(m=0.4" in told["margin"]
        assert f"interclass_filtering_threshold: {same} 0.0 on rank 0, 0.2 on rank 1" in told["filter"]
        assert told["fp16"] == f"ValueError: fp16: {same} False on rank 0, True on rank 1"
        assert 'backend "triton" cannot serve this call' in told["backend"]
        assert told["after all"] == told["a filter looks at no backend"] == ""


def write_files(group: dist.ProcessGroup, folder: Path) -> None:
    """Train a step and save, as their script does on every rank; then train on."""
    training = script(group)
    _step(group, *training)
    rank = dist.get_rank(group)
    backbone, module, optimizer = training
    content = {
        "epoch": 1,
        "global_step": 1,
        "state_dict_backbone": backbone.module.state_dict(),
        "state_dict_softmax_fc": module.state_dict(),
        "state_optimizer": optimizer.state_dict(),
    }
    torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")
    _step(group, *training)
    torch.save(module.state_dict(), folder / f"after_{rank}.pt")


Script = tuple[DistributedDataParallel, PartialFC_V2, torch.optim.Optimizer]


def script(group: dist.ProcessGroup) -> Script:
    torch.manual_seed(0)
    backbone = DistributedDataParallel(nn.Linear(D, D).double(), process_group=group)
    module = build(group, theirs.ArcFace(64.0, 0.5), whole()[1])
    groups = [{"params": backbone.parameters()}, {"params": module.parameters()}]
    return backbone, module, torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=5e-4)


def _step(
    group: dist.ProcessGroup, backbone: nn.Module, module: PartialFC_V2, optimizer: torch.optim.Optimizer
) -> None:
    x, _, y = whole()
    mine = share(group, UNEVEN[dist.get_world_size(group)])
    module(backbone(x[mine]), y[mine]).backward()
    optimizer.step()
    optimizer.zero_grad()


def go_on_from_files(group: dist.ProcessGroup, folder: Path) -> None:
    backbone, module, optimizer = script(group)
    rank = dist.get_rank(group)
    content = torch.load(folder / f"checkpoint_gpu_{rank}.pt", weights_only=True)
    backbone.module.load_state_dict(content["state_dict_backbone"])
    module.load_state_dict(content["state_dict_softmax_fc"])
    optimizer.load_state_dict(content["state_optimizer"])
    _step(group, backbone, module, optimizer)
    expected = torch.load(folder / f"after_{rank}.pt", weights_only=True)["weight"]
    assert torch.equal(module.weight, expected)
    if rank != 1:
        other = torch.load(folder / "checkpoint_gpu_1.pt", weights_only=True)["state_dict_softmax_fc"]
        if other["weight"].shape != module.weight.shape:
            with pytest.raises(
                RuntimeError,
                match=r"weight: expected a tensor .*load_centres what save_centres or InsightFace",
            ):
                module.load_state_dict(other)


def reshard(group: dist.ProcessGroup, folder: Path) -> tuple[int, Tensor, Tensor]:
    """Their three files onto a head of ours on two ranks."""
    from expface_kernels.checkpoint import load_centres, open_insightface

    head = MarginSoftmaxHead(D, C, ExpFace(0.7), process_group=group, dtype=F64)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9)
    load_centres(open_insightface(folder, num_classes=C), head.weight, optimizer)
    momentum: Any = optimizer.state[head.weight]["momentum_buffer"]
    return head.class_start, head.local_weight.detach(), momentum.to_local()


def test_per_rank_files_load_as_they_are_and_merge_onto_other_ranks(tmp_path: Path) -> None:
    run_ranks(3, write_files, tmp_path)
    run_ranks(3, go_on_from_files, tmp_path)
    files = [torch.load(tmp_path / f"checkpoint_gpu_{rank}.pt", weights_only=True) for rank in range(3)]
    weight = torch.cat([content["state_dict_softmax_fc"]["weight"] for content in files])
    momentum = torch.cat([content["state_optimizer"]["state"][2]["momentum_buffer"] for content in files])
    assert weight.shape == (C, D)
    for start, rows, buffer in run_ranks(2, reshard, tmp_path):
        assert torch.equal(rows, weight[start : start + len(rows)])
        assert torch.equal(buffer, momentum[start : start + len(rows)])
