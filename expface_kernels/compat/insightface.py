"""InsightFace's PartialFC_V2 on fused kernels: in a training script only the import line changes.

    from expface_kernels.compat.insightface import PartialFC_V2

B rows of this rank · N rows of all ranks · D features · C classes of this rank · S of its sample
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expface_kernels import backends
from expface_kernels.checks import (
    as_integer,
    check_flag,
    check_integer,
    check_sample_rate,
    check_scale,
    check_workspace_bytes,
)
from expface_kernels.distributed.group import Group, telling
from expface_kernels.distributed.module import CentreModule, initialize
from expface_kernels.distributed.ranges import insightface_ranges
from expface_kernels.distributed.sampling import draw, mixed_seed
from expface_kernels.margins import ArcFace, CosFace, ExpFace, Margin, SphereFace, describe
from expface_kernels.options import DEFAULT_WORKSPACE_BYTES, LossOptions
from expface_kernels.pipeline import Shard, loss_step

DEFAULT_SCALE = 64.0
USE_INSTEAD = (
    "pass ArcFace(s, margin), CosFace(s, m) or CombinedMarginLoss(s, m1, m2, m3) of InsightFace, "
    "PowerFace(s, m) or SphereFace(s, m) of ExpFace's authors, or a margin of expface_kernels, such as "
    "ExpFace(0.7), and its scale=64"
)


class KnownMargin(NamedTuple):
    """What a margin object of theirs computes, in our terms; the gradient is the detached one in both."""

    margin: Margin
    scale: float
    filter_threshold: float
    """Cosines of other classes above it count as 0; 0 for no filter."""


def recognize(margin_loss: Any, scale: float | None = None) -> KnownMargin:
    """Return margin, scale and filter of an object of theirs, as its attributes are now, or of ours.

    scale: of a margin of ours, which has none; None is 64. Theirs bring `s`.

    ValueError for another class, a subclass too (what it computes may differ), for one of that name that has
    parameters (a head of its own), for a missing attribute or one that is no number, and where theirs raises.
    """
    if isinstance(margin_loss, Margin):
        return KnownMargin(margin_loss, DEFAULT_SCALE if scale is None else scale, 0.0)
    name = type(margin_loss).__name__
    known = {
        "ArcFace": _arcface,
        "CosFace": lambda loss: CosFace(_number(loss, "m")),
        "CombinedMarginLoss": _combined,
        "PowerFace": lambda loss: ExpFace(_number(loss, "m")),
        "SphereFace": lambda loss: SphereFace(_number(loss, "m")),
    }
    if isinstance(margin_loss, type) or name not in known:
        got = f"the class {margin_loss.__name__} itself" if isinstance(margin_loss, type) else name
        raise ValueError(
            f"margin_loss: expected a margin that is known by its class, got {got}; {USE_INSTEAD}"
        )
    _refuse_parameters(margin_loss, name)
    if scale is not None:
        raise ValueError(f"scale: expected None with a margin that brings its own s, got {scale} with {name}")
    threshold = 0.0
    if name == "CombinedMarginLoss":
        threshold = max(_number(margin_loss, "interclass_filtering_threshold"), 0.0)
    return KnownMargin(known[name](margin_loss), _number(margin_loss, "s"), threshold)


def _refuse_parameters(margin_loss: Any, name: str) -> None:
    """Refuse heads of other libraries, which own their centres and go by the same names."""
    if not isinstance(margin_loss, nn.Module):
        return
    found = [f"{parameter} {tuple(value.shape)}" for parameter, value in margin_loss.named_parameters()]
    if found:
        raise ValueError(
            f"margin_loss: expected {name} without parameters, as InsightFace's are, got one with "
            f"{', '.join(found)}: a head of its own, whose centres would not train; {USE_INSTEAD}"
        )


def warn_of_dropped(margin_loss: Any) -> None:
    """Warn (UserWarning) where their CombinedMarginLoss has an m1 or m2 that it does not look at."""
    if type(margin_loss).__name__ != "CombinedMarginLoss" or isinstance(margin_loss, Margin):
        return
    m1, m2, m3 = (_number(margin_loss, name) for name in ("m1", "m2", "m3"))
    if m3 > 0 and (m1 != 1 or m2 != 0):
        warnings.warn(
            f"margin_loss: CombinedMarginLoss with m3={m3:g} above 0 is cos θ - m3, as InsightFace computes "
            f"it: m1={m1:g} and m2={m2:g} are dropped. All three count in "
            f"expface_kernels.CombinedMargin({m1:g}, {m2:g}, {m3:g})",
            UserWarning,
            stacklevel=3,
        )


def _arcface(loss: Any) -> Margin:
    """InsightFace's has `margin`, that of ExpFace's authors `m`; radians both."""
    return ArcFace(_number(loss, "m" if hasattr(loss, "m") else "margin"))


def _combined(loss: Any) -> Margin:
    m1, m2, m3 = (_number(loss, name) for name in ("m1", "m2", "m3"))
    if m3 > 0:
        return CosFace(m3)
    if m1 == 1 and m3 == 0:
        return ArcFace(m2)
    raise ValueError(
        "margin_loss: expected CombinedMarginLoss with m3 > 0, or m1 = 1 and m3 = 0, since InsightFace's "
        f"raises for others, got m1={m1:g}, m2={m2:g}, m3={m3:g}; pass "
        f"expface_kernels.CombinedMargin({m1:g}, {m2:g}, {m3:g}) and its scale"
    )


def _number(loss: Any, name: str) -> float:
    owner = type(loss).__name__
    if not hasattr(loss, name):
        raise ValueError(
            f"margin_loss: expected {owner} with the attribute {name!r}, as it has had since 12/2022, got "
            f"one without it; {USE_INSTEAD}"
        )
    value = getattr(loss, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"margin_loss: expected a finite number as {owner}.{name}, got {value!r}")
    return float(value)


class PartialFC_V2(CentreModule):
    """Class centres over the ranks of torch's default group and their margin softmax, as InsightFace has it.

    Called with this rank's rows, local_embeddings (B, D) and local_labels (B,) or (B, 1), it returns the
    mean loss over the rows of all ranks; every rank calls backward on it. As theirs: the detached gradient,
    plain cos(θ + m) past π − m, the embeddings' gradient multiplied by the number of ranks (for
    DistributedDataParallel, which averages; wrap the backbone alone). The local weight is a plain parameter,
    alone in the state_dict: their optimizers, momentum buffers and per-rank files load as they are.

    Other than theirs: the loss is not cut off at 69.08; labels keep shape and values; the number of rows may
    differ between ranks and steps, and be 0 or 1; rows may be float16; a graph may be kept for a second
    backward; without a process group it holds all classes.

    Labels are 0 ≤ label < num_classes, or `ignore_index` (−100; assign another) for a row that is left out
    of loss and mean. Anything else, −1 too, is a ValueError, or on a GPU a loss of NaN. Theirs takes such a
    row for one without a target: it adds 69.08 to the loss and pushes at every class.

    Args:
        margin_loss: an object of theirs, ArcFace(s, margin), CosFace(s, m) or CombinedMarginLoss(s, m1, m2,
            m3, interclass_filtering_threshold), or PowerFace(s, m) or SphereFace(s, m) of ExpFace's authors,
            known by the name of its class and its attributes, which are looked at in each step; or a margin
            of expface_kernels.margins. Kept as `margin_softmax`.
        embedding_size: D ≥ 1.
        num_classes: of all ranks.
        sample_rate: 0 < rate ≤ 1. Below 1 each call, in eval() too, takes the classes that are targets and
            random others, int(rate · num_local) in all, or the targets alone where they are more; at least
            one. Drawn from torch's global random state, which `torch.manual_seed` sets, and the rank.
        fp16: the products in float16 on a GPU, whatever autocast is on around it; False is without autocast.
        scale: s > 0 of a margin of ours; None is 64. Theirs have their own.
        process_group: None is torch's default group, or this process alone where there is none.

    Raises what `margin_cross_entropy` and `MarginSoftmaxHead` raise; ValueError for an unknown margin_loss.
    Collectives and bytes: those of a MarginSoftmaxHead, and one to compare arguments when it is built. With a
    filter (interclass_filtering_threshold > 0) plain PyTorch walks the classes tile by tile, in float32 at
    least, and keeps no logits; with sample_rate < 1 besides, the sampled centres are copied.
    """

    CHECKS: ClassVar[dict[str, Callable[[Any], object]]] = {
        "sample_rate": check_sample_rate,
        "fp16": lambda value: check_flag("fp16", value),
        "scale": lambda value: None if value is None else check_scale(value),
        "margin_softmax": recognize,
        "ignore_index": lambda value: check_integer("ignore_index", value),
        "workspace_bytes": check_workspace_bytes,
        "backend": backends.check_name,
    }
    MARGIN = "margin_softmax"
    BUILT = "PartialFC_V2"

    def __init__(
        self,
        margin_loss: Any,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
        *,
        scale: float | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if process_group is None and dist.is_available() and dist.is_initialized():
            process_group = dist.group.WORLD
        self._group = None if process_group is None else Group(process_group)
        self.rank, self.world_size = (0, 1) if self._group is None else (self._group.rank, self._group.size)
        try:
            embedding_size = as_integer("embedding_size", embedding_size, least=1)
            num_classes = as_integer("num_classes", num_classes, least=1)
            self.embedding_size = embedding_size
            self.num_classes = num_classes
            self.sample_rate = sample_rate
            self.fp16 = fp16
            self.scale = scale
            self.margin_softmax = margin_loss
            self.ignore_index = -100
            self.workspace_bytes = DEFAULT_WORKSPACE_BYTES
            self.backend = "auto"
            told = self._construction()
        except Exception as error:
            self._tell_of_failure(error)
            raise
        self._agree(told)
        warn_of_dropped(margin_loss)
        self._shard = insightface_ranges(num_classes, self.world_size)[self.rank]
        self.weight = nn.Parameter(torch.empty(self.num_local, embedding_size))
        self.reset_parameters()

    def _construction(self) -> dict[str, str]:
        """Return what every rank must build alike, as text."""
        known = self._known_margin()
        return {
            "num_classes": str(self.num_classes),
            "embedding_size": str(self.embedding_size),
            "margin_loss": describe(known.margin),
            "scale": str(float(known.scale)),
            "interclass_filtering_threshold": str(known.filter_threshold),
            "sample_rate": str(float(self.sample_rate)),
            "fp16": str(self.fp16),
        }

    def _known_margin(self) -> KnownMargin:
        known = recognize(self.margin_softmax, self.scale)
        check_scale(known.scale)
        return known

    def reset_parameters(self) -> None:
        """Draw the centres anew, normal(0, 0.01), from a seed that torch's global random state gives.

        Ranks with the same seed draw different rows: those of one head over all classes.
        """
        initialize(self.weight, self._shard, _global_seed())

    @property
    def num_sample(self) -> int:
        """Classes of this rank that a step takes, unless its targets alone are more."""
        return int(self.sample_rate * self.num_local)

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        """Return the mean loss () over the rows of all ranks; see the class for shapes and errors."""
        with telling(None if self._group is None else self._group.refuse_exchange):
            known = self._known_margin()  # what is assigned to a margin object of theirs shows here
            options = self._options(known)
        with torch.autocast(self.weight.device.type, dtype=torch.float16, enabled=self.fp16):
            loss = loss_step(
                local_embeddings,
                self.weight,
                local_labels,
                known.margin,
                options,
                shard=None if self._group is None else Shard(self._group, self.num_classes, self._shard),
                sample=Sampler(self.num_sample, self.rank) if self.sample_rate < 1 else None,
                agreed={
                    "interclass_filtering_threshold": str(known.filter_threshold),
                    "fp16": str(self.fp16),
                },
            )
        assert isinstance(loss, Tensor)
        return loss

    def _options(self, known: KnownMargin) -> LossOptions:
        filtered = known.filter_threshold > 0
        return LossOptions(
            scale=known.scale,
            ignore_index=self.ignore_index,
            target_gradient="detached",
            workspace_bytes=self.workspace_bytes,
            backend="reference" if filtered else self.backend,  # which takes them on any device
            negative_threshold=known.filter_threshold if filtered else None,
            sample_rate=self.sample_rate,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_ranks" in state:  # pickled by an earlier version
            state = dict(state)
            state["_group"] = state.pop("_ranks")
        super().__setstate__(state)

    def extra_repr(self) -> str:
        margin = (
            f", margin_softmax={self.margin_softmax!r}" if isinstance(self.margin_softmax, Margin) else ""
        )
        return (
            f"embedding_size={self.embedding_size}, num_classes={self.num_classes}{margin}, "
            f"sample_rate={self.sample_rate}, fp16={self.fp16}, "
            f"classes {self._shard.start} to {self._shard.stop} of rank {self.rank}"
        )


def _global_seed() -> int:
    """Draw a seed from torch's global random state."""
    return int(torch.randint(2**63 - 1, (), device="cpu"))


@dataclass(frozen=True)
class Sampler:
    """Their choice of a step's classes: targets and random others, `num_sample` in all, or targets alone."""

    num_sample: int
    rank: int

    def __call__(self, targets: Tensor, num_local: int) -> Tensor:
        """Return (S,) int64 sorted, from targets (N,) int64, below 0 where there is none; a host sync."""
        positives = torch.unique(targets[targets >= 0])
        size = max(self.num_sample, 1)
        if positives.shape[0] >= size:
            return positives
        generator = torch.Generator(targets.device)
        generator.manual_seed(mixed_seed(_global_seed(), self.rank))
        return draw(targets, num_local, size, generator)
