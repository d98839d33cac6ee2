"""`python -m bench --model GPU`: counts what a step costs there, ours beside the eager head. Nothing is run.

Ours is counted from its launches (expface_kernels.workshop.costs), the eager head from its operators,
run without data: an operator reads its inputs and writes its outputs, a view moves nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.cases import DTYPES, Case
from bench.peers import get
from bench.peers.heads import margin_loss, our_costs
from bench.records import BYTES, FLOPS, MOVED, ROOFLINE, Measurement
from expface_kernels.workshop import costs
from expface_kernels.workshop.traffic import PeakMemory, traffic

MODELED = ("bfloat16", "float16", "float32")


class Operators(TorchDispatchMode):
    """Notes each operator as a step: FLOPs of products, bytes. All bytes stand as read."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[costs.Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        flops = 0 if count is None else int(count(*args, **(kwargs or {}), out_val=out))
        dtype = out.dtype if flops else torch.float32
        self.steps.append(costs.Step(str(func), dtype, 1, flops, traffic(func, args, out)))
        return out


def eager_costs(case: Case, dtype: torch.dtype) -> costs.Costs:
    """Count the eager head's forward and backward with inputs, logits and gradients in `dtype`."""
    x = torch.empty(case.rows, case.features, dtype=dtype, device="meta", requires_grad=True)
    w = torch.empty(case.classes, case.features, dtype=dtype, device="meta", requires_grad=True)
    labels = torch.empty(case.rows, dtype=torch.int64, device="meta")
    memory, operators = PeakMemory(), Operators()
    with memory, operators:
        margin_loss(x, w, labels, case.margin_function(), case.scale, case.target_gradient).backward()
    return costs.Costs(tuple(operators.steps), memory.peak, w.nbytes)


def seconds(case: Case, workspace_bytes: int, card: str) -> float | None:
    """Return the roofline of ours on a card by its driver's name; None where its rates are not known."""
    name = next((name for name in costs.GPUS if name in card.lower()), None)
    if name is None:
        return None
    return our_costs(case, workspace_bytes, costs.GPUS[name].arch).milliseconds(costs.GPUS[name]) / 1e3


def model(case: Case, gpu: str, workspace_bytes: int) -> tuple[list[Measurement], str]:
    """Count both heads on a GPU of costs.GPUS: their sums as records, and the steps as a report.

    ValueError for an unknown GPU, or a dtype that the kernels do not take.
    """
    for argument, chosen, known in (("model", gpu, costs.GPUS), ("dtype", case.dtype, MODELED)):
        if chosen not in known:
            raise ValueError(f"{argument}: expected one of {list(known)}, got {chosen!r}")
    card = costs.GPUS[gpu]
    ours = our_costs(case, workspace_bytes, card.arch)
    eager = eager_costs(case, DTYPES[case.dtype])
    rows: list[Measurement] = []
    for name, found in ((f"ours@{workspace_bytes}", ours), ("eager", eager)):
        for what, value in (
            (FLOPS, found.flops),
            (MOVED, found.moved),
            (ROOFLINE, found.milliseconds(card) / 1e3),
            (BYTES, found.extra),
        ):
            rows.append(Measurement(what, name, get(name).label(case), case, (value,)))
    report = (
        f"B={case.rows:,}, C={case.classes:,}, D={case.features:,}, {case.dtype}, "
        f"workspace {workspace_bytes:,} bytes: a roofline, nothing is measured\n"
        f"{costs.report(ours, gpu)}\n{costs.sums(eager, gpu, f'eager head, on {gpu}')}"
    )
    return rows, report
