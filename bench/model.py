"""`python -m bench --model GPU`: a step's cost there, ours beside the eager head's. Counted, not measured.

Ours is counted from its launches (expface_kernels.workshop.costs), the eager head from its operators,
run without data: an operator reads its inputs and writes its outputs, a view moves nothing.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench import machine
from bench.cases import Case
from bench.peers.eager import margin_loss
from expface_kernels.workshop import costs
from expface_kernels.workshop.recording import Case as Launches
from expface_kernels.workshop.traffic import PeakMemory, traffic

DTYPES = ("bfloat16", "float16", "float32")
KIND, SCHEMA = "model", 1
"""What the JSON says it is, and the version of its fields."""


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
    """The eager head's forward and backward with inputs, logits and gradients in `dtype`."""
    x = torch.empty(case.rows, case.features, dtype=dtype, device="meta", requires_grad=True)
    w = torch.empty(case.classes, case.features, dtype=dtype, device="meta", requires_grad=True)
    labels = torch.empty(case.rows, dtype=torch.int64, device="meta")
    memory, operators = PeakMemory(), Operators()
    with memory, operators:
        margin_loss(x, w, labels, case.margin_function(), case.scale, case.target_gradient).backward()
    return costs.Costs(tuple(operators.steps), memory.peak, w.nbytes)


@dataclass(frozen=True)
class Model:
    """A step of ours and of the eager head on a GPU (of costs.GPUS), as far as can be counted."""

    case: Case
    gpu: str
    workspace_bytes: int
    command: str
    ours: costs.Costs
    eager: costs.Costs

    @classmethod
    def of(cls, case: Case, gpu: str, workspace_bytes: int, command: str) -> Model:
        """ValueError for an unknown GPU, or a dtype that the kernels do not take."""
        for name, value, known in (("model", gpu, costs.GPUS), ("dtype", case.dtype, DTYPES)):
            if value not in known:
                raise ValueError(f"{name}: expected one of {list(known)}, got {value!r}")
        wide = getattr(torch, case.dtype)
        launches = Launches(
            case.rows, case.classes, case.features, wide, wide, case.scale, workspace_bytes=workspace_bytes
        )
        ours = costs.costs(launches, costs.GPUS[gpu].arch)
        return cls(case, gpu, workspace_bytes, command, ours, eager_costs(case, wide))

    def report(self) -> str:
        """Steps of ours, then the eager head's sums."""
        case = self.case
        return "\n".join(
            [
                f"B={case.rows:,}, C={case.classes:,}, D={case.features:,}, {case.dtype}, "
                f"workspace {self.workspace_bytes:,} bytes: a roofline, nothing is measured",
                costs.report(self.ours, self.gpu),
                costs.sums(self.eager, self.gpu, f"eager head, on {self.gpu}"),
            ]
        )

    def to_json(self) -> str:
        """Sums of both heads: FLOPs, bytes moved, milliseconds, peak bytes beside dw."""
        gpu = costs.GPUS[self.gpu]
        sums = {
            name: {
                "flops": found.flops,
                "moved_bytes": found.moved,
                "milliseconds": found.milliseconds(gpu),
                "extra_bytes": found.extra,
            }
            for name, found in (("ours", self.ours), ("eager", self.eager))
        }
        data = {
            "kind": KIND,
            "schema": SCHEMA,
            "gpu": self.gpu,
            "rates": dataclasses.asdict(gpu),
            "case": dataclasses.asdict(self.case),
            "workspace_bytes": self.workspace_bytes,
            **sums,
            "commit": machine.commit(),
            "command": self.command,
        }
        return json.dumps(data, indent=1) + "\n"
