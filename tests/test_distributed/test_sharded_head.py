"""A sharded head as a module: what it says of itself, its state, copies, casts, and modes of autograd.

C classes · D features
"""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from expface_kernels import ExpFace, MarginSoftmaxHead
from expface_kernels.compat.insightface import PartialFC_V2
from expface_kernels.distributed.module import SEED_ROWS, initialize
from expface_kernels.distributed.ranges import ClassRange, shard_ranges
from tests.distributed import run_ranks
from tests.tolerances import SUM_ORDER, relative_error

C, D = 5, 8  # on 4 ranks: 2, 2, 1 and no class
WORLD = 4


def head_as_a_module(group: Any) -> dict[str, Any]:
    """Checks on every rank; returns what they are to have in common."""
    head = MarginSoftmaxHead(D, C, process_group=group, sample_rate=0.9)
    whole = MarginSoftmaxHead(D, C)
    shard = shard_ranges(C, WORLD)[group.rank()]
    x, y = torch.randn(3, D, requires_grad=True), torch.tensor([0, 2, C - 1])

    # What it holds, and what it is part of.
    assert isinstance(head.weight, nn.Parameter)
    assert isinstance(head.weight, DTensor)
    assert head.weight.placements == (Shard(0),)
    assert head.weight.shape == (C, D)
    assert torch.equal(head.weight.full_tensor(), whole.weight)
    assert (head.class_start, head.num_local) == shard
    assert type(head.local_weight) is torch.Tensor
    assert torch.equal(head.local_weight, whole.weight[shard.start : shard.stop])
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    with torch.no_grad():
        head.local_weight.zero_()  # it is the memory of the parameter, not a copy
    assert not head.weight.to_local().any()
    head.reset_parameters()
    assert torch.equal(head.local_weight, whole.weight[shard.start : shard.stop])

    # Copies, state, casts.
    loss = head(x, y)
    twin = copy.deepcopy(head)
    assert twin.sampling_step == 1
    assert torch.equal(twin(x, y), head(x, y))
    other = MarginSoftmaxHead(D, C, process_group=group, sample_rate=0.9)
    with torch.no_grad():
        other.local_weight.zero_()
    buffer = io.BytesIO()
    torch.save(head.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.sampling_step == 2
    assert torch.equal(other(x, y), head(x, y))
    wide = copy.deepcopy(head).double()
    assert wide.local_weight.dtype == torch.float64
    wide(x.double(), y).backward()
    assert isinstance(wide.weight.grad, DTensor)
    assert wide.weight.grad.to_local().shape == (shard.size, D)
    late = MarginSoftmaxHead(D, C, process_group=group, device="meta")
    assert late.weight.is_meta
    late.to_empty(device="cpu").reset_parameters()
    assert torch.equal(late.local_weight, head.local_weight)

    # Modes of autograd; all classes from here.
    head.eval()
    loss = head(x, y)
    with torch.inference_mode():
        assert torch.equal(head(x, y), loss)
    x.grad, head.weight.grad = None, None
    loss.backward(retain_graph=True)
    once = x.grad.clone(), head.weight.grad.to_local().clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once[0])
    assert torch.equal(head.weight.grad.to_local(), 2 * once[1])
    x.grad, head.weight.grad = None, None
    (head(x, y) + head(x.flip(0), y)).backward()
    both = x.grad, head.weight.grad.to_local()
    parts = []
    for rows in (x, x.flip(0)):
        head.weight.grad = None
        head(rows, y).backward()
        parts.append(head.weight.grad.to_local())
    if shard.size:
        assert relative_error(both[1], parts[0] + parts[1]) <= SUM_ORDER
    head.requires_grad_(False)
    head.weight.grad = None
    head(x, y).backward()
    assert head.weight.grad is None
    head.margin = ExpFace(0.5)
    return {"loss": loss.item(), "shown": repr(head)}


def test_a_sharded_head_is_a_module_like_any_other() -> None:
    results = run_ranks(WORLD, head_as_a_module)
    assert len({found["loss"] for found in results}) == 1
    assert re.search(r"ExpFace\(m=0.5\).*, sample_rate=0.9, classes 2 to 4 of rank 1, ", results[1]["shown"])


