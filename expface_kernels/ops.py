"""The custom ops: opaque to torch.compile, differentiable, one for every backend.

    log_l, theta, … = cosine_lse(x, w, y, …)    what a backend implements
    y = local_labels(labels, …)                 looks at label values, which code outside an op must not

B rows · C classes that take part · D features · x (B, D) · w (C_all, D) · y (B,) int64
scale () float64 on the CPU: torch.compile would make a graph for each value of a float
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from expface_kernels import backends
from expface_kernels.backends.base import INVALID_TARGET, NO_TARGET, OpConfig, compute_dtype


@torch.library.custom_op("expface_kernels::local_labels", mutates_args=())
def local_labels(labels: Tensor, class_subset: Tensor | None, num_classes: int, ignore_index: int) -> Tensor:
    """Return labels (B,) int64 as the op wants them: positions in the subset (or classes), −1 where ignored.

    ValueError for a label or a subset class out of range, and for a label that the subset lacks. On a GPU,
    unless EXPFACE_CHECK_LABELS=1, such a label becomes −2 instead, and its row's loss NaN; where the subset
    itself is wrong (out of range, not sorted, repeated), every label that is not ignored does.
    """
    came, labels = labels, labels.long()
    ignored = labels == ignore_index
    if came.dtype == torch.uint64:
        ignored &= ignore_index >= 0  # past 2^63 they are negative by now, and not what ignore_index means
    wrong = ~ignored & ((labels < 0) | (labels >= num_classes))
    raises = on_cpu(labels) or os.environ.get("EXPFACE_CHECK_LABELS") == "1"
    if raises and bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels: expected 0 <= label < {num_classes} or ignore_index={ignore_index}, "
            f"got {came[row].item()} in row {row}"
        )
    positions = labels
    if class_subset is not None:
        bad_subset = _wrong_subset(class_subset, num_classes)
        if raises and bool(bad_subset):
            raise ValueError(_about_subset(class_subset, num_classes))
        positions = torch.searchsorted(class_subset.contiguous(), labels.clamp(0, num_classes - 1))
        positions = positions.clamp_max(class_subset.shape[0] - 1)
        missing = ~ignored & ~wrong & (class_subset[positions] != labels)
        if raises and bool(missing.any()):
            row = int(missing.nonzero()[0])
            raise ValueError(
                f"labels: every counted label must be in class_subset, got {int(labels[row])} in row {row}, "
                "which is not"
            )
        wrong = wrong | missing | bad_subset
    positions = torch.where(wrong, INVALID_TARGET, positions)
    return torch.where(ignored, NO_TARGET, positions)


def on_cpu(values: Tensor) -> bool:
    """Tell whether bad values are refused at once, which on a GPU would mean waiting for it."""
    return values.device.type == "cpu"


def _wrong_subset(class_subset: Tensor, num_classes: int) -> Tensor:
    """Tell, as a () bool, whether a class is out of [0, num_classes), out of order, or there twice."""
    outside = (class_subset[0] < 0) | (class_subset[-1] >= num_classes)
    return outside | _out_of_order(class_subset)


def _out_of_order(class_subset: Tensor) -> Tensor:
    """Tell, as a () bool, whether they don't rise; by comparing, since a difference of int64 may wrap."""
    return (class_subset[1:] <= class_subset[:-1]).any()


def _about_subset(class_subset: Tensor, num_classes: int) -> str:
    return (
        f"class_subset: expected sorted classes without repeats in [0, {num_classes}), "
        f"got {class_subset.shape[0]} classes from {int(class_subset.min())} to {int(class_subset.max())}"
        + (", some of them repeated or not in order" if bool(_out_of_order(class_subset)) else "")
    )


@local_labels.register_fake
def _(labels: Tensor, class_subset: Tensor | None, num_classes: int, ignore_index: int) -> Tensor:
    return torch.empty_like(labels, dtype=torch.int64, memory_format=torch.contiguous_format)


