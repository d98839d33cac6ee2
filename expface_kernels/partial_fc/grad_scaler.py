"""A gradient scaler whose ranks skip a step together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from expface_kernels.partial_fc import comm


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
        self.process_group = comm.Ranks(process_group).group

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """torch's, on what this rank holds of each gradient, then over all ranks."""
        groups = [{"params": [_local(p) for p in group["params"]]} for group in optimizer.param_groups]
        local: Any = SimpleNamespace(param_groups=groups)
        found: dict[torch.device, Tensor] = super()._unscale_grads_(local, inv_scale, found_inf, allow_fp16)
        if not found:  # a rank may hold no gradient at all
            found = {found_inf.device: found_inf}
        anywhere = torch.stack([one.to(found_inf.device) for one in found.values()]).amax(0)
        comm.all_reduce(anywhere, True, self.process_group)
        return {device: one.copy_(anywhere) for device, one in found.items()}


def _local(parameter: Any) -> Tensor:
    """A parameter, or in a DTensor's place what this rank holds of it, with its gradient."""
    if parameter.grad is None or not hasattr(parameter.grad, "to_local"):
        found: Tensor = parameter
        return found
    local: Tensor = parameter.detach().to_local()
    local.grad = parameter.grad.to_local()
    return local
