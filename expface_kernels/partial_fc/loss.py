"""The loss over centres that many ranks hold, over all classes or a sample; one step is `partial_loss`.

Everything that heads share is here: they bring the plain rows of their rank, and say which classes these are.

B rows of this rank · N rows of all ranks, by rank · D features · C classes of this shard · S of its sample
y labels as the op takes them: position, NO_TARGET or INVALID_TARGET · eqs.: docs/math.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from expface_kernels import backends, functional, ops
from expface_kernels.backends.base import INVALID_TARGET, NO_TARGET
from expface_kernels.checks import (
    check_k,
    check_labels,
    check_num_rows,
    check_rows_and_centres,
    check_trained_alike,
)
from expface_kernels.functional import Negatives
from expface_kernels.margins import MarginFunction, describe, is_per_row, target_similarity
from expface_kernels.partial_fc import comm
from expface_kernels.partial_fc.comm import Header, Ranks
from expface_kernels.partial_fc.ranges import ClassRange
from expface_kernels.stats import BatchStats, batch_stats, reduce_rows

Sample = Callable[[Tensor, int], Tensor | None]
"""(targets (N,) int64 local or < 0, num_local) → sorted local classes (S,) int64 that hold all targets, or
None for all: `sampling.Sampler`, or a rule of another's."""


@dataclass(frozen=True)
class Setting:
    """What one call of a head computes; all but the shard and memory the same on every rank."""

    num_classes: int
    shard: ClassRange
    """The classes of this rank."""
    margin: MarginFunction
    scale: float
    reduction: str
    ignore_index: int
    target_gradient: str
    workspace_bytes: int
    backend: str
    ranks: Ranks | None = None
    """None: this process has all classes."""
    sample: Sample | None = None
    sample_rate: float = 1.0
    """Only for ranks to compare; `sample` draws."""
    sparse_grad: bool = False
    embedding_grad_scale: float | None = None
    """None: the number of ranks."""
    equal_rows: bool = False
    negatives: Callable[..., Negatives] = functional.negatives_of
    """What looks at this rank's classes; another with the same arguments may take its place."""
    also: Mapping[str, str] = field(default_factory=dict)
    """Name → text of what else ranks must agree on."""

    @property
    def grad_scale(self) -> float:
        if self.embedding_grad_scale is not None:
            return self.embedding_grad_scale
        return 1.0 if self.ranks is None else float(self.ranks.size)

    def told(self, **others: Any) -> dict[str, str]:
        """What ranks must agree on, as text."""
        return {
            "num_classes": str(self.num_classes),
            "margin": describe(self.margin),
            "per-row margin": str(is_per_row(self.margin)),
            "scale": str(float(self.scale)),
            "reduction": self.reduction,
            "target_gradient": self.target_gradient,
            "sample_rate": str(self.sample_rate if self.sample is not None else 1.0),
            "embedding_grad_scale": str(self.grad_scale),
            "backend": self.backend,
            **self.also,
            **{name: str(value) for name, value in others.items()},
        }


class Batch(NamedTuple):
    """The rows of all ranks."""

    x: Tensor  # (N, D)
    y: Tensor  # (N,) int64 global classes
    own: slice  # this rank's rows
    rows: list[int]  # of each rank


def partial_loss(
    embeddings: Tensor, local_weight: Tensor, labels: Tensor, setting: Setting, *, return_stats: bool = False
) -> Tensor | tuple[Tensor, BatchStats]:
    """Loss of the global batch from this rank's rows and centres: "mean" or "sum" over all ranks' counted
    rows, the same on every rank; "none" is this rank's (B,), and what is differentiated the sum over ranks.

    embeddings (B, D), labels (B,) or (B, 1): this rank's rows, maybe none; labels are global classes.
    local_weight (num_local, D): a plain tensor, rows setting.shard of the whole; may be empty.

    Every rank calls it, and backward on what it returns. The gradient of embeddings is multiplied by
    setting.grad_scale, so is that of a margin's per-row tensors; local_weight's is not. With statistics
    (loss, BatchStats of this rank's rows).

    Raises on every rank, with the rank that caused it, what margin_cross_entropy raises (with equal_rows,
    where ranks tell each other nothing, only there). Collectives: comm.py; bytes: docs/partial_fc.md.
    """
    batch = gather_batch(
        embeddings,
        local_weight,
        setting,
        lambda: _checked_labels(embeddings, labels, setting),
        call="loss",
        return_stats=return_stats,
    )
    n = _local_negatives(batch, local_weight, setting, find_hardest=return_stats)
    ranks, rows, own = setting.ranks, batch.rows, batch.own
    log_l, theta = n.log_l, n.theta
    if ranks is not None:
        log_l, theta = comm.combine(log_l, theta, setting.scale, ranks)
    psi = _similarity(theta, batch, setting)
    losses = functional.row_losses(log_l, psi, n.counted, setting.scale)
    loss = reduce_rows(losses, n.counted, setting.reduction)
    if setting.reduction == "none" and ranks is not None:
        loss = comm.own_losses(losses, rows, ranks)
    loss = loss.to(functional.loss_dtype(batch.x, local_weight))
    if not return_stats:
        return loss
    cos, classes = n.hardest_cos, n.hardest_class
    if ranks is not None:
        cos, classes = comm.hardest(cos, classes, ranks)
    return loss, batch_stats(
        log_l[own], theta[own], psi[own], n.counted[own], cos[own], classes[own], setting.scale
    )


