"""The triton backend: fused kernels for GPUs. This file imports no Triton; the rest does, when first used.

    kernels.py, row_kernels.py   @triton.jit code: class tiles; rows and targets
    plan.py                      what a call computes in and holds
    launch.py                    what every call starts with; forward.py and backward.py the order of launches
    calls.py                     how a launch or a library product is made
    tuning.py, tuned.json        block sizes by architecture, D and dtypes: rules, and what was measured
    autotune.py, candidates.py   the tool that measures; audit.py, costs.py (over recording.py) need no GPU

With TRITON_INTERPRET=1 set before its first use it takes CPU tensors, for tests without a GPU.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from expface_kernels.backends.base import Forward, OpConfig
from expface_kernels.backends.triton.plan import LARGEST_PLAIN_SCALE, SMALLEST_KEPT_SCALE, Plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)
TOPK_CONFIG = OpConfig(scale=1.0, keep=False, workspace_bytes=0, find_hardest=False, product_dtype=None)


class TritonBackend:
    """CUDA and ROCm tensors in float32, bfloat16 and float16."""

    name = "triton"

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if not interpreted() and not torch.cuda.is_available():
            return "there is no GPU: torch.cuda.is_available() is False"
        return None

    def why_not(self, x: Tensor, w: Tensor) -> str | None:
        expected = "cpu" if interpreted() else "cuda"
        if x.device.type != expected:
            return f"it takes {expected} tensors, got {x.device.type}"
        for dtype in (x.dtype, w.dtype):
            if dtype not in DTYPES:
                return f"it takes float32, bfloat16 and float16, got {dtype}"
        if max(w.shape[0], x.shape[0]) >= 2**31 - 2**16:
            return f"it takes fewer than 2^31 rows and centres, got {x.shape[0]} and {w.shape[0]}"
        if expected == "cuda" and not torch.version.hip:
            capability = torch.cuda.get_device_capability(x.device)
            if capability < LEAST_CAPABILITY:
                return f"it needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
        return None

    def workspace_numel(self, x: Tensor, w: Tensor, classes: int, config: OpConfig) -> int:
        return Plan.of(x, w, classes, config).numel

    def effective_workspace_bytes(self, workspace_bytes: int, scale: float) -> int:
        # Exponentials are kept without a shift, which larger scales have no range for. At smaller ones all
        # are near 1, and the cosines that dW reads off them would have few digits.
        return workspace_bytes if SMALLEST_KEPT_SCALE <= scale <= LARGEST_PLAIN_SCALE else 0

    def forward(
        self, x: Tensor, w: Tensor, y: Tensor, class_subset: Tensor | None, config: OpConfig
    ) -> Forward:
        """Eqs. 2 to 4. Peak extra memory: the workspace + 4 bytes · B · classes / 128 at most + O(B·D).

        For s > 70 twice those sums, with the hardest negative three times.
        """
        from expface_kernels.backends.triton.forward import ForwardCall

        return ForwardCall(x, w, y, class_subset, config).forward()

    def backward(
        self,
        x: Tensor,
        w: Tensor,
        y: Tensor,
        class_subset: Tensor | None,
        log_l: Tensor,
        workspace: Tensor,
        g_log_l: Tensor,
        g_theta: Tensor,
        config: OpConfig,
        need_dx: bool,
        need_dw: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Eqs. 9 to 11. Peak extra memory beside dw: a chunk of P' (256 MiB), 4 bytes a class, O(B·D).

        Where centres are copied for dX (listed, cast by autocast, float16) the copy is part of the 256 MiB.
        """
        from expface_kernels.backends.triton.backward import BackwardCall

        call = BackwardCall(x, w, y, class_subset, config)
        return call.backward(log_l, workspace, g_log_l, g_theta, need_dx, need_dw)

    def topk(self, x: Tensor, w: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Streamed over chunks of classes; peak extra memory: two chunks of cosines + O(B·(k + D))."""
        from expface_kernels.backends.triton.forward import ForwardCall

        y = torch.full((x.shape[0],), -1, dtype=torch.int64, device=x.device)
        return ForwardCall(x, w, y, None, TOPK_CONFIG).topk(k)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
