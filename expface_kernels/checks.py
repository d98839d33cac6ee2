"""Catches what a user can get wrong before any work: shapes, dtypes, devices, ranges.

Only what is known without looking at a tensor's values, so torch.compile sees none of it at run time;
label values are checked in ops.local_labels. Errors name the argument, what was expected, what came.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import numbers
import operator
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from expface_kernels.margins import TARGET_GRADIENTS, is_per_row, row_parameters

REDUCTIONS = ("mean", "sum", "none")
SCALE_RANGE = 1e-6, 1e6
LARGEST_INTEGER = 2**63 - 1  # that an op of torch takes
LARGEST_TENSOR = 2**59  # numbers of a tensor: torch counts its bytes, 8 a number, in 63 bits
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
INTEGERS = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


def check_rows_and_centres(embeddings: Any, weight: Any) -> None:
    """Check that embeddings (B, D) and weight (C, D) are floating point, on one device, C and D > 0."""
    for name, value, shape in (("embeddings", embeddings, "(B, D)"), ("weight", weight, "(C, D)")):
        _check_tensor(name, value, shape)
        if value.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got one of layout {value.layout}")
        if value.dim() != 2:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
        if value.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype}")
    if embeddings.shape[1] != weight.shape[1]:
        raise ValueError(
            f"embeddings: expected {weight.shape[1]} features as in weight {tuple(weight.shape)}, "
            f"got shape {tuple(embeddings.shape)}"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(
            f"weight: expected at least one class and one feature, got shape {tuple(weight.shape)}"
        )
    if embeddings.device != weight.device:
        raise ValueError(f"embeddings: expected on {weight.device} like weight, got on {embeddings.device}")


def check_labels(labels: Any, embeddings: Tensor) -> None:
    """Check that labels are (B,) or (B, 1) of any integer dtype, on the embeddings' device."""
    _check_tensor("labels", labels, "(B,)")
    if labels.dtype not in INTEGERS:
        raise TypeError(f"labels: expected an integer dtype, got {labels.dtype}")
    batch = embeddings.shape[0]
    if tuple(labels.shape) not in ((batch,), (batch, 1)):
        raise ValueError(f"labels: expected shape ({batch},) or ({batch}, 1), got {tuple(labels.shape)}")
    if labels.device != embeddings.device:
        raise ValueError(f"labels: expected on {embeddings.device} like embeddings, got on {labels.device}")


def check_class_subset(class_subset: Any, weight: Tensor) -> None:
    """Check that class_subset is (S,) int64 and not empty; the op checks its values."""
    if class_subset is None:
        return
    _check_tensor("class_subset", class_subset, "(S,)")
    if class_subset.dtype != torch.int64:
        raise TypeError(f"class_subset: expected int64, got {class_subset.dtype}")
    if class_subset.dim() != 1 or class_subset.shape[0] == 0:
        raise ValueError(f"class_subset: expected shape (S,) with S >= 1, got {tuple(class_subset.shape)}")
    if class_subset.device != weight.device:
        raise ValueError(
            f"class_subset: expected on {weight.device} like weight, got on {class_subset.device}"
        )


def check_num_rows(margin: Any, rows: int) -> None:
    """Check that a margin's per-row values are for as many rows."""
    for name, value in row_parameters(margin).items():
        if value.shape[0] != rows:
            raise ValueError(
                f"margin: expected {name} of shape ({rows},), one value for each of this rank's rows, "
                f"got {tuple(value.shape)}"
            )


def check_trained_alike(margin: Any) -> None:
    """Of a margin that each rank runs on rows of its own: no parameters that train, or each rank's would
    follow its own rows."""
    if not is_per_row(margin) or not isinstance(margin, torch.nn.Module):
        return
    trained = [name for name, parameter in margin.named_parameters() if parameter.requires_grad]
    if trained:
        raise ValueError(
            "margin: expected one without parameters that train, since it has a value a row and ranks would "
            f"train them apart, got {type(margin).__name__} with {', '.join(trained)}; compute the values in "
            "a module that DistributedDataParallel wraps, such as the backbone, and pass them as (B,) "
            "tensors: CosFace(values)"
        )


def check_k(k: Any, classes: int) -> int:
    """Return k, the number of nearest classes wanted, where 1 ≤ k ≤ classes."""
    k = check_integer("k", k, least=1)
    if k > classes:
        raise ValueError(f"k: expected at most the {classes} classes there are, got {k}")
    return k


