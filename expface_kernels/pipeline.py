"""One pipeline for the loss of the function, the plain, the sampled and the sharded heads.

    loss_step     rows of all ranks → negatives → combined over ranks → margin → loss → reduction
    negatives     the op: log l, theta of every row, over the classes that this process holds

Everything after the op is plain torch on (B,) vectors, with room for collectives between.

B rows of this rank · N rows of all ranks, by rank (B where there is no group) · D features
C classes that this process holds · S classes of a subset · psi: the margin's cos θ · eqs.: docs/math.md
y: labels as the op takes them, a position, NO_TARGET or INVALID_TARGET
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from expface_kernels import backends, ops
from expface_kernels.backends.base import INVALID_TARGET, NO_TARGET, Forward, OpConfig
from expface_kernels.checks import (
    check_class_subset,
    check_k,
    check_labels,
    check_num_rows,
    check_rows_and_centres,
    check_trained_alike,
)
from expface_kernels.distributed.group import Group, telling
from expface_kernels.distributed.module import NoClasses, SameWeight
from expface_kernels.distributed.ranges import ClassRange
from expface_kernels.distributed.row_margins import row_similarity
from expface_kernels.margins import (
    MarginFunction,
    as_tensor,
    describe,
    is_per_row,
    target_similarity,
)
from expface_kernels.options import LossOptions
from expface_kernels.stats import BatchStats, batch_stats, reduce_rows

Sample = Callable[[Tensor, int], Tensor | None]
"""(targets (N,) int64 local or < 0, num_local) → sorted local classes (S,) int64 that hold all targets, or
None for all: `distributed.sampling.Sampler`, or a rule of another's."""


class Negatives(NamedTuple):
    """Everything about a batch that has to do with the classes; what follows is O(B)."""

    log_l: Tensor  # (B,) float64, log Σ_{j≠y} exp(s·cos_bj)
    theta: Tensor  # (B,) float64, target angle, radians; 0 where ignored
    hardest_cos: Tensor  # (B,) float64, or size 0
    hardest_class: Tensor  # (B,) int64, or size 0


class Shard(NamedTuple):
    """The classes of this rank among all that a group shares."""

    group: Group
    num_classes: int
    held: ClassRange


def loss_step(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: MarginFunction,
    options: LossOptions,
    *,
    shard: Shard | None = None,
    class_subset: Tensor | None = None,
    sample: Sample | None = None,
    return_stats: bool = False,
    agreed: Mapping[str, str] | None = None,
) -> Tensor | tuple[Tensor, BatchStats]:
    """Compute the loss of the batch of all ranks from this rank's rows and centers, for function and heads.

    "mean" and "sum" are over all ranks' counted rows, the same on every rank; "none" is this rank's (B,), and
    what is differentiated the sum over ranks. With statistics (loss, BatchStats of this rank's rows).

    Args:
        embeddings, labels: (B, D) and (B,) or (B, 1), this rank's rows, maybe none.
        weight: (C, D) of this process; with a shard a plain tensor or a DTensor, whose rows here may be none.
        shard: which classes these are, and the ranks that have the others: every rank calls this, and
            backward on what it returns; labels are among all classes. The gradient of embeddings is
            multiplied by `embedding_grad_scale`, so is that of a margin's per-row tensors; weight's is not.
        class_subset: (S,) sorted int64, the classes that take part; without shard and sample.
        sample: draws the classes that take part.
        agreed: name to text of what else ranks must agree on.

    Raises, on every rank and with the rank that caused it, what margin_cross_entropy raises (with equal_rows,
    where ranks tell each other nothing, only there). Collectives: group.py; bytes: docs/partial_fc.md.
    """
    group = None if shard is None else shard.group
    local: Any = weight.to_local() if shard is not None and hasattr(weight, "to_local") else weight
    with _refusing(shard, options):
        _check_rows(embeddings, local, options, shard)
        y = _checked_labels(labels, embeddings, local, margin, options, shard, class_subset)
        told = {} if shard is None else _told(margin, options, shard, sample, return_stats, agreed)
    batch = _all_rows(embeddings, y, told, options, shard)
    counted = batch.y != NO_TARGET
    y, subset = _targets(batch.y, local.shape[0], options, shard, class_subset, sample)
    look = negatives if local.shape[0] else no_negatives
    n = look(batch.x, local, y, counted, subset, options, find_hardest=return_stats)
    log_l, theta = n.log_l, n.theta
    if local is not weight and log_l.requires_grad:
        log_l = SameWeight.apply(log_l, [weight])
    if group is not None:
        log_l, theta = group.combine(log_l, theta, options.scale)
    if group is None or not is_per_row(margin) or theta.shape[0] == 0:
        psi = target_similarity(margin, theta, options.target_gradient)
    else:
        psi = row_similarity(margin, theta, batch.rows, options, group)
    losses = row_losses(log_l, psi, counted, options.scale)
    loss = reduce_rows(losses, counted, options.reduction)
    if options.reduction == "none" and group is not None:
        loss = group.own_losses(loss, batch.rows)
    loss = loss.to(loss_dtype(batch.x, local))
    if not return_stats:
        return loss
    cos, classes = n.hardest_cos, n.hardest_class
    if shard is not None:
        classes = torch.where(classes < 0, classes, classes + shard.held.start)
        cos, classes = shard.group.hardest(cos, classes)
    own = batch.own
    return loss, batch_stats(
        log_l[own], theta[own], psi[own], counted[own], cos[own], classes[own], options.scale
    )


