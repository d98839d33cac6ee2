"""What every call of the op starts with: sizes, tiles, the batch as the products take it.

B rows, padded to B_pad · C classes that take part · D features, padded to D_pad
x (B, D) · w (C_all, D) · y (B,) int64. Nothing in this folder reads a value from the device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expface_kernels.backends.base import OpConfig
from expface_kernels.backends.triton import row_kernels, tuning
from expface_kernels.backends.triton.calls import launch
from expface_kernels.backends.triton.plan import LARGEST_PLAIN_SCALE, Plan

LOG2_E = math.log2(math.e)


class Rows(NamedTuple):
    """The batch as the products take it."""

    operand: Tensor  # (B_pad, D_pad) product dtype
    inv: Tensor  # (B_pad,) float64 1/max(|x|, eps) of the operand; NaN where the row is not finite
    labels: Tensor  # (B_pad,) int32


class Call:
    """One call of the op: its inputs, sizes and tiles, and what its launches share."""

    def __init__(
        self,
        x: Tensor,
        w: Tensor,
        y: Tensor,
        subset: Tensor | None,
        config: OpConfig,
        arch: str | None = None,
    ) -> None:
        # Kernels read labels and listed classes one after the other.
        y, subset = y.contiguous(), None if subset is None else subset.contiguous()
        self.x, self.w, self.y, self.subset, self.config = x, w, y, subset, config
        self.classes = w.shape[0] if subset is None else subset.shape[0]
        self.features = w.shape[1]
        self.plan = Plan.of(x, w, self.classes, config, indexed=subset is not None)
        self.arch = arch = arch or tuning.architecture(x.device)
        float32 = self.plan.product == torch.float32
        precision = tuning.float32_precision(arch) if float32 else "ieee"
        self.blocks = tuning.blocks(arch, self.features, self.plan.product, w.dtype, precision)
        b = self.blocks
        widest = max(b.forward.bk, b.forward_more.bk, b.probability.bk, b.weight.bn)
        self.features_pad = -(-self.features // widest) * widest
        self.maxima = config.scale > LARGEST_PLAIN_SCALE
        self.z_scale = config.scale * LOG2_E
        # A kernel's argument for what it does not use.
        self.index = w if subset is None else subset

    def scratch_numel(self) -> int:
        return self.plan.classes_pad * (2 if self.plan.shifted else 1)

    def rows(self) -> Rows:
        """Cast and pad the batch; O(B·D)."""
        plan, product = self.plan, self.plan.product
        operand = self.empty((plan.rows_pad, self.features_pad), product)
        inv = self.empty(plan.rows_pad, torch.float64)
        shift = self.empty(plan.rows_pad)
        unit = product == torch.float32
        scaled = not unit and self.x.dtype != torch.float16
        # A stored float16 is taken as it is; anything wider, scaled by a power of two, loses nothing.
        self.launch_operands(
            self.x, operand, inv, shift, plan.rows, plan.rows_pad,
            UNIT=unit, SHIFT=scaled, INDEXED=False, STORE=True, SIGNED=False, WIDE=True,
        )  # fmt: skip
        labels = self.padded(self.y.int(), -1)
        return Rows(operand, inv, labels)

    def split(self, workspace: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the workspace into inv, shift and e, and fill in the first two by a pass over the centres."""
        plan = self.plan
        if workspace.numel() == plan.numel:
            inv, shift, e = plan.split(workspace)
        else:
            inv, shift = workspace[: plan.classes_pad], workspace[plan.classes_pad :]
            e = self.empty((0, plan.rows_pad), plan.product)
        # float32 is as exact as a 16-bit product of the same length, and costs a GPU with few float64 units
        # nothing beside the memory it reads; a float32 product wants float64, a shift its range.
        wide = plan.product == torch.float32 or plan.shifted
        self.launch_operands(
            self.w, shift, inv, shift, plan.classes, plan.classes,
            UNIT=False, SHIFT=plan.shifted, INDEXED=self.subset is not None, STORE=False, SIGNED=True,
            WIDE=wide,
        )  # fmt: skip
        return inv, shift, e

    def launch_operands(
        self, v: Tensor, out: Tensor, inv: Tensor, shift: Tensor, rows: int, rows_pad: int, **constants: bool
    ) -> None:
        blocks = self.row_blocks()
        launch(
            row_kernels.row_operands,
            cdiv(rows_pad, blocks["BR"]),
            tuning.ROWS,
            p_v=v,
            p_index=self.index,
            p_out=out,
            p_inv=inv,
            p_shift=shift,
            rows=rows,
            rows_pad=rows_pad,
            stride=v.stride(0),
            stride_d=v.stride(1),
            D=self.features,
            D_PAD=self.features_pad,
            DTYPE=triton_dtype(self.plan.product),
            **blocks,
            **constants,
        )

    def launch_rows(self, kernel: Any, **arguments: Any) -> None:
        blocks = self.row_blocks()
        launch(kernel, cdiv(self.plan.rows, blocks["BR"]), tuning.ROWS, **arguments, **blocks)

    def row_blocks(self) -> dict[str, int]:
        width = 1 << (self.features_pad - 1).bit_length()
        return {"BR": max(tuning.row_elements(self.arch) // width, 1), "BD": width}

    def pair(self) -> dict[str, Any]:
        """Arguments of kernels that look at each row and its own centre."""
        return {
            "p_x": self.x,
            "p_w": self.w,
            "p_index": self.index,
            "p_y": self.y,
            "B": self.plan.rows,
            "stride_x": self.x.stride(0),
            "stride_xd": self.x.stride(1),
            "stride_w": self.w.stride(0),
            "stride_wd": self.w.stride(1),
            "D": self.features,
            "INDEXED": self.subset is not None,
        }

    def centres(self) -> dict[str, Any]:
        """Arguments of kernels that read stored centers."""
        return {"p_w": self.w, "stride_w": self.w.stride(0), "stride_wd": self.w.stride(1)}

    def listed_centres(self) -> dict[str, Any]:
        """The same for kernels that know lists of classes."""
        return {**self.centres(), "p_index": self.index, "INDEXED": self.subset is not None}

    def product(self) -> dict[str, Any]:
        return {
            "D": self.features,
            "D_PAD": self.features_pad,
            "PRECISION": self.blocks.precision,
            "SHIFTED": self.plan.shifted,
        }

    def empty(self, shape: int | tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def padded(self, values: Tensor, filling: float) -> Tensor:
        """(B,) values as (B_pad,)."""
        return torch.nn.functional.pad(values, (0, self.plan.rows_pad - self.plan.rows), value=filling)

    @contextlib.contextmanager
    def device(self) -> Iterator[None]:
        """Triton launches on the current device, which need not be the tensors'."""
        with torch.cuda.device(self.x.device) if self.x.is_cuda else contextlib.nullcontext():
            yield


def triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
