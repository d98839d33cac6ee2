"""Heads from the classification losses of pytorch-metric-learning, and back.

    head = from_loss(losses.ArcFaceLoss(num_classes=1000, embedding_size=512))
    loss = to_loss(head)

Version 2 keeps `W` (D, C) and takes ArcFace's margin in degrees; the loss then holds it in radians. Version 3
keeps `weight` (C, D) and takes radians. Which one a loss is of shows in its attributes.

C classes · D features
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from expface_kernels.heads import MarginSoftmaxHead
from expface_kernels.margins import ArcFace, CosFace, MarginFunction, NormFace

KNOWN = ("ArcFaceLoss", "CosFaceLoss", "NormalizedSoftmaxLoss")
REDUCERS = {"MeanReducer": "mean", "SumReducer": "sum"}
USE_INSTEAD = "pass one of these, or build MarginSoftmaxHead(embedding_size, num_classes, margin=…) yourself"


def from_loss(loss: nn.Module, **options: Any) -> MarginSoftmaxHead:
    """A head with the centres, margin, scale and reduction of a loss, and its exact gradient.

    Args:
        loss: ArcFaceLoss (becomes ArcFace with boundary "monotonic", which is its rule past π − m),
            CosFaceLoss or NormalizedSoftmaxLoss (NormFace with scale 1/temperature), of version 2 or 3.
        options: of MarginSoftmaxHead, instead of what follows from the loss. With a `process_group` each rank
            copies its own rows.

    Returns:
        A head whose loss and gradients equal the loss's, but that rows with label −100 are left out of the
        mean. Its weight is a copy, (C, D), of the loss's dtype and on its device.

    Raises:
        ValueError: another loss, by the name of its class (SphereFaceLoss, sub-centres, subclasses); or one
            with a regularizer, a distance that is not the cosine, or a reducer that is not mean or sum.

    Peak extra memory: none beside the new weight.
    """
    margin, scale = _margin_and_scale(loss)
    _refuse_extras(loss)
    centres = _centres(loss)
    given: dict[str, Any] = {
        "margin": margin,
        "scale": scale,
        "reduction": _reduction(loss),
        "target_gradient": "exact",
        "device": centres.device,
        "dtype": centres.dtype,
    } | options
    head = MarginSoftmaxHead(centres.shape[1], centres.shape[0], **given)
    with torch.no_grad():
        head.local_weight.copy_(centres[head.class_start : head.class_start + head.num_local])
    return head


def to_loss(head: MarginSoftmaxHead, into: nn.Module | None = None) -> nn.Module:
    """The loss of the library that equals a head: what `from_loss` took, or would take, to make it.

    Args:
        head: with ArcFace (boundary "monotonic"), CosFace or NormFace, a float margin, the exact gradient, a
            mean or a sum, and all classes in this process (a group of one rank has them).
        into: a loss to write centres, margin and scale into, of the same kind and shape; None makes one of
            the installed version.

    Raises:
        ImportError: nothing to write into, and the library is not installed.
        TypeError: another head. ValueError: the library has no such loss, or `into` is another; says what to
            change.

    Peak extra memory: none beside the new weight.
    """
    if not isinstance(head, MarginSoftmaxHead):
        raise TypeError(f"head: expected a MarginSoftmaxHead, got {type(head).__name__}")
    name = _loss_name(head)
    loss = _new_loss(name, head) if into is None else into
    if type(loss).__name__ != name:
        raise ValueError(f"into: expected {name} for {head.margin!r}, got {type(loss).__name__}")
    _refuse_extras(loss)
    if _reduction(loss) != head.reduction:
        raise ValueError(f"into: expected a reducer for {head.reduction!r}, got {_reduction(loss)!r}")
    centres = _centres(loss)
    if centres.shape != head.weight.shape:
        raise ValueError(
            f"into: expected {tuple(head.weight.shape)} centres as in head, got {tuple(centres.shape)}"
        )
    if centres.dtype != head.weight.dtype:
        raise ValueError(f"into: expected {head.weight.dtype} as in head, got {centres.dtype}")
    numbers = _numbers(head)
    for attribute in numbers:
        _number(loss, attribute)  # or it would become an attribute that nobody reads
    with torch.no_grad():
        centres.copy_(head.local_weight)
    for attribute, value in numbers.items():
        setattr(loss, attribute, value)
    return loss


def _margin_and_scale(loss: nn.Module) -> tuple[MarginFunction, float]:
    """What the loss computes, told by the name of its class; radians, whatever its version."""
    name = type(loss).__name__
    if name == "ArcFaceLoss":
        return ArcFace(_number(loss, "margin"), boundary="monotonic"), _number(loss, "scale")
    if name == "CosFaceLoss":
        return CosFace(_number(loss, "margin")), _number(loss, "scale")
    if name == "NormalizedSoftmaxLoss":
        return NormFace(), 1 / _number(loss, "temperature")
    why = ""
    if name == "SphereFaceLoss":
        why = (
            " SphereFaceLoss cuts its margin to a whole number and multiplies the logits by the embedding's "
            "norm, so no margin of the angle alone equals it; SphereFace(m) is the normalised loss."
        )
    elif name == "SubCenterArcFaceLoss":
        why = " It has several centres a class, which no head here has."
    raise ValueError(f"loss: expected {', '.join(KNOWN)}, got {name}; {USE_INSTEAD}.{why}")


def _refuse_extras(loss: nn.Module) -> None:
    """What a head would silently leave out."""
    name = type(loss).__name__
    for attribute in ("weight_regularizer", "embedding_regularizer"):
        if getattr(loss, attribute, None) is not None:
            raise ValueError(
                f"{name}: expected no {attribute}, which a head does not have, got "
                f"{type(getattr(loss, attribute)).__name__}; add it to the head's loss yourself"
            )
    distance = _attribute(loss, "distance")
    kind = type(distance).__name__
    told = {
        "class": kind in ("CosineSimilarity", "DotProductSimilarity"),
        "normalize_embeddings": getattr(distance, "normalize_embeddings", kind == "CosineSimilarity"),
        "p": getattr(distance, "p", 2) == 2,
        "power": getattr(distance, "power", 1) == 1,
    }
    wrong = [key for key, right in told.items() if not right]
    if wrong:
        raise ValueError(
            f"{name}: expected the cosine as its distance, got {kind} with another {', '.join(wrong)}"
        )


def _reduction(loss: nn.Module) -> str:
    reducer = type(_attribute(loss, "reducer")).__name__
    if reducer not in REDUCERS:
        raise ValueError(
            f"{type(loss).__name__}: expected one of the reducers {', '.join(REDUCERS)}, got {reducer}; pass "
            "a loss with one of them and use the head's reduction"
        )
    return REDUCERS[reducer]


def _centres(loss: nn.Module) -> Tensor:
    """The loss's centres as (C, D), sharing its memory."""
    ours, theirs = getattr(loss, "weight", None), getattr(loss, "W", None)
    centres = ours.detach() if isinstance(ours, Tensor) else None
    if centres is None and isinstance(theirs, Tensor):
        centres = theirs.detach().T
    if centres is None or centres.dim() != 2:
        raise ValueError(
            f"{type(loss).__name__}: expected centres in `W` (D, C), version 2, or `weight` (C, D), version 3"
        )
    return centres