class Batch(NamedTuple):
    """The rows of all ranks."""

    x: Tensor  # (N, D)
    y: Tensor  # (N,) int64 classes of all, or positions in the function's class_subset
    own: slice  # this rank's rows
    rows: list[int]  # of each rank


def _refusing(shard: Shard | None, options: LossOptions) -> contextlib.AbstractContextManager[None]:
    """Tell the other ranks, who wait in `exchange`, what raises inside; later nobody would listen."""
    if shard is None or options.equal_rows:
        return contextlib.nullcontext()
    return telling(shard.group.refuse_exchange)


def _check_rows(x: Tensor, local: Tensor, options: LossOptions, shard: Shard | None) -> None:
    """Check this rank's rows and centers; an empty shard is right, a whole weight without classes is not."""
    if shard is None:
        check_rows_and_centres(x, local)
        return
    held = shard.held.size
    if local.shape[0] != held:
        raise ValueError(f"weight: expected the {held} rows of this rank, got {local.shape[0]}")
    check_rows_and_centres(x, local if held else local.new_empty(1, local.shape[1]))
    # A rank without rows takes on the dtype of the others', who check it.
    rows = x if x.shape[0] else local
    backends.require_backend(backends.resolve(options.backend, rows, local), rows, local)


def _checked_labels(
    labels: Tensor,
    x: Tensor,
    local: Tensor,
    margin: MarginFunction,
    options: LossOptions,
    shard: Shard | None,
    class_subset: Tensor | None,
) -> Tensor:
    """Return labels (B,) int64 as `Batch` has them, where they and the margin fit this rank's rows."""
    check_labels(labels, x)
    check_class_subset(class_subset, local)
    if shard is not None:  # elsewhere a margin of one's own may hold a table, which is no value per row
        check_num_rows(margin, x.shape[0])
        if shard.group.size > 1:
            check_trained_alike(margin)
    num_classes = local.shape[0] if shard is None else shard.num_classes
    return ops.local_labels(labels.reshape(-1), class_subset, num_classes, options.ignore_index)


def _told(
    margin: MarginFunction,
    options: LossOptions,
    shard: Shard,
    sample: Sample | None,
    return_stats: bool,
    agreed: Mapping[str, str] | None,
) -> dict[str, str]:
    """Return what the ranks of a loss must agree on, as text."""
    return {
        "num_classes": str(shard.num_classes),
        "margin": describe(margin),
        "per-row margin": str(is_per_row(margin)),
        "scale": str(float(options.scale)),
        "reduction": options.reduction,
        "target_gradient": options.target_gradient,
        "sample_rate": str(options.sample_rate if sample is not None else 1.0),
        "embedding_grad_scale": str(options.grad_scale(shard.group.size)),
        "backend": options.backend,
        **(agreed or {}),
        "grad_enabled": str(torch.is_grad_enabled()),
        "call": "loss",
        "return_stats": str(return_stats),
    }


