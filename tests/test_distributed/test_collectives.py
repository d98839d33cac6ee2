"""What a step sends: which collectives, how many bytes, over which group; nothing grows with the classes.

W ranks · B rows of a rank · N rows of all · D features · C classes
"""

from __future__ import annotations

import importlib
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from expface_kernels import CosFace, ExpFace, GradScaler, MarginSoftmaxHead, clip_grad_norm_
from expface_kernels.distributed.group import Group
from expface_kernels.distributed.ranges import shard_ranges
from expface_kernels.options import LossOptions
from expface_kernels.pipeline import Shard, loss_step
from tests.distributed import DEADLINE, bare_processes, run_ranks
from tests.tolerances import RANKS_GRADIENT, RANKS_LOSS

D = 16
ROWS = (4, 2)
N = sum(ROWS)
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
Sent = list[tuple[str, int]]


# As torch's dispatcher has them; whatever else is sent appears by its own name, as what DTensor sends does.
NAMES = {
    "_allgather_base_": "all_gather",
    "allreduce_": "all_reduce",
    "_reduce_scatter_base_": "reduce_scatter",
}


class Collectives(TorchDispatchMode):
    """(operation, bytes that this rank puts in) of all that is sent; AssertionError for another group."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.group = group
        self.sent: Sent = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it goes first, and what it makes of this comes here
        name = func._schema.name.split("::")[1]
        if func.namespace == "c10d":
            boxed = next(a for a in args if isinstance(a, torch.ScriptObject))
            # A gather and a scatter take (output, input), a reduction a list of what it works on in place.
            given = [args[1]] if isinstance(args[0], Tensor) else args[0]
            self._count(name, given, dist.ProcessGroup.unbox(boxed).group_name)
        elif func.namespace == "_c10d_functional" and isinstance(args[-1], str):  # else it only waits
            self._count(name, [args[0]] if isinstance(args[0], Tensor) else args[0], args[-1])
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, given: list[Tensor], group: str) -> None:
        assert group == self.group.group_name, f"{name} over group {group}"
        self.sent.append((NAMES.get(name, name), sum(t.nbytes for t in given)))


def step(
    group: Any,
    *,
    classes: int = 10,
    dtype: torch.dtype = F32,
    by_row: bool = False,
    stats: bool = False,
    frozen: bool = False,
    rows: tuple[int, ...] = ROWS,
    **options: Any,
) -> Sent:
    """What one step of a head sends, forward and backward."""
    head = MarginSoftmaxHead(D, classes, process_group=group, **options)
    count = rows[group.rank()]
    x = torch.randn(count, D).to(dtype).requires_grad_(not frozen)
    y = torch.randint(classes, (count,))
    head.margin = CosFace(torch.full((count,), 0.3)) if by_row else ExpFace()
    with Collectives(group) as seen:
        out = head(x, y, return_stats=stats)
        (out[0] if stats else out).sum().backward()
    return seen.sent


def others(group: Any) -> dict[str, Sent]:
    """What is sent beside steps."""
    seen = {}
    for classes in (10, 1003):
        with Collectives(group) as built:
            head = MarginSoftmaxHead(D, classes, process_group=group)
        seen[f"built, {classes} classes"] = built.sent
    count = ROWS[group.rank()]
    x, y = torch.randn(count, D, requires_grad=True), torch.randint(10, (count,))
    with Collectives(group) as evaluated, torch.no_grad():
        head.eval()(x, y)
    with Collectives(group) as nearest:
        head.topk(x, 3)
    with Collectives(group) as drawn:
        head.reset_parameters()
        head.state_dict()
    head(x, y).backward()
    backbone = nn.Linear(2, 2)
    backbone(torch.ones(1, 2)).sum().backward()
    scaler = GradScaler("cpu", process_group=group)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1)
    scaler.scale(torch.ones(()))
    with Collectives(group) as scaled:
        scaler.unscale_(optimizer)
    with Collectives(group) as clipped:
        clip_grad_norm_([*backbone.parameters(), *head.parameters()], 1.0)
    weight: Any = head.weight
    with Collectives(group) as asked_for, torch.no_grad():
        weight.full_tensor()
    with Collectives(group) as by_the_way, torch.no_grad():
        weight.softmax(0)
    return {
        **seen,
        "evaluated": evaluated.sent,
        "topk": nearest.sent,
        "drawn": drawn.sent,
        "scaled": scaled.sent,
        "clipped": clipped.sent,
        "asked of DTensor": asked_for.sent,
        "by DTensor on its own": by_the_way.sent,
    }


COUNTS = ("all_gather", 5 * 8)
LOG_L_AND_THETA = ("all_reduce", 2 * N * 8)
STATISTICS = ("all_gather", 2 * N * 8)
LABELS = ("all_gather", 4 * 8)  # as many as the rank with the most rows has


def rows_of(dtype: torch.dtype) -> tuple[str, int]:
    return "all_gather", 4 * D * dtype.itemsize


def gradient_of(dtype: torch.dtype) -> tuple[str, int]:
    """Of the rows of all ranks, padded; added up in float32 at least."""
    return "reduce_scatter", 2 * 4 * D * max(dtype.itemsize, 4)


STEP = [COUNTS, rows_of(F32), LABELS, LOG_L_AND_THETA, gradient_of(F32)]
STEPS: dict[str, tuple[dict[str, Any], Sent]] = {
    "plain": ({}, STEP),
    "a hundred times the classes": ({"classes": 1003}, STEP),
    "sampled": ({"classes": 1003, "sample_rate": 0.1}, STEP),
    "exact": ({"target_gradient": "exact"}, STEP),
    "sum": ({"reduction": "sum"}, STEP),
    "float64": ({"dtype": F64}, [COUNTS, rows_of(F64), LABELS, LOG_L_AND_THETA, gradient_of(F64)]),
    "bfloat16": ({"dtype": BF16}, [COUNTS, rows_of(BF16), LABELS, LOG_L_AND_THETA, gradient_of(BF16)]),
    "s = 70": ({"scale": 70.0}, STEP),
    "s = 128": (
        {"scale": 128.0},
        [COUNTS, rows_of(F32), LABELS, ("all_gather", 2 * N * 8), gradient_of(F32)],
    ),
    "equal rows": (
        {"equal_rows": True, "rows": (4, 4)},
        [rows_of(F32), LABELS, ("all_reduce", 2 * 8 * 8), gradient_of(F32)],
    ),
    "statistics": ({"stats": True}, [*STEP[:-1], STATISTICS, STEP[-1]]),
    "margin by row": ({"by_row": True}, [*STEP[:-1], ("all_gather", (4 + 1) * 8), STEP[-1]]),
    "margin by row, exact": (
        {"by_row": True, "target_gradient": "exact"},
        [*STEP[:-1], ("all_gather", 2 * (4 + 1) * 8), STEP[-1]],  # psi and its slope
    ),
    "margin by row, equal rows": (
        {"by_row": True, "equal_rows": True, "rows": (4, 4)},
        [rows_of(F32), LABELS, ("all_reduce", 2 * 8 * 8), ("all_gather", 4 * 8), gradient_of(F32)],
    ),
    "none": ({"reduction": "none"}, [*STEP[:-1], ("all_gather", 4 * 8), STEP[-1]]),  # in the backward
    "frozen backbone": ({"frozen": True}, STEP[:-1]),
    "no rows at all": ({"rows": (0, 0)}, [COUNTS]),
}


def all_steps(group: Any) -> dict[str, Sent]:
    return {name: step(group, **options) for name, (options, _) in STEPS.items()} | others(group)


@pytest.fixture(scope="module")
def sent() -> list[dict[str, Sent]]:
    """By rank, what each of STEPS sends, and what else does."""
    return run_ranks(2, all_steps)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_sends_this_and_nothing_else(name: str, sent: list[dict[str, Sent]]) -> None:
    for rank in range(2):
        assert sent[rank][name] == STEPS[name][1]


def test_building_a_head_sends_its_options_once(sent: list[dict[str, Sent]]) -> None:
    for rank in range(2):
        few, many = sent[rank]["built, 10 classes"], sent[rank]["built, 1003 classes"]
        assert [kind for kind, _ in few] == ["all_gather", "all_gather"]
        assert few[0] == ("all_gather", 8)
        assert few[1][1] < 1024
        assert many[1][1] - few[1][1] == 2  # "1003" for "10"


def test_what_is_sent_beside_steps(sent: list[dict[str, Sent]]) -> None:
    for rank in range(2):
        seen = sent[rank]
        assert seen["evaluated"] == STEP[:-1]
        assert seen["topk"] == [COUNTS, rows_of(F32), ("all_gather", 2 * N * 3 * 8)]
        assert seen["drawn"] == []
        assert seen["scaled"] == [("all_reduce", 4)]
        assert seen["clipped"] == [("all_reduce", 8)]


def test_what_a_dtensor_sends_by_itself_is_seen(sent: list[dict[str, Sent]]) -> None:
    """Or a head that gathers its centres would pass for one that does not."""
    largest = 502 * D * 4  # of 1003 classes
    for rank in range(2):
        assert sent[rank]["asked of DTensor"] == [("all_gather_into_tensor", largest)]
        assert sum(count for _, count in sent[rank]["by DTensor on its own"]) >= largest // 2


def in_a_strange_world(rank: int, folder: str, end: Any, absent: bool) -> None:
    """The head where the default group talks to nobody, or where there is none any more."""
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # registers the backend
    dist.init_process_group("fake", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    group = dist.new_group([0, 1], backend="gloo")
    classes, count = 10, ROWS[rank]
    torch.manual_seed(rank)
    x, y = torch.randn(count, D, requires_grad=True), torch.randint(classes, (count,))
    if absent:
        dist.GroupMember.WORLD = None  # type: ignore[assignment]
        assert not dist.is_initialized()
        weight = MarginSoftmaxHead(D, classes).local_weight.detach()
        shard = Shard(Group(group), classes, shard_ranges(classes, 2)[rank])
        own = weight[shard.held.start : shard.held.stop]
        loss = loss_step(x, own, y, ExpFace(), LossOptions(target_gradient="detached"), shard=shard)
    else:
        loss = MarginSoftmaxHead(D, classes, process_group=group)(x, y)
    assert isinstance(loss, Tensor)
    loss.backward()
    end.send_bytes(pickle.dumps((loss.item(), x.detach(), y, x.grad)))


@pytest.mark.parametrize("absent", [False, True], ids=["of another backend", "absent"])
def test_the_default_group_is_never_asked(absent: bool) -> None:
    with bare_processes(2, in_a_strange_world, absent) as (_, ends):
        assert all(end.poll(DEADLINE) for end in ends)
        results = [pickle.loads(end.recv_bytes()) for end in ends]
    x = torch.cat([x for _, x, _, _ in results]).requires_grad_()
    loss = MarginSoftmaxHead(D, 10)(x, torch.cat([y for _, _, y, _ in results]))
    loss.backward()
    for found, *_ in results:
        assert found == pytest.approx(loss.item(), rel=RANKS_LOSS)
    assert torch.allclose(torch.cat([grad for *_, grad in results]), 2 * x.grad, rtol=RANKS_GRADIENT)
