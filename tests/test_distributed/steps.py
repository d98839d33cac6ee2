"""A training step that one process and the ranks of a group take alike, for tests to compare.

W ranks · B rows of a rank · N rows of all, by rank · F features of an image · D of an embedding
C classes · local: the rows of this rank, or its classes
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from expface_kernels import CosFace, ExpFace, MarginSoftmaxHead, margin_cross_entropy
from expface_kernels.distributed.ranges import shard_ranges
from expface_kernels.distributed.sampling import Sampler

F, D = 12, 16
IGNORED = 255


@dataclass(frozen=True)
class Case:
    """One step; head: options of MarginSoftmaxHead, the same on every rank."""

    name: str
    rows: tuple[int, ...]
    """Of each rank."""
    classes: int = 11
    head: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    margin: str = "plain"
    """"plain": ExpFace(0.7); "rows": CosFace of a leaf tensor times embeddings' norms, one value a row;
    "trained": a module with one parameter."""
    ignored: tuple[int, ...] = ()
    """Rows among the N, which hold NaN."""
    ddp: bool = True
    micro_batches: int = 1
    """The rows come in so many parts, all but the last under no_sync."""
    autocast: bool = False
    frozen: str = ""
    """"backbone" or "centres" want no gradient."""

    @property
    def world(self) -> int:
        return len(self.rows)

    @property
    def options(self) -> dict[str, Any]:
        return {"ignore_index": IGNORED, "seed": 3, "dtype": self.dtype, **self.head}


def images(case: Case) -> tuple[Tensor, Tensor]:
    """(N, F) and labels (N,), all classes that there are rows for, and IGNORED."""
    g = torch.Generator().manual_seed(17)
    rows = sum(case.rows)
    x = torch.randn(rows, F, generator=g, dtype=torch.float64).to(case.dtype)
    y = torch.randperm(max(rows, case.classes), generator=g)[:rows] % case.classes
    y[list(case.ignored)] = IGNORED
    return x, y


def new_backbone(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(F, D).to(dtype)


def own_slice(rows: Sequence[int], rank: int) -> slice:
    return slice(sum(rows[:rank]), sum(rows[: rank + 1]))


def steepness(case: Case) -> Tensor:
    """(N,) what the margin's per-row tensor starts from."""
    return torch.linspace(0.1, 0.4, sum(case.rows), dtype=case.dtype)


def importance(case: Case) -> Tensor:
    """(N,) what each loss is multiplied by where they come one by one."""
    return torch.linspace(1.5, 0.5, sum(case.rows), dtype=torch.float64)


def embed(case: Case, backbone: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(B, D), the rows to ignore full of NaN, as padding may be."""
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        return torch.where((y == IGNORED)[:, None], torch.nan, backbone(x))


def with_norms(leaf: Tensor, embeddings: Tensor) -> CosFace:
    """A margin that grows with a row's length, as MagFace's does: gradients flow to leaf and embeddings."""
    length = torch.linalg.vector_norm(embeddings, dim=1)
    return CosFace(leaf * torch.where(length.isnan(), 1.0, torch.tanh(length)))


class TrainedMargin(nn.Module):
    """cos θ − m with an m that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, theta: Tensor) -> Tensor:
        return torch.cos(theta) - self.m


def margin_of(case: Case, leaf: Tensor, embeddings: Tensor, trained: TrainedMargin) -> Any:
    if case.margin == "rows":
        return with_norms(leaf, embeddings)
    return trained if case.margin == "trained" else ExpFace()


def weighted(case: Case, loss: Tensor, own: slice) -> Tensor:
    """() to differentiate: the gradient that arrives at the loss is not 1, nor the same for every row."""
    return loss * 1.5 if loss.dim() == 0 else (loss * importance(case)[own]).sum()


def _frozen(case: Case, backbone: nn.Module, weight: Tensor) -> None:
    backbone.requires_grad_(case.frozen != "backbone")
    weight.requires_grad_(case.frozen != "centres")


def _gradient(tensor: Tensor) -> Tensor | None:
    grad: Any = tensor.grad
    if grad is None:
        return None
    return grad.to_local() if hasattr(grad, "to_local") else grad