def _all_rows(
    x: Tensor, y: Tensor | None, told: dict[str, str], options: LossOptions, shard: Shard | None
) -> Batch:
    """Bring the rows of all ranks here; y (B,) is None where there are no labels."""
    if shard is None:
        assert y is not None
        return Batch(x, y, slice(None), [x.shape[0]])
    group = shard.group
    rows = [x.shape[0]] * group.size
    if not options.equal_rows:
        x, rows = group.exchange(x, told)
    x = group.gather_embeddings(x, rows, options.grad_scale(group.size))
    y = x.new_empty(0, dtype=torch.int64) if y is None else group.gather(y, rows)
    return Batch(x, y, group.own_slice(rows), rows)


def _targets(
    y: Tensor,
    num_local: int,
    options: LossOptions,
    shard: Shard | None,
    class_subset: Tensor | None,
    sample: Sample | None,
) -> tuple[Tensor, Tensor | None]:
    """Return labels (N,) as the op takes them, and the classes here that take part; None is all."""
    if class_subset is not None:
        # A bad one that was not refused has made the loss NaN: it need only stay within memory.
        return y, class_subset if ops.on_cpu(class_subset) else class_subset.clamp(0, num_local - 1)
    if num_local == 0:
        return y, None
    if shard is not None:
        start, stop = shard.held.start, shard.held.stop
        here = torch.where((y >= start) & (y < stop), y - start, NO_TARGET)
        y = torch.where(y == INVALID_TARGET, INVALID_TARGET, here)
    subset = None if sample is None else sample(y, num_local)
    if subset is None and options.sparse_grad:
        subset = torch.arange(num_local, device=y.device)
    if subset is not None:
        y = torch.where(y >= 0, torch.searchsorted(subset, y.clamp_min(0)), y)
    return y, subset


def negatives(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    counted: Tensor,
    class_subset: Tensor | None,
    options: LossOptions,
    *,
    find_hardest: bool = False,
) -> Negatives:
    """Call the op on inputs that are checked: x (B, D), w (C, D), counted (B,) bool where not ignored.

    y (B,) int64: positions in class_subset (or classes), NO_TARGET where the row has none here, be it
    ignored or another shard's, or INVALID_TARGET. options.sparse_grad: w's gradient is sparse COO, the
    subset's rows; it needs a class_subset.
    """
    name = backends.resolve(options.backend, x, w)
    keep = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    memory, product_dtype = options.workspace_bytes, autocast_dtype(x)
    threshold = options.negative_threshold
    if name == "reference" or threshold is not None:
        # Padding may hold NaN, which autograd would spread; an op's own backward leaves it alone.
        rows = torch.where(counted[:, None], x, 0.0)
        if threshold is not None:
            out = backends.REFERENCE.forward_filtered(rows, w, y, class_subset, options.scale, threshold)
        else:
            config = OpConfig(options.scale, keep, memory, find_hardest, product_dtype, options.sparse_grad)
            out = backends.REFERENCE.forward(rows, w, y, class_subset, config)
    else:
        _refuse_functorch(x, w)
        # Here, where the scale is a number: inside the op no size may depend on it.
        memory = backends.op_backend(name).effective_workspace_bytes(memory, options.scale)
        scale = as_tensor(options.scale, torch.ones((), dtype=torch.float64, device="cpu"))
        out = Forward(
            *ops.cosine_lse(
                x,
                w,
                y,
                class_subset,
                scale,
                backend=name,
                keep=keep,
                workspace_bytes=memory,
                find_hardest=find_hardest,
                product_dtype=product_dtype,
                sparse_grad=options.sparse_grad,
            )
        )
    return Negatives(out.log_l, out.theta, out.hardest_cos, out.hardest_class)


