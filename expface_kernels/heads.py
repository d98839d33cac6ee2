"""Loss heads: modules that own the class centres. No maths here; functional.py has it.

B rows of this process · C classes · D features
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from expface_kernels.checks import (
    FLOATS,
    LARGEST_TENSOR,
    as_integer,
    check_device,
    check_flag,
    check_gradient_tolerance,
    check_margin,
)
from expface_kernels.distributed.group import Group
from expface_kernels.distributed.module import CentreModule, initialize, sharded_parameter
from expface_kernels.distributed.ranges import ClassRange, shard_ranges
from expface_kernels.distributed.sampling import LARGEST_SEED, RecentSteps, Sampler
from expface_kernels.margins import ExpFace, MarginFunction, describe
from expface_kernels.options import DEFAULT_WORKSPACE_BYTES, LossOptions
from expface_kernels.pipeline import Shard, in_backward, loss_step, sharded_topk_cosine, topk_cosine
from expface_kernels.stats import BatchStats

STEP_KEY = "sampling_step"


class MarginSoftmaxHead(CentreModule):
    """Class centres and their margin-softmax loss; trains with the published recipe's gradient ("detached").

    `head(embeddings, labels)` is `margin_cross_entropy` over all of `head.weight`; see there for shapes,
    dtypes, errors and memory. `margin`, `scale`, `reduction`, `ignore_index`, `target_gradient`,
    `sample_rate`, `embedding_grad_scale`, `workspace_bytes` and `backend` are plain attributes and may be
    assigned between steps (with a process group: to the same on every rank); a wrong value raises at once.

    With `process_group` each rank holds and trains a share of the centres and calls the head with its own
    rows; the loss is that of all ranks' rows and the same everywhere, and every rank calls backward on it.
    Wrap the backbone in DistributedDataParallel, never the head. What is sent: docs/partial_fc.md.

    Args:
        embedding_size: D ≥ 1.
        num_classes: C ≥ 1, of all ranks together.
        margin: `theta -> psi`; None is ExpFace(0.7). An nn.Module is registered, its parameters train (over
            ranks not those of a margin with a value a row, which is refused).
        scale: s > 0.
        reduction, ignore_index, workspace_bytes, backend: as in `margin_cross_entropy`; "none" is this
            rank's (B,).
        sample_rate: in training, the share of the classes that take part in a step: the batch's own, the
            rest drawn anew each time (never fewer than the batch's rows). In `eval()` all do.
        sparse_grad: the weight's gradient is sparse COO, the rows that took part, at no cost in C (not with
            process_group). Its optimizer must take sparse gradients and have weight_decay=0. Where all
            classes take part, without sampling and in `eval()`, it has all rows and saves nothing. Off, it is
            dense, and zero elsewhere: an optimizer with momentum or decay moves those rows too.
        target_gradient: "detached" (default) or "exact"; docs/math.md section 4 says what the choice does.
        gradient_tolerance: deprecated, without effect: 0 is accepted with a DeprecationWarning.
        process_group: the ranks that share the classes; `weight` is then a DTensor, Shard(0). All ranks
            build the head alike, or all get a ValueError that names ranks and values.
        embedding_grad_scale: with process_group, what multiplies the gradient of the embeddings and of a
            margin's per-row tensors. None is the group's size, for DDP and FSDP, which average; 1 where
            gradients are summed.
        equal_rows: promise that all ranks always bring as many rows, of one dtype, valid: saves the exchange
            of row counts, and with it the errors that ranks tell each other.
        seed: of the initial centres, normal(0, 0.01), and of sampling; the global random state stays as it
            is.
        device, dtype: of the centres; None is torch's default, or with an NCCL group the current GPU.
    """

    CHECKS: ClassVar[dict[str, Callable[[Any], object]]] = {"margin": check_margin}
    FIXED: ClassVar[tuple[str, ...]] = ("num_classes", "embedding_size", "seed")

    margin: MarginFunction
    # Each of these reads and replaces one field of `_options`; see the end of this file.
    scale: float
    reduction: str
    ignore_index: int
    target_gradient: str
    sample_rate: float
    sparse_grad: bool
    embedding_grad_scale: float | None
    equal_rows: bool
    workspace_bytes: int
    backend: str

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
        gradient_tolerance: float | None = None,
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
        self._group = None if process_group is None else Group(process_group)
        try:
            embedding_size = as_integer("embedding_size", embedding_size, least=1)
            num_classes = as_integer("num_classes", num_classes, least=1)
            seed = as_integer("seed", seed)
            if not -LARGEST_SEED <= seed <= LARGEST_SEED:
                raise ValueError(f"seed: expected -2**63 < seed < 2**63, got {seed}")
            check_device(device)
            if dtype is not None and dtype not in FLOATS:
                came = dtype if isinstance(dtype, torch.dtype) else f"{type(dtype).__name__} {dtype!r}"
                raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {came}")
            if embedding_size * num_classes > LARGEST_TENSOR:
                size = f"{embedding_size}·{num_classes}"
                raise ValueError(f"num_classes: expected at most 2**59 numbers of centres, got {size}")
            if gradient_tolerance is not None:
                check_gradient_tolerance(gradient_tolerance)
            self.embedding_size = embedding_size
            self.num_classes = num_classes
            self.seed = seed
            self.margin = ExpFace() if margin is None else margin
            self._set_options(
                LossOptions(
                    scale=scale,
                    reduction=reduction,
                    ignore_index=ignore_index,
                    target_gradient=target_gradient,
                    workspace_bytes=workspace_bytes,
                    backend=backend,
                    sample_rate=sample_rate,
                    sparse_grad=sparse_grad,
                    embedding_grad_scale=embedding_grad_scale,
                    equal_rows=equal_rows,
                )
            )
            told = self._construction(dtype)
        except Exception as error:
            self._tell_of_failure(error)
            raise
        self._agree(told)
        self._step = 0
        self._recent_steps = RecentSteps()
        self._make_weight(device, dtype)
        self.reset_parameters()

    def _construction(self, dtype: torch.dtype | None) -> dict[str, str]:
        """Return what every rank must build alike, as text."""
        told = {name: str(getattr(self, name)) for name in _BUILT_ALIKE}
        return {**told, "margin": describe(self.margin), "dtype": str(dtype or torch.get_default_dtype())}

    def _make_weight(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        group = self._group
        self._shard = ClassRange(0, self.num_classes)
        if group is None:
            whole = torch.empty(self.num_classes, self.embedding_size, device=device, dtype=dtype)
            self.weight = nn.Parameter(whole)
            return
        self._shard = shard_ranges(self.num_classes, group.size)[group.rank]
        if device is None and group.device.type != "cpu":
            device = group.device
        local = torch.empty(self._shard.size, self.embedding_size, device=device, dtype=dtype)
        self.weight = sharded_parameter(local, self.num_classes, group)

    def _set_options(self, options: LossOptions) -> None:
        """Refuse an option without an effect, and a sparse gradient of a DTensor, which has none."""
        if self._group is not None and options.sparse_grad:
            raise ValueError("sparse_grad: expected False with process_group (weight is a DTensor), got True")
        for name, default in (("embedding_grad_scale", None), ("equal_rows", False)):
            value = getattr(options, name)
            if self._group is None and value is not default:
                raise ValueError(f"{name}: expected {default} without process_group, got {value}")
        self._options = options

    @property
    def gradient_tolerance(self) -> float:
        """Return 0: deprecated, without effect."""
        return 0.0

    @gradient_tolerance.setter
    def gradient_tolerance(self, value: float) -> None:
        check_gradient_tolerance(value)

    def reset_parameters(self) -> None:
        """Draw the centres anew from `seed`: the same ones on every device and for every number of ranks."""
        if not self.weight.is_meta:
            with torch.no_grad():
                initialize(self.local_weight, self._shard, self.seed)

    @property
    def local_weight(self) -> Tensor:
        """Return the (num_local, D) centers of this process as a plain tensor; all without process_group."""
        weight: Any = self.weight
        local: Tensor = weight if self._group is None else weight.to_local()
        return local

    @property
    def sampling_step(self) -> int:
        """Count the samples drawn so far, which with `seed` and the rank determines the next one."""
        return self._step

    @overload
    def forward(
        self, embeddings: Tensor, labels: Tensor, *, return_stats: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def forward(
        self, embeddings: Tensor, labels: Tensor, *, return_stats: Literal[True]
    ) -> tuple[Tensor, BatchStats]: ...
    @overload
    def forward(
        self, embeddings: Tensor, labels: Tensor, *, return_stats: bool
    ) -> Tensor | tuple[Tensor, BatchStats]: ...
    def forward(
        self, embeddings: Tensor, labels: Tensor, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, BatchStats]:
        """Return the loss of embeddings (B, D), labels (B,) or (B, 1), or (loss, BatchStats)."""
        check_flag("return_stats", return_stats)
        sample = self._sampler(labels)
        result = loss_step(
            embeddings,
            self.weight,
            labels,
            self.margin,
            self._options,
            shard=self._own_shard(),
            sample=sample,
            return_stats=return_stats,
        )
        if sample is not None and sample.step == self._step:
            self._step += 1
        return result

    def topk(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return cosines (B, k), descending, and classes (B, k) int64 of the nearest centers; no gradient.

        With process_group every rank calls it with its own rows, and gets classes of all ranks.
        """
        shard = self._own_shard()
        if shard is None:
            return topk_cosine(embeddings, self.weight, k, backend=self.backend)
        return sharded_topk_cosine(embeddings, self.weight, k, self._options, shard)

    def _own_shard(self) -> Shard | None:
        return None if self._group is None else Shard(self._group, self.num_classes, self._shard)

    def _sampler(self, labels: Tensor) -> Sampler | None:
        """Return what draws the classes of this step: where a forward is run again, those that it had."""
        if not self.training or self.sample_rate == 1:
            return None
        step = self._step
        if step > 0 and in_backward():
            known = self._recent_steps.repeated(labels)
            step = self._step - 1 if known is None else known
        else:
            self._recent_steps.note(labels, step)
        rank = 0 if self._group is None else self._group.rank
        return Sampler(self.sample_rate, self.seed, step, rank)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_options" not in state:  # pickled by an earlier version, with an attribute for each option
            state = dict(state)
            names = [field.name for field in dataclasses.fields(LossOptions)]
            state["_options"] = LossOptions(**{name: state.pop(name) for name in names if name in state})
            state.pop("gradient_tolerance", None)
            state["_group"] = state.pop("_ranks")
        state.setdefault("_recent_steps", RecentSteps())
        super().__setstate__(state)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.sample_rate < 1:
            destination[prefix + STEP_KEY] = torch.tensor(self._step)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        # Kept as an int, since a tensor on a GPU would be read in every step. States without one are welcome.
        step = state_dict.pop(prefix + STEP_KEY, None)
        super()._load_from_state_dict(state_dict, prefix, *others)
        if step is not None:
            self._step = int(step)

    def extra_repr(self) -> str:
        margin = "" if isinstance(self.margin, nn.Module) else f", margin={self.margin!r}"
        shared = "" if self.sample_rate == 1 else f"sample_rate={self.sample_rate}, "
        if self._group is not None:
            shared += f"classes {self._shard.start} to {self._shard.stop} of rank {self._group.rank}, "
        return (
            f"embedding_size={self.embedding_size}, num_classes={self.num_classes}{margin}, "
            f"scale={self.scale}, reduction={self.reduction!r}, target_gradient={self.target_gradient!r}, "
            f"{shared}backend={self.backend!r}"
        )


def _option(name: str) -> property:
    def get(head: MarginSoftmaxHead) -> Any:
        return getattr(head._options, name)

    def set_(head: MarginSoftmaxHead, value: Any) -> None:
        head._set_options(head._options.replace(**{name: value}))

    return property(get, set_, doc=f"The option `{name}` of the next step; a wrong value raises at once.")


for _name in (field.name for field in dataclasses.fields(LossOptions)):
    if _name in MarginSoftmaxHead.__annotations__:
        setattr(MarginSoftmaxHead, _name, _option(_name))

# What the ranks of a group must build alike, beside the margin and the dtype.
_BUILT_ALIKE = (
    "num_classes",
    "embedding_size",
    "scale",
    "sample_rate",
    "reduction",
    "ignore_index",
    "target_gradient",
    "embedding_grad_scale",
    "equal_rows",
    "seed",
)
