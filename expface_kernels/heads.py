"""Loss heads: modules that own the class centres. No maths here; functional.py has it.

B rows · C classes · D features
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from expface_kernels import backends
from expface_kernels.checks import FLOATS, check_integer, check_margin, check_options, check_scale
from expface_kernels.functional import DEFAULT_WORKSPACE_BYTES, margin_cross_entropy, topk_cosine
from expface_kernels.margins import ExpFace, MarginFunction
from expface_kernels.stats import BatchStats

INIT_STD = 0.01


class MarginSoftmaxHead(nn.Module):
    """Class centres and their margin-softmax loss; trains with the published recipe's gradient ("detached").

    `head(embeddings, labels)` is `margin_cross_entropy` over all of `head.weight`; see there for shapes,
    dtypes, errors and memory. `margin`, `scale`, `reduction`, `ignore_index`, `target_gradient`,
    `workspace_bytes` and `backend` are plain attributes and may be assigned between steps.

    Args:
        embedding_size: D ≥ 1.
        num_classes: C ≥ 1.
        margin: `theta -> psi`; None is ExpFace(0.7). An nn.Module is registered, its parameters train.
        scale: s > 0.
        reduction, ignore_index, workspace_bytes, backend: as in `margin_cross_entropy`.
        target_gradient: "detached" (default) or "exact"; docs/math.md section 4 says what the choice does.
        seed: of the initial centres, normal(0, 0.01); the global random state is not touched.
        device, dtype: of the centres; None is torch's default.
        sample_rate, sparse_grad, gradient_tolerance, process_group, embedding_grad_scale, equal_rows: of
            sampling and sharding, which this version does not have: anything but the default is a ValueError.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        margin: MarginFunction | None = None,
        *,
        scale: float = 64.0,
        reduction: str = "mean",
        sample_rate: float = 1.0,
        sparse_grad: bool = False,
        ignore_index: int = -100,
        target_gradient: str = "detached",
        gradient_tolerance: float = 0.0,
        process_group: Any = None,
        embedding_grad_scale: float | None = None,
        equal_rows: bool = False,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
        backend: str = "auto",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("embedding_size", embedding_size, least=1)
        check_integer("num_classes", num_classes, least=1)
        check_integer("seed", seed)
        margin = ExpFace() if margin is None else margin
        check_scale(scale)
        backends.check_name(backend)
        check_options(margin, reduction, ignore_index, target_gradient, gradient_tolerance, workspace_bytes)
        _refuse_what_is_not_there(
            sample_rate=(sample_rate, 1.0),
            sparse_grad=(sparse_grad, False),
            process_group=(process_group, None),
            embedding_grad_scale=(embedding_grad_scale, None),
            equal_rows=(equal_rows, False),
        )
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype}")
        self.embedding_size = embedding_size
        self.num_classes = num_classes
        self.margin = margin
        self.scale = scale
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.target_gradient = target_gradient
        self.gradient_tolerance = gradient_tolerance
        self.workspace_bytes = workspace_bytes
        self.backend = backend
        self.seed = seed
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size, device=device, dtype=dtype))
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "margin":
            check_margin(value)
            # A margin may be a module or not: torch would not let one replace the other.
            self.__dict__.pop(name, None)
            self.__dict__.get("_modules", {}).pop(name, None)
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Draw the centres anew from `seed`: the same ones on every device."""
        if self.weight.is_meta:
            return
        generator = torch.Generator().manual_seed(self.seed)
        centres = torch.empty(self.weight.shape, dtype=self.weight.dtype)
        with torch.no_grad():
            self.weight.copy_(centres.normal_(0, INIT_STD, generator=generator))

    @property
    def local_weight(self) -> Tensor:
        """The (num_local, D) centres of this process: all of them."""
        return self.weight

    @property
    def class_start(self) -> int:
        """First class of this process."""
        return 0

    @property
    def num_local(self) -> int:
        """Number of classes of this process."""
        return self.num_classes

    def forward(
        self, embeddings: Tensor, labels: Tensor, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, BatchStats]:
        """Loss of embeddings (B, D) with labels (B,) or (B, 1); with `return_stats` (loss, BatchStats)."""
        return margin_cross_entropy(
            embeddings,
            self.weight,
            labels,
            self.margin,
            scale=self.scale,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            target_gradient=self.target_gradient,
            gradient_tolerance=self.gradient_tolerance,
            workspace_bytes=self.workspace_bytes,
            backend=self.backend,
            return_stats=return_stats,
        )

    def topk(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Cosines (B, k), falling, and classes (B, k) int64 of the nearest centres; no margin or gradient."""
        return topk_cosine(embeddings, self.weight, k, backend=self.backend)

    def extra_repr(self) -> str:
        margin = "" if isinstance(self.margin, nn.Module) else f", margin={self.margin!r}"
        return (
            f"embedding_size={self.embedding_size}, num_classes={self.num_classes}{margin}, "
            f"scale={self.scale}, reduction={self.reduction!r}, target_gradient={self.target_gradient!r}, "
            f"backend={self.backend!r}"
        )


def _refuse_what_is_not_there(**options: tuple[Any, Any]) -> None:
    for name, (value, default) in options.items():
        if value != default:
            raise ValueError(
                f"{name}: expected {default!r}, the only value this version offers, got {value!r}"
            )
