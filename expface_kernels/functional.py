"""The loss as a function, and the nearest classes; what they compute with is in pipeline.py.

B rows · C classes · D features · S classes of a subset · psi: the margin's cos θ · eqs.: docs/math.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, overload

from torch import Tensor

from expface_kernels.checks import check_flag, check_gradient_tolerance, check_margin
from expface_kernels.margins import ExpFace, MarginFunction
from expface_kernels.options import DEFAULT_WORKSPACE_BYTES as DEFAULT_WORKSPACE_BYTES
from expface_kernels.options import LossOptions
from expface_kernels.pipeline import loss_step
from expface_kernels.pipeline import topk_cosine as topk_cosine
from expface_kernels.stats import BatchStats

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Keywords(TypedDict, total=False):
    """Keyword arguments of margin_cross_entropy, less `return_stats`."""

    scale: float
    reduction: str
    ignore_index: int
    target_gradient: str
    gradient_tolerance: float | None
    class_subset: Tensor | None
    workspace_bytes: int
    backend: str


@overload
def margin_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: MarginFunction | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[_Keywords],
) -> Tensor: ...
@overload
def margin_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: MarginFunction | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[_Keywords],
) -> tuple[Tensor, BatchStats]: ...
@overload
def margin_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: MarginFunction | None = None,
    *,
    return_stats: bool,
    **options: Unpack[_Keywords],
) -> Tensor | tuple[Tensor, BatchStats]: ...
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
    gradient_tolerance: float | None = None,
    class_subset: Tensor | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, BatchStats]:
    """Margin-softmax cross-entropy without (B, C) logits; its gradient is that of what it computes ("exact").

    loss_b = log(1 + exp(log l_b − s·psi(θ_b))), which is softmax cross-entropy over s·cos with the target's
    cos θ replaced by psi(θ) (docs/math.md eq. 6). Rows and centres are L2-normalized here.

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
        gradient_tolerance: deprecated, without effect: 0 is accepted with a DeprecationWarning.
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
    if gradient_tolerance is not None:
        check_gradient_tolerance(gradient_tolerance)
    options = LossOptions(
        scale=scale,
        reduction=reduction,
        ignore_index=ignore_index,
        target_gradient=target_gradient,
        workspace_bytes=workspace_bytes,
        backend=backend,
    )
    margin = ExpFace() if margin is None else margin
    check_margin(margin)
    check_flag("return_stats", return_stats)
    return loss_step(
        embeddings, weight, labels, margin, options, class_subset=class_subset, return_stats=return_stats
    )
