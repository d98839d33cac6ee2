"""Why a sharded head must not be replicated, told to those who wrap it in DistributedDataParallel."""

from __future__ import annotations

from types import FrameType
from typing import Any

from torch import nn

DDP_MODULE = "torch.nn.parallel.distributed"


def refuse_ddp(head: nn.Module, caller: FrameType | None) -> None:
    """RuntimeError if `caller` is DistributedDataParallel, about to take in parameters of the head.

    DDP would take rank 0's classes for everybody's. It asks every submodule for its parameters, which is
    the only thing that it does to a head inside a larger module; a user who has it ignore them may go on.
    """
    while caller is not None and caller.f_globals.get("__name__") == DDP_MODULE:
        wrapper: Any = caller.f_locals.get("self")
        ignored = getattr(wrapper, "parameters_to_ignore", None)
        if ignored is not None and hasattr(wrapper, "module"):
            ours = {id(parameter) for parameter in head._parameters.values()}
            taken = [n for n, p in wrapper.module.named_parameters() if id(p) in ours and n not in ignored]
            if taken:
                raise RuntimeError(message(taken))
        caller = caller.f_back


def message(taken: list[str]) -> str:
    return (
        "DistributedDataParallel: expected a module without a sharded head, got one with "
        f"{', '.join(taken)}. Each rank holds classes of its own, which DDP would overwrite with rank 0's: "
        "wrap the backbone only, backbone = DistributedDataParallel(backbone), and call "
        "head(backbone(images), labels)"
    )