def gather_batch(
    embeddings: Tensor,
    local_weight: Tensor,
    setting: Setting,
    own_labels: Callable[[], Tensor | None],
    **told: Any,
) -> Batch:
    """Check this rank's arguments, hear of the others' and bring all rows here.

    own_labels: checks what else there is and returns labels (B,) as `Batch` has them, None for none. told:
    more that ranks must agree on.
    """
    ranks = setting.ranks
    try:
        _check(embeddings, local_weight, setting)
        y = own_labels()
        options = {} if ranks is None else setting.told(grad_enabled=torch.is_grad_enabled(), **told)
    except Exception as error:
        # Whatever raises later is not heard of by the other ranks.
        if ranks is not None and not setting.equal_rows:
            comm.tell_of_failure(error, ranks)
        raise
    if ranks is None:
        assert y is not None
        return Batch(embeddings, y, slice(0, embeddings.shape[0]), [embeddings.shape[0]])

    rows = [embeddings.shape[0]] * ranks.size
    if not setting.equal_rows:
        embeddings, rows = _exchange(embeddings, options, ranks)
    x = comm.gather_embeddings(embeddings, rows, setting.grad_scale, ranks)
    y = x.new_empty(0, dtype=torch.int64) if y is None else comm.gather(y, rows, ranks)
    return Batch(x, y, comm.own_slice(rows, ranks), rows)


def _check(embeddings: Tensor, local_weight: Tensor, setting: Setting) -> None:
    held = setting.shard.size
    if local_weight.shape[0] != held:
        raise ValueError(f"local_weight: expected the {held} rows of its range, got {local_weight.shape[0]}")
    # An empty shard is right here, which for a whole weight it would not be.
    check_rows_and_centres(
        embeddings, local_weight if held else local_weight.new_empty(1, local_weight.shape[1])
    )
    if setting.ranks is not None:
        # A rank without rows takes on the dtype of the others', who check it.
        rows = embeddings if embeddings.shape[0] else local_weight
        backends.serving(backends.resolve(setting.backend, rows, local_weight), rows, local_weight)


def _checked_labels(embeddings: Tensor, labels: Tensor, setting: Setting) -> Tensor:
    """(B,) as `Batch` has them, where they and the margin fit this rank's rows."""
    check_labels(labels, embeddings)
    check_num_rows(setting.margin, embeddings.shape[0])
    if setting.ranks is not None and setting.ranks.size > 1:
        check_trained_alike(setting.margin)
    return ops.local_labels(labels.reshape(-1).long(), None, setting.num_classes, setting.ignore_index)


def _exchange(embeddings: Tensor, options: dict[str, str], ranks: Ranks) -> tuple[Tensor, list[int]]:
    """The rows of every rank; a rank without rows takes on what the others' are like."""
    needs_grad = torch.is_grad_enabled() and embeddings.requires_grad
    own = Header(embeddings.shape[0], embeddings.dtype, needs_grad, False, comm.checksum(options))
    headers = comm.exchange(own, options, None, ranks)
    agreed = headers[ranks.rank]
    embeddings = embeddings.to(agreed.dtype)  # still part of the backbone's graph, for which DDP waits
    if agreed.needs_grad != own.needs_grad:
        embeddings = embeddings.detach().requires_grad_(agreed.needs_grad)
    return embeddings, [header.rows for header in headers]