@torch.library.custom_op("expface_kernels::cosine_lse", mutates_args=())
def cosine_lse(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    class_subset: Tensor | None,
    scale: Tensor,
    backend: str,
    keep: bool,
    workspace_bytes: int,
    find_hardest: bool,
    product_dtype: torch.dtype | None,
    sparse_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (log_l (B,) float64, theta (B,) float64, workspace, tile_sums, hardest_cos, hardest_class).

    log_l = log Σ_{j≠y} exp(scale·cos_bj) and the target angle in radians (docs/math.md eqs. 2 to 4). Only
    these two are differentiable; what was not asked for has size 0. sparse_grad: the gradient of w is a
    sparse COO tensor with the subset's rows (no torch.compile).
    """
    config = OpConfig(scale.item(), keep, workspace_bytes, find_hardest, product_dtype)
    with torch.autocast(x.device.type, enabled=False):
        # A plain tuple: the schema of a custom op knows no named one.
        out = backends.require_op_backend(backend, x, w).forward(x, w, y, class_subset, config)
        return out[0], out[1], out[2], out[3], out[4], out[5]


@cosine_lse.register_fake
def _(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    class_subset: Tensor | None,
    scale: Tensor,
    backend: str,
    keep: bool,
    workspace_bytes: int,
    find_hardest: bool,
    product_dtype: torch.dtype | None,
    sparse_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, classes = x.shape[0], (w if class_subset is None else class_subset).shape[0]
    dtype = compute_dtype(x, w)
    config = OpConfig(1.0, keep, workspace_bytes, find_hardest, product_dtype)  # no size depends on s
    numel = backends.op_backend(backend).workspace_numel(x, w, classes, config) if keep else 0
    found = rows if find_hardest else 0
    return (
        x.new_empty(rows, dtype=torch.float64),
        x.new_empty(rows, dtype=torch.float64),
        x.new_empty(numel, dtype=dtype),
        x.new_empty(0, dtype=torch.float64),
        x.new_empty(found, dtype=torch.float64),
        y.new_empty(found),
    )


@torch.library.custom_op("expface_kernels::cosine_lse_backward", mutates_args=())
def cosine_lse_backward(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    class_subset: Tensor | None,
    scale: Tensor,
    log_l: Tensor,
    workspace: Tensor,
    g_log_l: Tensor,
    g_theta: Tensor,
    backend: str,
    workspace_bytes: int,
    product_dtype: torch.dtype | None,
    need_dx: bool,
    need_dw: bool,
    sparse_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return dx (B, D) and dw (C_all, D), or (S, D) if sparse, in inputs' dtypes; of size 0 if not needed."""
    config = OpConfig(scale.item(), True, workspace_bytes, False, product_dtype, sparse_grad)
    with torch.autocast(x.device.type, enabled=False):
        dx, dw = backends.require_op_backend(backend, x, w).backward(
            x, w, y, class_subset, log_l, workspace, g_log_l, g_theta, config, need_dx, need_dw
        )
    return x.new_empty(0) if dx is None else dx, w.new_empty(0) if dw is None else dw


@cosine_lse_backward.register_fake
def _(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    class_subset: Tensor | None,
    scale: Tensor,
    log_l: Tensor,
    workspace: Tensor,
    g_log_l: Tensor,
    g_theta: Tensor,
    backend: str,
    workspace_bytes: int,
    product_dtype: torch.dtype | None,
    need_dx: bool,
    need_dw: bool,
    sparse_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    rows = class_subset.shape[0] if sparse_grad and class_subset is not None else w.shape[0]
    return (
        x.new_empty(x.shape if need_dx else 0),
        w.new_empty((rows, w.shape[1]) if need_dw else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w, y, class_subset, scale, backend, keep, workspace_bytes, _, product_dtype, sparse_grad = inputs
    log_l, _, workspace, *others = output
    # Otherwise a zero gradient as large as the workspace would be made for it.
    ctx.mark_non_differentiable(workspace, *others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w, y, class_subset, scale, log_l, workspace)
    ctx.options = (backend, workspace_bytes, product_dtype)
    ctx.keep, ctx.sparse_grad = keep, sparse_grad


def _backward(
    ctx: Any, g_log_l: Tensor | None, g_theta: Tensor | None, *unused: Tensor | None
) -> tuple[Any, ...]:
    x, w, y, class_subset, scale, log_l, workspace = ctx.saved_tensors
    if not ctx.keep:
        raise RuntimeError("cosine_lse: backward needs keep=True in the forward")
    need_dx, need_dw = ctx.needs_input_grad[:2]
    g_log_l = torch.zeros_like(log_l) if g_log_l is None else g_log_l
    g_theta = torch.zeros_like(log_l) if g_theta is None else g_theta
    dx, dw = cosine_lse_backward(
        x, w, y, class_subset, scale, log_l, workspace, g_log_l, g_theta, *ctx.options,
        need_dx, need_dw, ctx.sparse_grad,
    )  # fmt: skip
    if need_dw and ctx.sparse_grad:
        # Sorted and without repeats, as a subset is: coalesced.
        dw = torch.sparse_coo_tensor(
            class_subset[None], dw, w.shape, is_coalesced=True, check_invariants=False
        )
    return (dx if need_dx else None, dw if need_dw else None, *[None] * 9)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "expface_kernels computes first derivatives only: its gradient cannot be differentiated again. "
        "expface_kernels.reference.margin_cross_entropy can"
    )


cosine_lse.register_autograd(_backward, setup_context=_setup_context)
cosine_lse_backward.register_autograd(_no_second_derivative)