def check_scale(scale: Any) -> None:
    """Check for a finite number above 0, within what float32 logits and sums can bear."""
    check_number("scale", scale)
    if not (0 < scale < math.inf):
        raise ValueError(f"scale: expected a finite number above 0, got {scale}")
    low, high = SCALE_RANGE
    if not (low <= scale <= high):
        raise ValueError(f"scale: expected {low:g} to {high:g}, where float32 suffices, got {scale}")


def check_workspace_bytes(workspace_bytes: Any) -> None:
    """Check for 0 or more, of which an op of torch takes 63 bits."""
    check_integer("workspace_bytes", workspace_bytes, least=0, most=LARGEST_INTEGER)


def check_device(device: Any) -> None:
    """Check for None, or a device that torch knows and that is there."""
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        text = str(error).splitlines()[0]
        raise ValueError(
            f"device: expected one that is there, such as 'cpu', got {device!r}: {text}"
        ) from error


def check_process_group(process_group: Any) -> None:
    """Check for a group of torch.distributed that this process belongs to."""
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(
            "process_group: expected a torch.distributed.ProcessGroup that this process belongs to, "
            f"got {type(process_group).__name__}"
        )


def check_reduction(reduction: Any) -> None:
    check_choice("reduction", reduction, REDUCTIONS)


def check_target_gradient(target_gradient: Any) -> None:
    check_choice("target_gradient", target_gradient, TARGET_GRADIENTS)


def check_gradient_tolerance(gradient_tolerance: Any) -> None:
    """Accept 0, which every gradient is computed with anyway, with a DeprecationWarning."""
    if check_number("gradient_tolerance", gradient_tolerance) != 0:
        raise ValueError(
            f"gradient_tolerance: expected 0 (exact), the only one this version has, got {gradient_tolerance}"
        )
    warnings.warn(
        "gradient_tolerance: has no effect and will be removed; leave it out",
        DeprecationWarning,
        stacklevel=3,
    )


def check_sample_rate(sample_rate: Any) -> None:
    """Check the share of the classes that take part in a step: 0 < rate ≤ 1."""
    check_number("sample_rate", sample_rate)
    if not (0 < sample_rate <= 1):
        raise ValueError(f"sample_rate: expected above 0 and at most 1, got {sample_rate}")


def check_embedding_grad_scale(embedding_grad_scale: Any) -> None:
    """Check for a finite number above 0, or None for the size of the process group."""
    if embedding_grad_scale is None:
        return
    check_number("embedding_grad_scale", embedding_grad_scale)
    if not (0 < embedding_grad_scale < math.inf):
        raise ValueError(
            "embedding_grad_scale: expected a finite number above 0, or None for the size of process_group, "
            f"got {embedding_grad_scale}"
        )


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__} {value!r}")


def check_margin(margin: Any) -> None:
    """Check for a callable; what it returns is checked when it is called."""
    if not callable(margin):
        raise TypeError(
            f"margin: expected a callable theta -> psi such as ExpFace(), got {type(margin).__name__}"
        )
    if isinstance(margin, type):
        raise TypeError(f"margin: expected an instance such as {margin.__name__}(), got the class itself")
    if torch.compiler.is_compiling():
        return
    with contextlib.suppress(ValueError):  # some built-in functions have no signature
        signature = inspect.signature(getattr(margin, "forward", margin))
        try:
            signature.bind("theta")
        except TypeError as error:
            name = getattr(margin, "__name__", type(margin).__name__)
            raise TypeError(
                f"margin: expected a callable of theta alone, (B,) radians -> psi (B,), got {name}{signature}"
            ) from error


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def as_integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Return a Python int of what is one: numpy's integers too, and an integer tensor of one value."""
    if type(value) is not int and not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            value = operator.index(value)
    return check_integer(name, value, least, most)


def check_integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Return a Python int of an integer, numpy's too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    number = int(value)
    if least is not None and number < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if most is not None and number > most:
        raise ValueError(f"{name}: expected at most 2**{most.bit_length()} - 1, got {value}")
    return number


def check_number(name: str, value: Any) -> float:
    """Return a Python int or float of a number, numpy's too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return value if isinstance(value, (int, float)) else float(value)


def _check_tensor(name: str, value: Any, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