def sharded_step(group: Any, case: Case) -> dict[str, Any]:
    """What this rank finds: its loss, gradients, statistics, nearest classes."""
    rank = group.rank()
    own = own_slice(case.rows, rank)
    x, y = (t[own] for t in images(case))
    module = new_backbone(case.dtype)
    head = MarginSoftmaxHead(D, case.classes, process_group=group, **case.options)
    _frozen(case, module, head.weight)
    trains = case.frozen != "backbone"
    backbone = DistributedDataParallel(module, process_group=group) if case.ddp and trains else module
    leaf, trained = steepness(case)[own].requires_grad_(), TrainedMargin()
    losses, stats = [], []
    for i in range(case.micro_batches):
        last = i == case.micro_batches - 1
        rows = slice(i, None, case.micro_batches)
        waits = backbone.no_sync() if case.ddp and trains and not last else contextlib.nullcontext()
        with waits:
            e = embed(case, backbone, x[rows], y[rows])
            head.margin = margin_of(case, leaf[rows], e, trained)
            with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
                loss, found = head(e, y[rows], return_stats=True)
            (weighted(case, loss, own) / case.micro_batches).backward()
        losses.append(loss.detach())
        stats.append(found)
    cos, classes = head.topk(embed(case, module, x, torch.zeros_like(y)), min(7, case.classes))
    return {
        "loss": losses[0] if case.micro_batches == 1 else torch.stack(losses).mean(),
        "backbone": [_gradient(p) for p in module.parameters()],
        "dw": _gradient(head.weight),
        "leaf": leaf.grad,
        "trained": trained.m.grad,
        "stats": tuple(stats[0]) if case.micro_batches == 1 else (),
        "cos": cos,
        "classes": classes,
        "sampling_step": head.sampling_step,
        "start": head.class_start,
        "local": head.local_weight.detach().clone(),
    }


def sharded_steps(group: Any, cases: list[Case]) -> dict[str, dict[str, Any]]:
    return {case.name: sharded_step(group, case) for case in cases}


def sampled_classes(case: Case) -> Tensor | None:
    """What all ranks draw in their first step, by the documented rule; None for all classes."""
    rate = case.head.get("sample_rate", 1.0)
    if rate == 1:
        return None
    _, y = images(case)
    drawn = []
    for rank, shard in enumerate(shard_ranges(case.classes, case.world)):
        here = (y != IGNORED) & (y >= shard.start) & (y < shard.stop)
        targets = torch.where(here, y - shard.start, -1)
        sample = Sampler(rate, case.options["seed"], 0, rank)(targets, shard.size)
        drawn.append(shard.start + (torch.arange(shard.size) if sample is None else sample))
    return torch.cat(drawn)


def whole_step(case: Case) -> dict[str, Any]:
    """The same from one process that has all rows and centres, through the reference where dtypes allow."""
    x, y = images(case)
    backbone = new_backbone(case.dtype)
    options = dict(case.options)
    head = MarginSoftmaxHead(D, case.classes, seed=options["seed"], dtype=case.dtype)
    _frozen(case, backbone, head.weight)
    leaf, trained = steepness(case).requires_grad_(), TrainedMargin()
    e = embed(case, backbone, x, y)
    margin = margin_of(case, leaf, e, trained)
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        loss, stats = margin_cross_entropy(
            e,
            head.weight,
            y,
            margin,
            scale=options.get("scale", 64.0),
            reduction=options.get("reduction", "mean"),
            ignore_index=IGNORED,
            target_gradient=options.get("target_gradient", "detached"),
            class_subset=sampled_classes(case),
            backend="cpu" if case.autocast else "reference",
            return_stats=True,
        )
    if loss.requires_grad:
        weighted(case, loss, slice(None)).backward()
    cos, classes = head.topk(embed(case, backbone, x, torch.zeros_like(y)), min(7, case.classes))
    return {
        "loss": loss.detach(),
        "backbone": [_gradient(p) for p in backbone.parameters()],
        "dw": _gradient(head.weight),
        "leaf": leaf.grad,
        "trained": trained.m.grad,
        "stats": tuple(stats),
        "cos": cos,
        "classes": classes,
        "local": head.weight.detach(),
    }