def _local_negatives(batch: Batch, local_weight: Tensor, setting: Setting, find_hardest: bool) -> Negatives:
    """log l and theta (N,) over this rank's classes, or its sample of them; classes in global numbers."""
    start, size = setting.shard
    counted = batch.y != NO_TARGET
    if size == 0:
        log_l, theta = _NoClasses.apply(batch.x, local_weight)
        return Negatives(log_l, theta, counted, log_l.detach(), torch.full_like(batch.y, -1))
    here = (batch.y >= start) & (batch.y < start + size)
    y = torch.where(here, batch.y - start, NO_TARGET)
    y = torch.where(batch.y == INVALID_TARGET, INVALID_TARGET, y)
    subset = None if setting.sample is None else setting.sample(y, size)
    if subset is None and setting.sparse_grad:
        subset = torch.arange(size, device=y.device)
    if subset is not None:
        y = torch.where(y >= 0, torch.searchsorted(subset, y.clamp_min(0)), y)
    n = setting.negatives(
        batch.x,
        local_weight,
        y,
        counted=counted,
        scale=setting.scale,
        class_subset=subset,
        workspace_bytes=setting.workspace_bytes,
        backend=setting.backend,
        find_hardest=find_hardest,
        sparse_grad=setting.sparse_grad,
    )
    classes = torch.where(n.hardest_class < 0, n.hardest_class, n.hardest_class + start)
    return n._replace(hardest_class=classes)


class _NoClasses(torch.autograd.Function):
    """What a shard without classes adds: nothing, but its gradients are there, 0, for the collectives and
    the optimizer to find."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w)
        rows = x.shape[0]
        return x.new_full((rows,), -torch.inf, dtype=torch.float64), x.new_zeros(rows, dtype=torch.float64)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_log_l: Tensor, g_theta: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return torch.zeros_like(x), torch.zeros_like(w)


def _similarity(theta: Tensor, batch: Batch, setting: Setting) -> Tensor:
    """psi (N,). A margin that knows more of a row than its angle runs on the row's own rank: one all_gather
    of psi, and of its slope where the gradient is exact."""
    margin, ranks = setting.margin, setting.ranks
    if ranks is None or not is_per_row(margin) or theta.shape[0] == 0:
        return target_similarity(margin, theta, setting.target_gradient)
    exact = setting.target_gradient == "exact" and torch.is_grad_enabled()
    try:
        own_psi, sent = _own_similarity(theta[batch.own].detach(), margin, exact)
    except Exception as error:
        if not setting.equal_rows:
            comm.refuse_to_gather(2 if exact else 1, error, batch.rows, ranks)
        raise
    gather = comm.gather if setting.equal_rows else comm.gather_unless_refused
    gathered = gather(sent, batch.rows, ranks)
    psi = gathered[:, 0]
    if exact:
        psi = psi + gathered[:, 1] * (theta - theta.detach())
    else:
        cos = torch.cos(theta)
        psi = psi + cos - cos.detach()
    # The value stands; this adds the gradient to what the margin holds of its own rows.
    own = setting.grad_scale * (own_psi - own_psi.detach())
    return psi + F.pad(own, (batch.own.start, theta.shape[0] - batch.own.stop))


def _own_similarity(angle: Tensor, margin: MarginFunction, exact: bool) -> tuple[Tensor, Tensor]:
    """psi (B,) of this rank's angles (B,), and (B, 1) float64 of its values, or (B, 2) with its slopes."""
    angle = angle.requires_grad_(exact)
    psi = target_similarity(margin, angle, "exact")
    sent = [psi.detach()]
    if exact:
        slope = torch.zeros_like(angle)
        if psi.requires_grad:
            found = torch.autograd.grad(psi.sum(), angle, retain_graph=True, allow_unused=True)[0]
            slope = slope if found is None else found
        sent.append(slope)
    return psi, torch.stack([values.to(angle.dtype) for values in sent], 1)


def partial_topk(embeddings: Tensor, local_weight: Tensor, k: int, setting: Setting) -> tuple[Tensor, Tensor]:
    """Cosines (B, k), falling, and global classes (B, k) of the centres nearest to this rank's rows.

    Every rank calls it, with the same k. Collectives: the row counts, the rows, then k cosines and classes
    of every row. No gradient.
    """
    ranks, (start, size) = setting.ranks, setting.shard
    assert ranks is not None
    with torch.no_grad():
        batch = gather_batch(
            embeddings, local_weight, setting, lambda: check_k(k, setting.num_classes), call="topk", k=k
        )
        rows = batch.x.shape[0]
        dtype = functional.loss_dtype(batch.x, local_weight)
        cos = batch.x.new_full((rows, k), -torch.inf, dtype=dtype)
        classes = torch.full((rows, k), -1, device=cos.device)
        if size:
            found, numbers = functional.topk_cosine(
                batch.x, local_weight, min(k, size), backend=setting.backend
            )
            cos[:, : found.shape[1]], classes[:, : found.shape[1]] = found, numbers + start
        cos, classes = comm.nearest(cos, classes, batch.own, ranks)
        return cos.to(dtype), classes