def loading(group: Any) -> list[str]:
    """What a rank is told that loads states of other heads; its centres stay."""
    whole, head = MarginSoftmaxHead(D, C), MarginSoftmaxHead(D, C, process_group=group, seed=1)
    theirs = PartialFC_V2(ExpFace(), D, C, process_group=group)
    before = head.local_weight.clone(), theirs.weight.detach().clone()
    told = []
    for module, prefix, options in (
        (head, "", {}),
        (head, "", {"assign": True}),
        (nn.ModuleDict({"head": head}), "head.", {"strict": False}),
        (theirs, "", {}),
    ):
        state = {f"{prefix}{name}": value for name, value in whole.state_dict().items()}
        with pytest.raises(RuntimeError) as raised:
            module.load_state_dict(state, **options)
        told.append(str(raised.value))
    assert torch.equal(head.local_weight, before[0])
    assert torch.equal(theirs.weight, before[1])
    with torch.no_grad():  # docs/checkpoints.md
        stop = head.class_start + head.num_local
        head.local_weight.copy_(whole.state_dict()["weight"][head.class_start : stop])
    assert torch.equal(head.weight.full_tensor(), whole.weight)
    return told


def test_a_state_with_all_classes_says_what_loads_it() -> None:
    for rank, told in enumerate(run_ranks(WORLD, loading)):
        for text, key in zip(told, ("weight", "weight", "head.weight", "weight"), strict=True):
            assert f"\t{key}: expected a " in text
            assert "got a tensor (5, 8)" in text
            assert text.count("\n") == 1, "nothing else is missing"
            for name in ("load_sharded", "load_centres", "docs/checkpoints.md"):
                assert name in text
        start, size = shard_ranges(C, WORLD)[rank]
        assert (
            f"expected a DTensor (5, 8), as this rank's own state_dict() has it, with its {size} classes"
            in told[0]
        )
        assert f" from {start} on" in told[0]


def an_empty_batch(group: Any) -> dict[str, Any]:
    """The last rank has no rows: from its backbone in another dtype, and from nowhere."""
    head = MarginSoftmaxHead(D, C, process_group=group)
    linear = nn.Linear(D, D)
    last = group.rank() == WORLD - 1
    x, y = torch.ones(0 if last else 2, D), torch.zeros(0 if last else 2, dtype=torch.int64)
    e = linear(x)
    head(e if last else e.bfloat16(), y).backward()
    loss = head(torch.zeros(0, D) if last else e.detach().requires_grad_(), y)
    loss.backward()
    return {"loss": loss.item(), "backbone": linear.weight.grad, "moved": bool(linear.weight.grad.any())}


def test_a_rank_without_rows_needs_neither_their_dtype_nor_a_graph() -> None:
    results = run_ranks(WORLD, an_empty_batch)
    assert len({found["loss"] for found in results}) == 1
    assert [found["moved"] for found in results] == [True] * (WORLD - 1) + [False]
    assert all(found["backbone"].isfinite().all() for found in results)  # and there: DDP would wait for it


@pytest.mark.parametrize("classes", [1, 15, 17, 2 * SEED_ROWS, 2 * SEED_ROWS + 1, 3 * SEED_ROWS - 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_class_starts_the_same_whoever_holds_it(classes: int, dtype: torch.dtype) -> None:
    whole = torch.empty(classes, 3, dtype=dtype)
    initialize(whole, ClassRange(0, classes), seed=6)
    for world in (2, 3, 5):
        for shard in shard_ranges(classes, world):
            part = torch.full((shard.size, 3), torch.nan, dtype=dtype)
            initialize(part, shard, seed=6)
            assert torch.equal(part, whole[shard.start : shard.stop])
    more = torch.empty(classes + 40, 3, dtype=dtype)
    initialize(more, ClassRange(0, classes + 40), seed=6)
    assert torch.equal(more[:classes], whole)  # nor do other classes change any
    if classes > SEED_ROWS:
        assert not torch.equal(whole[:5], whole[SEED_ROWS : SEED_ROWS + 5])