def no_negatives(
    x: Tensor, w: Tensor, y: Tensor, counted: Tensor, *unused: Any, find_hardest: bool = False
) -> Negatives:
    """Return the `negatives` of a shard without classes, which skips the op."""
    log_l, theta = NoClasses.apply(x, w)
    return Negatives(log_l, theta, log_l.detach(), torch.full_like(y, -1))


def row_losses(log_l: Tensor, psi: Tensor, counted: Tensor, scale: float) -> Tensor:
    """Return losses (B,) float64, 0 where a row does not count (eq. 6)."""
    # Before logaddexp: a where() after it would still send NaN back into ignored rows.
    delta = torch.where(counted, log_l - scale * psi, -torch.inf)
    return torch.logaddexp(delta, torch.zeros_like(delta))


def loss_dtype(embeddings: Tensor, weight: Tensor) -> torch.dtype:
    """Return float32, or float64 where an input is."""
    return torch.promote_types(torch.promote_types(embeddings.dtype, weight.dtype), torch.float32)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return what autocast wants products of x's device in, or None; inside the op it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@torch.no_grad()
def topk_cosine(
    embeddings: Tensor, weight: Tensor, k: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the k classes nearest to each row, without a margin and without (B, C) cosines.

    embeddings (B, D), weight (C, D), 1 ≤ k ≤ C → cosines (B, k), falling, float32 (float64 if an input is),
    and classes (B, k) int64. No gradient. Peak extra memory: two tiles of cosines (64 MB, on a GPU 128 MB) +
    O(B·(k + D)).
    """
    check_rows_and_centres(embeddings, weight)
    k = check_k(k, weight.shape[0])
    name = backends.resolve(backend, embeddings, weight)
    with torch.autocast(embeddings.device.type, enabled=False):
        return backends.require_backend(name, embeddings, weight).topk(embeddings, weight, k)


@torch.no_grad()
def sharded_topk_cosine(
    embeddings: Tensor, weight: Tensor, k: int, options: LossOptions, shard: Shard
) -> tuple[Tensor, Tensor]:
    """Do `topk_cosine` over the classes of all ranks, for this rank's rows; every rank calls it.

    Collectives: the row counts, the rows, then k cosines and classes of every row.
    """
    local: Any = weight.to_local() if hasattr(weight, "to_local") else weight
    with _refusing(shard, options):
        _check_rows(embeddings, local, options, shard)
        k = check_k(k, shard.num_classes)
        told = {
            "num_classes": str(shard.num_classes),
            "backend": options.backend,
            "grad_enabled": "False",
            "call": "topk",
            "k": str(k),
        }
    batch = _all_rows(embeddings, None, told, options, shard)
    rows, held = batch.x.shape[0], shard.held
    dtype = loss_dtype(batch.x, local)
    cos = batch.x.new_full((rows, k), -torch.inf, dtype=dtype)
    classes = torch.full((rows, k), -1, device=cos.device)
    if held.size:
        found, numbers = topk_cosine(batch.x, local, min(k, held.size), backend=options.backend)
        cos[:, : found.shape[1]], classes[:, : found.shape[1]] = found, numbers + held.start
    cos, classes = shard.group.nearest(cos, classes, batch.own)
    return cos.to(dtype), classes


def in_backward() -> bool:
    """Tell whether this runs inside a backward, as the second forward of activation checkpointing does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _refuse_functorch(*inputs: Tensor) -> None:
    """Refuse forward mode, whose missing derivative torch would take for zero, and torch.func."""
    if torch.compiler.is_compiling():
        return
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if any(wrapped(t) or forward_ad.unpack_dual(t).tangent is not None for t in inputs):
        raise RuntimeError(
            "expface_kernels computes reverse-mode derivatives only, by .backward() or torch.autograd.grad, "
            "not torch.func.jvp, grad, vjp, jacrev or vmap: backend='reference' has them all"
        )