def _loss_name(head: MarginSoftmaxHead) -> str:
    """The class of the loss that equals a head."""
    if head.target_gradient != "exact":
        raise ValueError(
            f"head: expected target_gradient 'exact', as the library's losses have, got "
            f"{head.target_gradient!r}"
        )
    if head.reduction not in REDUCERS.values():
        raise ValueError(f"head: expected reduction 'mean' or 'sum', got {head.reduction!r}")
    if head.num_local != head.num_classes:
        raise ValueError(
            f"head: expected one with all {head.num_classes} classes in this process, got {head.num_local}; "
            "save its centres and load them into a head without a process_group"
        )
    margin = head.margin
    if isinstance(margin, NormFace):
        return "NormalizedSoftmaxLoss"
    if isinstance(margin, (ArcFace, CosFace)):
        if isinstance(margin.m, Tensor):
            raise ValueError(f"head: expected a margin with one float m, got {margin!r}")
        if isinstance(margin, CosFace):
            return "CosFaceLoss"
        if margin.boundary == "monotonic":
            return "ArcFaceLoss"
        raise ValueError(
            f"head: expected ArcFace with boundary 'monotonic', as the library has, got {margin!r}"
        )
    raise ValueError(f"head: expected ArcFace, CosFace or NormFace, which the library has, got {margin!r}")


def _numbers(head: MarginSoftmaxHead) -> dict[str, float]:
    """A loss's own attributes, radians in every version: degrees are converted where it is built."""
    if isinstance(head.margin, (ArcFace, CosFace)):
        return {"scale": float(head.scale), "margin": float(head.margin.m)}
    return {"temperature": 1 / head.scale}


def _new_loss(name: str, head: MarginSoftmaxHead) -> nn.Module:
    """A loss of the installed version; margin and scale are set when it is filled."""
    try:
        from pytorch_metric_learning import losses, reducers
    except ImportError as error:
        raise ImportError("to_loss needs pytorch-metric-learning, or a loss to write into: into=…") from error
    reducer = {"mean": reducers.MeanReducer, "sum": reducers.SumReducer}[head.reduction]()
    made = getattr(losses, name)(
        num_classes=head.num_classes, embedding_size=head.embedding_size, reducer=reducer
    )
    loss: nn.Module = made.to(device=head.weight.device, dtype=head.weight.dtype)
    return loss


def _attribute(loss: nn.Module, name: str) -> Any:
    if not hasattr(loss, name):
        raise ValueError(f"{type(loss).__name__}: expected the attribute {name!r}, got a loss without it")
    return getattr(loss, name)


def _number(loss: nn.Module, name: str) -> float:
    value = _attribute(loss, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{type(loss).__name__}: expected a finite number as {name!r}, got {value!r}")
    return float(value)
