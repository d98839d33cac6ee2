"""Gradients of which ranks hold parts: clipping by their norm, and a scaler that skips together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from expface_kernels.checks import check_process_group
from expface_kernels.distributed.group import Group


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    sharded: Iterable[Tensor] = (),
    process_group: Any = None,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale gradients in place so that their norm over all ranks is at most max_norm; the same on every rank.

    What `torch.nn.utils.clip_grad_norm_` does for one process, over backbone and head together:
    `clip_grad_norm_([*backbone.parameters(), *head.parameters()], 1.0)`.

    Args:
        parameters: those without a gradient are left out. A plain one counts as the same on every rank (as
            DDP keeps them), a DTensor with all its shards. Gradients may be sparse.
        max_norm: the largest norm left as it is, ≥ 0.
        norm_type: p > 0 of the p-norm, or inf.
        sharded: more parameters, plain tensors of which each rank of `process_group` holds rows of its own.
        process_group: of `sharded`.
        error_if_nonfinite: RuntimeError, on every rank, where the norm is NaN or Inf.

    Returns the norm before clipping, () float32 (float64 where a gradient is). One all_reduce for each group
    that holds shards. After a GradScaler: unscale_ first. TypeError, ValueError: of another argument, named
    with what was expected and what came.
    """
    norm_type, max_norm = _number("norm_type", norm_type), _number("max_norm", max_norm)
    if not norm_type > 0:
        raise ValueError(f"norm_type: expected a number above 0 or inf, got {norm_type}")
    if not max_norm >= 0:
        raise ValueError(f"max_norm: expected at least 0, got {max_norm}")
    plain, sharded = _tensors("parameters", parameters), _tensors("sharded", sharded)
    if sharded and process_group is None:
        raise ValueError("process_group: expected the group whose ranks hold `sharded`, got None")
    parts = [(_local(p.grad), _groups(p.grad)) for p in plain if p.grad is not None]
    # A rank may lack the gradient of its rows; it takes part in the sum all the same.
    parts += [(p.new_zeros(0) if p.grad is None else p.grad, (process_group,)) for p in sharded]
    norm = _total_norm(parts, norm_type, plain + sharded)
    if error_if_nonfinite and not bool(torch.isfinite(norm)):
        raise RuntimeError(f"clip_grad_norm_: the norm of order {norm_type} over all ranks is {norm.item()}")
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad, _ in parts:
        grad.mul_(factor.to(grad.device, grad.dtype))
    return norm


def _number(name: str, value: Any) -> float:
    """Of whatever is one: also a tensor or an array of one element, or "inf", as torch takes it."""
    try:
        if isinstance(value, str) and value != "inf":
            raise TypeError("text")
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}") from error


def _tensors(name: str, given: Any) -> list[Tensor]:
    """One tensor, or those of an iterable."""
    if isinstance(given, Tensor):
        return [given]
    if not isinstance(given, Iterable):
        hint = "; pass its parameters()" if isinstance(given, torch.nn.Module) else ""
        raise TypeError(
            f"{name}: expected a tensor or an iterable of tensors, got {type(given).__name__}{hint}"
        )
    tensors = list(given)
    for index, value in enumerate(tensors):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected tensors, got {type(value).__name__} at index {index}")
    return tensors


def _local(grad: Tensor) -> Tensor:
    """What this rank holds of it, in the same memory."""
    local: Tensor = grad.to_local() if hasattr(grad, "to_local") else grad
    return local


def _groups(grad: Tensor) -> tuple[Any, ...]:
    """The groups over which a DTensor's ranks hold different parts; none for a plain tensor."""
    if not hasattr(grad, "placements"):
        return ()
    sharded: Any = grad
    groups = []
    for dim, placement in enumerate(sharded.placements):
        if placement.is_partial():
            raise ValueError("parameters: expected gradients in Shard or Replicate, got one in Partial")
        if placement.is_shard():
            groups.append(sharded.device_mesh.get_group(dim))
    return tuple(groups)


def _total_norm(
    parts: list[tuple[Tensor, tuple[Any, ...]]], norm_type: float, parameters: list[Tensor]
) -> Tensor:
    """() over all parts: Σ|g|^p in float64, or the largest |g|, by set of groups, then over its ranks."""
    device = parameters[0].device if parameters else torch.device("cpu")
    wide = any(grad.dtype == torch.float64 for grad, _ in parts)
    largest = math.isinf(norm_type)
    by_groups: dict[tuple[Any, ...], list[Tensor]] = {}
    for grad, groups in parts:
        by_groups.setdefault(groups, []).append(_power(grad, norm_type).to(device))
    sums = []
    for groups, powers in by_groups.items():
        own = torch.stack(powers).amax() if largest else torch.stack(powers).sum()
        for group in groups:
            own = Group(group).largest(own) if largest else Group(group).sum(own)
        sums.append(own)
    if not sums:
        return torch.zeros((), device=device)
    total = torch.stack(sums)
    norm = total.amax() if largest else total.sum() ** (1 / norm_type)
    return norm.to(torch.float64 if wide else torch.float32)


def _power(grad: Tensor, norm_type: float) -> Tensor:
    """Σ|g|^p, or max |g|, () float64; one gradient's norm is taken in its own dtype, float32 at least."""
    values = grad.coalesce().values() if grad.is_sparse else grad
    if values.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=grad.device)
    dtype = torch.promote_types(values.dtype, torch.float32)
    norm = torch.linalg.vector_norm(values, norm_type, dtype=dtype).double()
    return norm if math.isinf(norm_type) else norm**norm_type


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` for a sharded head: an Inf or NaN on one rank skips the step on all of them.

    torch's own, and its ShardedGradScaler, refuse an optimizer that holds a DTensor beside plain parameters,
    as one over backbone and head does; this one takes both. With several optimizers each skips by its own
    gradients, as in torch: give both modules to one.

    Args:
        device: "cuda" or "cpu".
        process_group: the head's, `dist.group.WORLD` too; TypeError for None.
        others: of `torch.amp.GradScaler`.

    One all_reduce of one number in every `unscale_` (or `step`).
    """

    def __init__(self, device: str = "cuda", *, process_group: Any, **others: Any) -> None:
        super().__init__(device, **others)
        check_process_group(process_group)
        self.process_group = process_group

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """torch's, on what this rank holds of each gradient, then over all ranks."""
        groups = [
            {"params": [_local_parameter(p) for p in group["params"]]} for group in optimizer.param_groups
        ]
        local: Any = SimpleNamespace(param_groups=groups)
        found: dict[torch.device, Tensor] = super()._unscale_grads_(local, inv_scale, found_inf, allow_fp16)
        if not found:  # a rank may hold no gradient at all
            found = {found_inf.device: found_inf}
        anywhere = torch.stack([one.to(found_inf.device) for one in found.values()]).amax(0)
        anywhere = Group(self.process_group).largest(anywhere)
        return {device: one.copy_(anywhere) for device, one in found.items()}


def _local_parameter(parameter: Any) -> Tensor:
    """A parameter, or in a DTensor's place what this rank holds of it, with its gradient."""
    if parameter.grad is None or not hasattr(parameter.grad, "to_local"):
        found: Tensor = parameter
        return found
    local: Tensor = parameter.detach().to_local()
    local.grad = parameter.grad.to_local()
    return local
