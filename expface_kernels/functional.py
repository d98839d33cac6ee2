"""The loss as a function, in two halves with room for a collective between them.

    n = negatives(embeddings, weight, labels, …)     check → op: log l, theta of every row
    loss = finish(n.log_l, n.theta, n.counted, …)    margin → loss → reduction, plain torch on (B,) vectors

`negatives_of` and `row_losses` are what a sharded head calls instead, with labels that are checked and
numbered by its shard.

B rows · C classes · D features · S classes of a subset · psi: the margin's cos θ · eqs.: docs/math.md
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from expface_kernels import backends, ops
from expface_kernels.backends.base import Forward, Request
from expface_kernels.checks import (
    check_class_subset,
    check_flag,
    check_k,
    check_labels,
    check_options,
    check_rows_and_centres,
    check_scale,
)
from expface_kernels.margins import ExpFace, MarginFunction, as_tensor, target_similarity
from expface_kernels.stats import BatchStats, batch_stats, reduce_rows

DEFAULT_WORKSPACE_BYTES = 256 * 2**20


class Negatives(NamedTuple):
    """Everything about a batch that has to do with the classes; what follows is O(B)."""

    log_l: Tensor  # (B,) float64, log Σ_{j≠y} exp(s·cos_bj)
    theta: Tensor  # (B,) float64, target angle, radians; 0 where ignored
    counted: Tensor  # (B,) bool, not ignored
    hardest_cos: Tensor  # (B,) float64, or size 0
    hardest_class: Tensor  # (B,) int64, or size 0


def margin_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: MarginFunction | None = None,
    *,
    scale: float = 64.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    target_gradient: str = "exact",
    gradient_tolerance: float = 0.0,
    class_subset: Tensor | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, BatchStats]:
    """Margin-softmax cross-entropy without (B, C) logits; its gradient is that of what it computes ("exact").

    loss_b = log(1 + exp(log l_b − s·psi(θ_b))), which is softmax cross-entropy over s·cos with the target's
    cos θ replaced by psi(θ) (docs/math.md eq. 6). Rows and centres are L2-normalised here.

    Args:
        embeddings: (B, D) float32, float64, bfloat16 or float16, any strides.
        weight: (C, D) class centres, the same choice of dtypes, which may differ from the embeddings'.
        labels: (B,) or (B, 1), any integer dtype, in [0, C) or `ignore_index`.
        margin: `theta (B,) float64 radians -> psi (B,)`; None is ExpFace(0.7).
        scale: s > 0, finite.
        reduction: "mean" over the rows that are not ignored (0 where all are), "sum", or "none" for (B,).
        ignore_index: rows with this label have loss 0 and no gradient, whatever they hold.
        target_gradient: "exact" differentiates psi; "detached" takes the slope of cos θ, as published
            code does.
        gradient_tolerance: 0, exact; other values are not offered yet.
        class_subset: (S,) int64, sorted, none twice: the classes that take part, all counted labels in it.
            On a GPU, unless EXPFACE_CHECK_LABELS=1, one that is not so makes every counted loss NaN.
        workspace_bytes: how much of the exponentials the forward may keep for the backward, bytes. The triton
            backend keeps none for s > 70 or s < 1.
        backend: "auto", or a name of `expface_kernels.backends.available()`.
        return_stats: also return BatchStats; a little extra work in the forward.

    Returns:
        The loss, float32 (float64 if an input is): () or, for "none", (B,); with `return_stats` (loss,
        BatchStats). A row with NaN or Inf has loss NaN. Gradients have each input's own dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: the backend cannot serve; or a second derivative is asked for.

    Peak extra memory beside the two gradients, on the cpu backend: workspace_bytes + one tile (at most
    32 MB up to B = 8192) + O(B·D).
    """
    margin = ExpFace() if margin is None else margin
    check_scale(scale)
    check_options(margin, reduction, ignore_index, target_gradient, gradient_tolerance, workspace_bytes)
    check_flag("return_stats", return_stats)
    n = negatives(
        embeddings,
        weight,
        labels,
        scale=scale,
        ignore_index=ignore_index,
        class_subset=class_subset,
        workspace_bytes=workspace_bytes,
        backend=backend,
        find_hardest=return_stats,
    )
    loss, psi = finish(
        n.log_l, n.theta, n.counted, margin, scale=scale, reduction=reduction, target_gradient=target_gradient
    )
    loss = loss.to(loss_dtype(embeddings, weight))
    if not return_stats:
        return loss
    return loss, batch_stats(n.log_l, n.theta, psi, n.counted, n.hardest_cos, n.hardest_class, scale)


def negatives(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float,
    ignore_index: int,
    class_subset: Tensor | None,
    workspace_bytes: int,
    backend: str,
    find_hardest: bool,
) -> Negatives:
    """First half: check what the classes are involved in, then the op."""
    check_rows_and_centres(embeddings, weight)
    check_labels(labels, embeddings)
    check_class_subset(class_subset, weight)
    labels = labels.reshape(-1).long()  # wide before it meets ignore_index: 156 as uint8 is not −100
    y = ops.local_labels(labels, class_subset, weight.shape[0], ignore_index)
    if class_subset is not None and not ops.on_cpu(class_subset):
        # A bad one that was not refused has made the loss NaN: it need only stay within memory.
        class_subset = class_subset.clamp(0, weight.shape[0] - 1)
    return negatives_of(
        embeddings,
        weight,
        y,
        counted=labels != ignore_index,
        scale=scale,
        class_subset=class_subset,
        workspace_bytes=workspace_bytes,
        backend=backend,
        find_hardest=find_hardest,
    )


def negatives_of(
    embeddings: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    counted: Tensor,
    scale: float,
    class_subset: Tensor | None,
    workspace_bytes: int,
    backend: str,
    find_hardest: bool,
    sparse_grad: bool = False,
) -> Negatives:
    """The op, on inputs that are checked.

    y (B,) int64: positions in class_subset (or classes), NO_TARGET where the row has none here, be it
    ignored or another shard's, or INVALID_TARGET. sparse_grad: weight's gradient is sparse COO, the
    subset's rows; it needs a class_subset.
    """
    name = backends.resolve(backend, embeddings, weight)
    keep = torch.is_grad_enabled() and (embeddings.requires_grad or weight.requires_grad)
    product_dtype = autocast_dtype(embeddings)
    if name == "reference":
        # Padding may hold NaN, which autograd would spread; an op's own backward leaves it alone.
        rows = torch.where(counted[:, None], embeddings, 0.0)
        request = Request(scale, keep, workspace_bytes, find_hardest, product_dtype, sparse_grad)
        out = backends.REFERENCE.forward(rows, weight, y, class_subset, request)
    else:
        _refuse_forward_mode(embeddings, weight)
        # Here, where the scale is a number: inside the op no size may depend on it.
        workspace_bytes = backends.op_backend(name).usable_workspace(workspace_bytes, scale)
        scale_tensor = as_tensor(scale, torch.ones((), dtype=torch.float64, device="cpu"))
        out = Forward(
            *ops.cosine_lse(
                embeddings,
                weight,
                y,
                class_subset,
                scale_tensor,
                backend=name,
                keep=keep,
                workspace_bytes=workspace_bytes,
                find_hardest=find_hardest,
                product_dtype=product_dtype,
                sparse_grad=sparse_grad,
            )
        )
    return Negatives(out.log_l, out.theta, counted, out.hardest_cos, out.hardest_class)


def finish(
    log_l: Tensor,
    theta: Tensor,
    counted: Tensor,
    margin: MarginFunction,
    *,
    scale: float,
    reduction: str,
    target_gradient: str,
) -> tuple[Tensor, Tensor]:
    """Second half: (loss, psi (B,)), float64, from log l, theta and which rows count, each (B,) (eq. 6)."""
    psi = target_similarity(margin, theta, target_gradient)
    return reduce_rows(row_losses(log_l, psi, counted, scale), counted, reduction), psi


def row_losses(log_l: Tensor, psi: Tensor, counted: Tensor, scale: float) -> Tensor:
    """(B,) float64, 0 where a row does not count (eq. 6)."""
    # Before logaddexp: a where() after it would still send NaN back into ignored rows.
    delta = torch.where(counted, log_l - scale * psi, -torch.inf)
    return torch.logaddexp(delta, torch.zeros_like(delta))


def loss_dtype(embeddings: Tensor, weight: Tensor) -> torch.dtype:
    """float32, or float64 where an input is."""
    return torch.promote_types(torch.promote_types(embeddings.dtype, weight.dtype), torch.float32)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast wants products of x's device in; None outside it. Read here: inside the op it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@torch.no_grad()
def topk_cosine(
    embeddings: Tensor, weight: Tensor, k: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The k classes nearest to each row, without a margin and without (B, C) cosines.

    embeddings (B, D), weight (C, D), 1 ≤ k ≤ C → cosines (B, k), falling, float32 (float64 if an input is),
    and classes (B, k) int64. No gradient. Peak extra memory: two tiles of cosines (64 MB, on a GPU 128 MB) +
    O(B·(k + D)).
    """
    check_rows_and_centres(embeddings, weight)
    check_k(k, weight.shape[0])
    name = backends.resolve(backend, embeddings, weight)
    with torch.autocast(embeddings.device.type, enabled=False):
        return backends.serving(name, embeddings, weight).topk(embeddings, weight, k)


def _refuse_forward_mode(*inputs: Tensor) -> None:
    """The op has no forward-mode derivative; torch would take it for zero and say nothing."""
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs):
        raise RuntimeError(
            "expface_kernels computes reverse-mode derivatives only, not torch.func.jvp: backend='reference' "
            "has both"
        )
