"""Training over many ranks: twenty steps are those of one process, and clipping and scaling act as one.

B rows of a rank · N rows of all ranks · F features of an image · D of an embedding · C classes
"""

from __future__ import annotations

import re
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from expface_kernels import ExpFace, GradScaler, MarginSoftmaxHead, clip_grad_norm_
from tests.distributed import run_ranks
from tests.test_distributed.steps import own_slice
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
    optimizer = torch.optim.SGD(
        [{"params": module.parameters()}, {"params": head.parameters()}], lr=LR, foreach=True
    )
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


SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=True)
OPTIMIZERS: dict[str, Any] = {
    "SGD": SGD,
    "Adam": partial(torch.optim.Adam, lr=1e-3),
    "AdamW": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
    "RMSprop": partial(torch.optim.RMSprop, lr=1e-3),
    "Adagrad": partial(torch.optim.Adagrad, lr=1e-3),
}
# How an update is computed; on GPUs "foreach" is torch's choice where nothing is said.
WAYS: dict[str, dict[str, bool]] = {
    "one by one": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
FUSED = ("Adam", "AdamW")  # torch has no other for DTensors
FEW = 5  # classes: the last of 4 ranks has none


class Model:
    """Backbone and head for a few steps, of one process or of a rank; by `images` of rows of ROWS[4]."""

    def __init__(self, group: Any) -> None:
        self.own = slice(None) if group is None else own_slice(ROWS[group.size()], group.rank())
        self.backbone = new_backbone(torch.float64)
        self.head = MarginSoftmaxHead(D, FEW, ExpFace(), process_group=group, dtype=torch.float64)
        self.parameters = [*self.backbone.parameters(), *self.head.parameters()]
        self.groups = [{"params": list(module.parameters())} for module in (self.backbone, self.head)]
        self.replicated: nn.Module = self.backbone
        if group is not None:
            self.replicated = DistributedDataParallel(self.backbone, process_group=group)

    def loss(self, step: int) -> Tensor:
        x, y = images(step, FEW, torch.float64)
        loss = self.head(self.replicated(x[self.own]), y[self.own])
        assert isinstance(loss, Tensor)
        return loss

    def backward(self, step: int) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        self.loss(step).backward()

    def gradients(self) -> list[Tensor]:
        return [local(p.grad).clone() for p in self.parameters]

    def values(self) -> list[Tensor]:
        return [local(p).clone() for p in self.parameters]


def optimized(group: Any) -> dict[tuple[str, str], list[Tensor]]:
    found = {}
    for name, make in OPTIMIZERS.items():
        for way, options in WAYS.items():
            if way == "fused" and name not in FUSED:
                continue
            model = Model(group)
            optimizer = make(model.groups, **options)
            for step in range(3):
                model.backward(step)
                optimizer.step()
            found[name, way] = model.values()
    return found


def all_in_one_group(group: Any) -> str:
    """What an optimizer says to backbone and head in one group, as torch updates one on GPUs."""
    model = Model(group)
    optimizer = SGD(model.parameters, foreach=True)
    model.backward(0)
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    return str(raised.value)


def assert_as_alone(on_ranks: list[list[Tensor]], alone: list[Tensor], what: str) -> None:
    """The backbone's on every rank, and the centres', put together."""
    for result in on_ranks:
        for i, (a, b) in enumerate(zip(result[:-1], alone[:-1], strict=True)):
            assert relative_error(a, b) <= SHARDED[a.dtype], f"{what}: backbone {i}"
    centres = torch.cat([result[-1] for result in on_ranks])
    assert relative_error(centres, alone[-1]) <= SHARDED[centres.dtype], f"{what}: centres"


def test_every_optimizer_takes_backbone_and_head_in_groups_of_their_own() -> None:
    on_ranks, alone = run_ranks(4, optimized), optimized(None)
    for name, right in alone.items():
        assert_as_alone([found[name] for found in on_ranks], right, ", ".join(name))


def test_in_one_group_torch_refuses_them_where_it_updates_a_group_at_once() -> None:
    """The reason for two groups in README, docs and example."""
    assert "got mixed torch.Tensor and DTensor" in run_ranks(1, all_in_one_group)[0]


NORMS = (2.0, 1.0, 3.0, float("inf"))
LIMITS = (1e-2, 1e6)  # one that clips and one that does not


def clipped(group: Any) -> dict[Any, Any]:
    """Norms and gradients after clipping by each of NORMS and LIMITS."""
    found: dict[Any, Any] = {}
    clip: Any = torch.nn.utils.clip_grad_norm_ if group is None else clip_grad_norm_
    for kind in NORMS:
        for limit in LIMITS:
            model = Model(group)
            model.backward(0)
            norm = clip(model.parameters, limit, kind)
            found[kind, limit] = (norm, model.gradients())
    if group is None:
        return found
    # The same with the head's rows as plain parameters, which say nothing of their ranks.
    model.backward(0)
    rows = nn.Parameter(local(model.head.weight))
    rows.grad = local(model.head.weight.grad) if group.rank() != 3 else None  # that rank holds no class
    backbone = list(model.backbone.parameters())
    found["plain"] = clip_grad_norm_(backbone, 1e6, sharded=[rows], process_group=group)
    found["head alone"] = clip_grad_norm_(model.head.weight, 1e6)
    found["backbone alone"] = clip_grad_norm_(backbone, 1e6)
    if group.rank() == 0:
        local(model.head.weight.grad)[0, 0] = torch.inf
    try:
        clip_grad_norm_(model.parameters, 1.0, error_if_nonfinite=True)
    except RuntimeError as error:
        found["error"] = str(error)
    return found


def test_clipping_finds_one_norm_on_all_ranks_and_scales_as_one_process_does() -> None:
    on_ranks, alone = run_ranks(4, clipped), clipped(None)
    for key, (norm, gradients) in alone.items():
        for found in on_ranks:
            assert torch.equal(found[key][0], on_ranks[0][key][0])
            assert relative_error(found[key][0], norm) <= SHARDED[torch.float64], key
        assert_as_alone([found[key][1] for found in on_ranks], gradients, f"clipped by {key}")
    norm = alone[2.0, 1e6][0]
    for found in on_ranks:
        assert relative_error(found["plain"], norm) <= SHARDED[torch.float64]
        both = found["head alone"] ** 2 + found["backbone alone"] ** 2
        assert relative_error(both, norm**2) <= SHARDED[torch.float64]
        assert found["error"] == "clip_grad_norm_: the norm of order 2.0 over all ranks is inf"


def scaled(group: Any) -> list[tuple[float, list[Tensor]]]:
    """Scale and parameters after each of three steps; in the second the first centre's gradient overflows."""
    model = Model(group)
    scaler: Any = torch.amp.GradScaler("cpu") if group is None else GradScaler("cpu", process_group=group)
    optimizer = torch.optim.SGD(model.groups, lr=0.01, foreach=True)
    found = []
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(model.loss(step)).backward()
        if step == 1 and model.head.class_start == 0:
            local(model.head.weight.grad)[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        found.append((scaler.get_scale(), model.values()))
    return found


def test_an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    on_ranks, alone = run_ranks(4, scaled), scaled(None)
    assert [scale for scale, _ in alone] == [65536.0, 32768.0, 32768.0]
    for step, (scale, values) in enumerate(alone):
        assert {found[step][0] for found in on_ranks} == {scale}
        assert_as_alone([found[step][1] for found in on_ranks], values, f"step {step}")
    for found in on_ranks:
        moved = [
            any(not torch.equal(a, b) for a, b in zip(found[i][1], found[i + 1][1], strict=True))
            for i in (0, 1)
        ]
        assert moved == [False, True]


def test_a_scaler_is_told_its_group() -> None:
    with pytest.raises(TypeError, match=r"process_group: expected a torch.distributed.Proc.* NoneType"):
        GradScaler("cpu", process_group=None)
    with pytest.raises(TypeError, match="process_group"):
        GradScaler("cpu")  # type: ignore[call-arg]


def without_a_gpu(group: Any) -> list[tuple[bool, bool]]:
    """Of "cuda" and of "cpu": is it enabled, does it skip a step whose gradient is Inf?"""
    found = []
    for device in ("cuda", "cpu"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.cuda.amp.GradScaler is enabled, but CUDA is not")
            scaler = GradScaler(device, process_group=group)
        parameter = nn.Parameter(torch.ones(1))
        scaler.scale(parameter.sum()).backward()
        parameter.grad = torch.full((1,), torch.inf)
        scaler.step(torch.optim.SGD([parameter], lr=0.1))
        found.append((scaler.is_enabled(), bool(parameter == 1)))
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_where_there_is_no_gpu_a_scaler_for_one_is_off() -> None:
    """As docs/migrate.md warns."""
    assert run_ranks(1, without_a_gpu) == [[(False, False), (True, True)]]


@pytest.mark.parametrize("norm_type", NORMS)
def test_one_process_clips_as_torch_does(norm_type: float) -> None:
    for limit in LIMITS:
        ours, theirs = Model(None), Model(None)
        for model in (ours, theirs):
            model.backward(0)
            model.parameters[0].grad = None
        norm = clip_grad_norm_(iter(ours.parameters), limit, norm_type)
        right = torch.nn.utils.clip_grad_norm_(theirs.parameters, limit, norm_type)
        assert norm.dtype == right.dtype
        assert relative_error(norm, right) <= SHARDED[torch.float64]
        for a, b in zip(ours.parameters[1:], theirs.parameters[1:], strict=True):
            assert relative_error(a.grad, b.grad) <= SHARDED[torch.float64]
    assert clip_grad_norm_([], 1.0) == 0
    assert clip_grad_norm_(nn.Parameter(torch.ones(2)), 1.0, norm_type) == 0


ONE_OR_MORE = "expected a tensor or an iterable of tensors, got"
GROUP_NEEDED = "process_group: expected the group whose ranks hold `sharded`, got None"


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (([], -1.0), ValueError, "max_norm: expected at least 0, got -1.0"),
        (([], float("nan")), ValueError, "max_norm: expected at least 0, got nan"),
        (([], "large"), TypeError, "max_norm: expected a number, got str 'large'"),
        (([], 1.0, 0), ValueError, "norm_type: expected a number above 0 or inf, got 0.0"),
        (([], 1.0, None), TypeError, "norm_type: expected a number, got NoneType None"),
        ((3, 1.0), TypeError, f"parameters: {ONE_OR_MORE} int"),
        ((nn.Linear(1, 1), 1.0), TypeError, f"parameters: {ONE_OR_MORE} Linear; pass its parameters()"),
        (([torch.ones(1), 3], 1.0), TypeError, "parameters: expected tensors, got int at index 1"),
        (([], 1.0, 2.0, 3), TypeError, f"sharded: {ONE_OR_MORE} int"),
        (([], 1.0, 2.0, [torch.ones(1)]), ValueError, GROUP_NEEDED),
    ],
)
def test_what_clipping_does_not_take_is_named(
    arguments: tuple[Any, ...], kind: type[Exception], text: str
) -> None:
    positional, sharded = arguments[:3], arguments[3:]
    with pytest.raises(kind, match=f"^{re.escape(text)}$"):
        clip_grad_norm_(*positional, **({"sharded": sharded[0]} if sharded else {}))
