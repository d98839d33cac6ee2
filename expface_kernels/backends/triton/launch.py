"""Allocation, grids and the order of launches. Nothing here reads a value from the device.

B rows, padded to B_pad · C classes that take part · D features, padded to D_pad
x (B, D) · w (C_all, D) · y (B,) int64 · G, H (B,) float64, gradients of log l and θ · eqs.: docs/math.md
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expface_kernels.backends.base import INVALID_TARGET, Forward, Request
from expface_kernels.backends.triton import kernels, row_kernels, tuning
from expface_kernels.backends.triton.plan import LARGEST_PLAIN_SCALE, Plan

LOG2_E = math.log2(math.e)
SEGMENT = 32  # rows of one label that one program adds up
ROW_ELEMENTS = 2048  # of a row kernel's block: 16 float64 a thread
# float16 has 5 bits of exponent: P' and the rows' operand are moved to where its precision is full.
HALF_P, HALF_OPERAND = 15, 14


class Rows(NamedTuple):
    """The batch as the products take it."""

    operand: Tensor  # (B_pad, D_pad) product dtype
    inv: Tensor  # (B_pad,) float64 1/max(|x|, eps) of the operand; NaN where the row is not finite
    labels: Tensor  # (B_pad,) int32


class Weights(NamedTuple):
    """How much each row weighs in the backward, (B_pad,) or (B,)."""

    log2_l: Tensor  # (B_pad,) float32, +inf where a row takes no part
    g: Tensor  # (B_pad,) float32, its share of dW's operand
    operand: Tensor  # (B_pad, D_pad) product dtype, xn·g
    coef: Tensor  # (2,) float32, from dW's product to dw
    row_factor: Tensor  # (B,) float64, from dX's product to Σ_j p_bj·wn_j


class Launcher:
    """One call's inputs, sizes and tiles."""

    def __init__(self, x: Tensor, w: Tensor, y: Tensor, subset: Tensor | None, request: Request) -> None:
        self.x, self.w, self.y, self.subset, self.request = x, w, y, subset, request
        self.classes = w.shape[0] if subset is None else subset.shape[0]
        self.features = w.shape[1]
        self.plan = Plan.of(x, w, self.classes, request)
        arch = tuning.architecture(x.device)
        precision = tuning.float32_precision(arch, torch.backends.cuda.matmul.allow_tf32)
        self.blocks = tuning.blocks(arch, self.features, self.plan.product, w.dtype, precision)
        widest = max(self.blocks.forward.bk, self.blocks.probability.bk, self.blocks.weight.bn)
        self.features_pad = -(-self.features // widest) * widest
        self.maxima = request.scale > LARGEST_PLAIN_SCALE
        self.z_scale = request.scale * LOG2_E
        # A kernel's argument for what it does not use.
        self.index = w if subset is None else subset

    # -- forward -------------------------------------------------------------------------------------------

    def forward(self) -> Forward:
        """The op's outputs, eqs. 2 to 4."""
        plan, request = self.plan, self.request
        workspace = self._empty(plan.numel if request.keep else self._scratch_numel())
        hardest = self._empty(plan.rows if request.find_hardest else 0, torch.float64)
        found = self._empty(plan.rows if request.find_hardest else 0, torch.int64)
        nothing = self._empty(0, torch.float64)
        if not (plan.rows and plan.classes):
            log_l = self.x.new_full((plan.rows,), -torch.inf, dtype=torch.float64)
            theta = torch.zeros_like(log_l)
            return Forward(log_l, theta, workspace, nothing, hardest.fill_(-torch.inf), found.fill_(-1))
        with self._device():
            rows = self._rows()
            log_l, best = self._negatives(rows, workspace)
            theta = self._angles()
        if best is not None:
            hardest, found = best
        if not request.keep:
            workspace = self._empty(0)
        return Forward(log_l, theta, workspace, nothing, hardest, found)

    def _scratch_numel(self) -> int:
        return self.plan.classes_pad * (2 if self.plan.shifted else 1)

    def _negatives(self, rows: Rows, workspace: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """log l (B,) float64, and the hardest negative's cosine and class if asked for."""
        plan, request = self.plan, self.request
        inv, shift, e = self._split(workspace)
        kept = 0 if self.maxima else min(plan.kept, e.shape[0])
        more = self.maxima or request.find_hardest
        parts = [(0, kept, True), (kept, plan.classes, False)]
        parts = [(start, stop, keep) for start, stop, keep in parts if start < stop]
        tiles = [self.blocks.forward_more if keep or more else self.blocks.forward for *_, keep in parts]
        counts = [_cdiv(stop - start, t.bn) for (start, stop, _), t in zip(parts, tiles, strict=True)]
        sums = self._empty((sum(counts), plan.rows_pad))
        maxima = self._empty((sum(counts), plan.rows_pad)) if more else sums
        args = self._empty((sum(counts), plan.rows_pad), torch.int32) if request.find_hardest else sums
        row_scale = (rows.inv * self.z_scale).float()
        first = 0
        for (start, stop, keep), tile, count in zip(parts, tiles, counts, strict=True):
            _launch(
                kernels.forward_tile,
                count * (plan.rows_pad // tile.bm),
                tile,
                p_x=rows.operand,
                p_row_scale=row_scale,
                p_y=rows.labels,
                p_inv=inv,
                p_shift=shift,
                p_sum=sums,
                p_max=maxima,
                p_arg=args,
                p_e=e if keep else sums,
                B_pad=plan.rows_pad,
                class_begin=start,
                class_end=stop,
                tile_begin=first,
                MAXIMA=self.maxima,
                HARDEST=request.find_hardest,
                KEEP=keep,
                INDEXED=self.subset is not None,
                **self._centres(),
                **self._product(),
            )
            first += count
        log_l = _combine(sums, maxima if self.maxima else None)[: plan.rows]
        if not request.find_hardest:
            return log_l, None
        return log_l, self._hardest(maxima, args, rows)

    def _hardest(self, maxima: Tensor, args: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        best, tile = maxima[:, : self.plan.rows].max(dim=0)
        found = args[:, : self.plan.rows].gather(0, tile[None])[0].long()
        named = found if self.subset is None else self.subset[found.clamp_min(0)]
        cos = torch.where(rows.inv[: self.plan.rows].isnan(), torch.nan, best.double() / self.z_scale)
        return cos, torch.where(found < 0, -1, named)

    def _angles(self) -> Tensor:
        """Target angles (B,) float64, radians (eq. 4)."""
        apart, together = self._empty(self.plan.rows, torch.float64), self._empty(self.plan.rows, torch.float64)
        self._launch_rows(row_kernels.pair_lengths, p_apart=apart, p_together=together, **self._pair())
        theta = torch.where(self.y >= 0, 2 * torch.atan2(apart, together), 0.0)
        return torch.where(self.y == INVALID_TARGET, torch.nan, theta)

    # -- backward ------------------------------------------------------------------------------------------

    def backward(
        self, log_l: Tensor, workspace: Tensor, g: Tensor, h: Tensor, need_dx: bool, need_dw: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dx, dw), eqs. 9 to 11, from G and H."""
        plan = self.plan
        dx = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device) if need_dx else None
        dw = None
        if need_dw:  # rows that are not in the subset keep their 0
            make = torch.zeros if self.subset is not None or not plan.rows else torch.empty
            dw = make(self.w.shape, dtype=self.w.dtype, device=self.w.device)
        if not (plan.rows and plan.classes):
            return (None if dx is None else dx.zero_()), dw
        with self._device():
            rows = self._rows()
            a = self.x.new_zeros(self.x.shape, dtype=torch.float64) if need_dx else None
            targets = self._tangents(h) if need_dw else None
            self._walk(rows, log_l, workspace, g, a, dw, targets)
            if dx is not None:
                self._launch_rows(
                    row_kernels.input_gradient,
                    p_h=h.contiguous(),
                    p_coef=self.request.scale * g,
                    p_a=a,
                    p_dx=dx,
                    **self._pair(),
                )
        return dx, dw

    def _walk(
        self,
        rows: Rows,
        log_l: Tensor,
        workspace: Tensor,
        g: Tensor,
        a: Tensor | None,
        dw: Tensor | None,
        targets: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Go over the classes: those kept, then those whose product is formed again."""
        plan = self.plan
        inv, shift, e = plan.split(workspace)
        kept = 0 if self.maxima else plan.kept
        # A row without negatives has log l = −inf and G = 0, a row of NaN no log l: any finite shift does.
        log2_l = torch.where(torch.isfinite(log_l), log_l, 0.0) * LOG2_E
        if kept:
            weights = self._kept_weights(rows, log2_l, g)
            col = self._empty((1, plan.chunk))
            for start, stop in plan.chunks(0, kept):
                if dw is not None:
                    self._kept_columns(e[start:], weights, inv[start:], col, stop - start)
                self._gradients(e[start:], col, start, stop, weights, inv, shift, a, dw, targets)
        if kept < plan.classes:
            weights = self._weights(rows, log2_l, g)
            tile = self.blocks.probability
            p = self._empty((plan.chunk, plan.rows_pad), plan.product)
            col = self._empty((plan.rows_pad // tile.bn, plan.chunk))
            for start, stop in plan.chunks(kept, plan.classes):
                self._probabilities(rows, weights, inv, shift, p, col, start, stop)
                self._gradients(p, col, start, stop, weights, inv, shift, a, dw, targets)

    def _weights(self, rows: Rows, log2_l: Tensor, g: Tensor) -> Weights:
        """For P': rows weigh G/max|G|, so that a loss scaled by 65536 changes nothing in the products."""
        plan = self.plan
        p_bits, operand_bits = (0, 0) if plan.over_norm else (HALF_P, HALF_OPERAND)
        live = g != 0
        stored = log2_l.float()
        # What rounding log2 l to float32 would do to the whole row.
        mend = torch.exp2(stored.double() - log2_l)
        largest = g.abs().amax()
        largest = torch.where(largest == 0, 1.0, largest)
        share = torch.where(live, g / largest * mend, 0.0) * 2.0**operand_bits
        coef = torch.stack([self.request.scale * largest, torch.full_like(largest, 0.5 ** (p_bits + operand_bits))])
        return Weights(
            self._padded(torch.where(live, stored - p_bits, torch.inf), torch.inf),
            self._padded(share.float(), 0.0),
            self._weighted_operand(rows, share),
            coef.float(),
            mend * 0.5**p_bits,
        )

    def _kept_weights(self, rows: Rows, log2_l: Tensor, g: Tensor) -> Weights:
        """For E: rows weigh G/l. One row's l may be e^70 and another's e^−70, so the common factor 2^k is
        chosen to leave room at both ends of float32."""
        live = g != 0
        log2_r = torch.log2(g.abs()) - log2_l
        largest = g.abs().amax()
        largest = torch.log2(torch.where(largest == 0, 1.0, largest))
        k = torch.minimum(30 - largest, 120 - log2_r.amax())
        share = torch.where(live, torch.sign(g) * torch.exp2(log2_r + k), 0.0)
        half = torch.floor(-k / 2)
        coef = torch.stack([self.request.scale * torch.exp2(-k - half), torch.exp2(half)])
        operand = self._weighted_operand(rows, share)
        nothing = self._empty(0)
        return Weights(nothing, self._padded(share.float(), 0.0), operand, coef.float(), torch.exp2(-log2_l))

    def _weighted_operand(self, rows: Rows, share: Tensor) -> Tensor:
        """xn·share (B_pad, D_pad); 0 where the share is, whatever the row holds."""
        factor = torch.where(share == 0, 0.0, share * rows.inv[: self.plan.rows])
        return (rows.operand.float() * self._padded(factor.float(), 0.0)[:, None]).to(self.plan.product)

    def _probabilities(
        self, rows: Rows, weights: Weights, inv: Tensor, shift: Tensor, p: Tensor, col: Tensor, start: int, stop: int
    ) -> None:
        plan, tile = self.plan, self.blocks.probability
        _launch(
            kernels.probability_tile,
            _cdiv(stop - start, tile.bm) * (plan.rows_pad // tile.bn),
            tile,
            p_x=rows.operand,
            p_row_scale=(rows.inv * self.z_scale).float(),
            p_y=rows.labels,
            p_log2_l=weights.log2_l,
            p_g=weights.g,
            p_inv=inv,
            p_shift=shift,
            p_p=p,
            p_col=col,
            B_pad=plan.rows_pad,
            class_begin=start,
            class_end=stop,
            chunk=plan.chunk,
            inv_scale=1 / self.z_scale,
            INDEXED=self.subset is not None,
            OVER_NORM=plan.over_norm,
            **self._centres(),
            **self._product(),
        )

    def _kept_columns(self, e: Tensor, weights: Weights, inv: Tensor, col: Tensor, classes: int) -> None:
        tile = tuning.KEPT_COLUMNS
        _launch(
            kernels.kept_columns,
            _cdiv(classes, tile.bm),
            tile,
            p_e=e,
            p_g=weights.g,
            p_inv=inv,
            p_col=col,
            B_pad=self.plan.rows_pad,
            classes=classes,
            inv_scale=1 / self.z_scale,
        )

    def _gradients(
        self,
        p: Tensor,
        col: Tensor,
        start: int,
        stop: int,
        weights: Weights,
        inv: Tensor,
        shift: Tensor,
        a: Tensor | None,
        dw: Tensor | None,
        targets: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Both products of classes start..stop: a += P'ᵀ·w, dw = P'·operand, finished."""
        plan, tile = self.plan, self.blocks.weight
        if a is not None:
            product = mm_f32(p[: stop - start, : plan.rows].T, self._chunk_of_w(start, stop, inv, shift))
            a.addcmul_(product, weights.row_factor[:, None])
        if dw is None or targets is None:
            return
        segment, tangents = targets
        _launch(
            kernels.weight_gradient_tile,
            _cdiv(stop - start, tile.bm) * (self.features_pad // tile.bn),
            tile,
            p_p=p,
            p_op=weights.operand,
            p_col=col,
            p_coef=weights.coef,
            p_inv=inv,
            p_shift=shift,
            p_segment=segment,
            p_tangents=tangents,
            p_dw=dw,
            B_pad=plan.rows_pad,
            class_begin=start,
            class_end=stop,
            chunk=col.shape[1],
            parts=col.shape[0],
            INDEXED=self.subset is not None,
            OVER_NORM=plan.over_norm,
            **self._centres(),
            **self._product(),
        )

    def _chunk_of_w(self, start: int, stop: int, inv: Tensor, shift: Tensor) -> Tensor:
        """Centres start..stop (n, D) as the library multiplies them: w itself, or a copy no larger than a chunk."""
        plan = self.plan
        if self.subset is None and plan.over_norm and self.w.dtype == plan.product:
            return self.w[start:stop]
        copy = self._empty((stop - start, self.features), plan.product)
        blocks = self._row_blocks()
        _launch(
            row_kernels.copy_centres,
            _cdiv(stop - start, blocks["BR"]),
            tuning.ROWS,
            p_w=self.w,
            p_index=self.index,
            p_inv=inv,
            p_shift=shift,
            p_out=copy,
            class_begin=start,
            classes=stop - start,
            stride_w=self.w.stride(0),
            stride_wd=self.w.stride(1),
            D=self.features,
            INDEXED=self.subset is not None,
            SHIFTED=plan.shifted,
            UNIT=not plan.over_norm,
            **blocks,
        )
        return copy

    def _tangents(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(row of the second, or −1, for each class (C + 1,) int32; Σ_{b: y_b=j} H_b·v_b/|w_j| (B, D) float32).

        Sorted segments: each label's sum stands at its first row in sorted order; no float atomics.
        """
        labels, order = torch.sort(self.y, stable=True)
        start, stop = (torch.searchsorted(labels, labels, right=right) for right in (False, True))
        position = torch.arange(self.plan.rows, device=self.y.device)
        leads = (position == start) & (labels >= 0)
        segment = torch.full((self.classes + 1,), -1, dtype=torch.int32, device=self.y.device)
        # Rows that lead nothing all write to the slot past the end, which nobody reads.
        segment.scatter_(0, torch.where(leads, labels, self.classes), position.int())
        pulls = self._empty((self.plan.rows, self.features))
        self._launch_rows(
            row_kernels.target_pulls, p_h=h.contiguous(), p_order=order, p_out=pulls, **self._pair()
        )
        step = 1
        while step < self.plan.rows:
            sums = torch.empty_like(pulls)
            self._launch_rows(
                row_kernels.segment_sums,
                p_in=pulls,
                p_out=sums,
                p_start=start,
                p_stop=stop,
                B=self.plan.rows,
                step=step,
                D=self.features,
                COUNT=SEGMENT,
            )
            pulls = sums
            step *= SEGMENT
        return segment, pulls

    # -- topk ----------------------------------------------------------------------------------------------

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest cosines (B, k) float32 and their classes; a chunk of cosines at a time."""
        plan, tile = self.plan, self.blocks.forward_more
        best = self._empty((plan.rows, 0))
        classes = self._empty((plan.rows, 0), torch.int64)
        if not plan.rows:
            return self._empty((0, k)), self._empty((0, k), torch.int64)
        with self._device():
            rows = self._rows()
            inv, shift, _ = self._split(self._empty(self._scratch_numel()))
            chunk = max(plan.chunk // 2 // tile.bn, 1) * tile.bn
            for start in range(0, plan.classes, chunk):
                stop = min(start + chunk, plan.classes)
                cos = self._empty((plan.rows, stop - start))
                centres = self._centres()
                del centres["p_index"]
                _launch(
                    kernels.cosine_tile,
                    _cdiv(stop - start, tile.bn) * (plan.rows_pad // tile.bm),
                    tile,
                    p_x=rows.operand,
                    p_row_scale=rows.inv.float(),
                    p_inv=inv,
                    p_shift=shift,
                    p_cos=cos,
                    B=plan.rows,
                    B_pad=plan.rows_pad,
                    class_begin=start,
                    class_end=stop,
                    chunk=stop - start,
                    **centres,
                    **self._product(),
                )
                found_cos, found = cos.topk(min(k, stop - start), dim=1)
                best, classes = torch.cat([best, found_cos], 1), torch.cat([classes, found + start], 1)
                best, order = best.topk(min(k, best.shape[1]), dim=1)
                classes = classes.gather(1, order)
        return best, classes

    # -- what launches share -------------------------------------------------------------------------------

    def _rows(self) -> Rows:
        """Cast and pad the batch; O(B·D)."""
        plan, product = self.plan, self.plan.product
        operand = self._empty((plan.rows_pad, self.features_pad), product)
        inv = self._empty(plan.rows_pad, torch.float64)
        shift = self._empty(plan.rows_pad)
        unit = product == torch.float32
        # A stored float16 is taken as it is; anything wider, scaled by a power of two, loses nothing.
        self._launch_operands(
            self.x, operand, inv, shift, plan.rows_pad,
            UNIT=unit, SHIFT=not unit and self.x.dtype != torch.float16, INDEXED=False, STORE=True, SIGNED=False,
        )  # fmt: skip
        labels = self._padded(self.y.int(), -1)
        return Rows(operand, inv, labels)

    def _split(self, workspace: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The workspace's inv, shift and e, with shifts and inverse norms filled in where they come first."""
        plan = self.plan
        if workspace.numel() == plan.numel:
            inv, shift, e = plan.split(workspace)
        else:
            inv, shift = workspace[: plan.classes_pad], workspace[plan.classes_pad :]
            e = self._empty((0, plan.rows_pad), plan.product)
        if plan.shifted:
            self._launch_operands(
                self.w, shift, inv, shift, plan.classes,
                UNIT=False, SHIFT=True, INDEXED=self.subset is not None, STORE=False, SIGNED=True,
            )  # fmt: skip
        return inv, shift, e

    def _launch_operands(
        self, v: Tensor, out: Tensor, inv: Tensor, shift: Tensor, rows_pad: int, **constants: bool
    ) -> None:
        blocks = self._row_blocks()
        _launch(
            row_kernels.row_operands,
            _cdiv(rows_pad, blocks["BR"]),
            tuning.ROWS,
            p_v=v,
            p_index=self.index,
            p_out=out,
            p_inv=inv,
            p_shift=shift,
            rows=self.classes if v is self.w else v.shape[0],
            rows_pad=rows_pad,
            stride=v.stride(0),
            stride_d=v.stride(1),
            D=self.features,
            D_PAD=self.features_pad,
            DTYPE=_triton_dtype(self.plan.product),
            **blocks,
            **constants,
        )

    def _launch_rows(self, kernel: Any, **arguments: Any) -> None:
        blocks = self._row_blocks()
        _launch(kernel, _cdiv(self.plan.rows, blocks["BR"]), tuning.ROWS, **arguments, **blocks)

    def _row_blocks(self) -> dict[str, int]:
        width = 1 << (self.features_pad - 1).bit_length()
        return {"BR": max(ROW_ELEMENTS // width, 1), "BD": width}

    def _pair(self) -> dict[str, Any]:
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

    def _centres(self) -> dict[str, Any]:
        return {
            "p_w": self.w,
            "p_index": self.index,
            "stride_w": self.w.stride(0),
            "stride_wd": self.w.stride(1),
        }

    def _product(self) -> dict[str, Any]:
        return {
            "D": self.features,
            "D_PAD": self.features_pad,
            "PRECISION": self.blocks.precision,
            "SHIFTED": self.plan.shifted,
        }

    def _empty(self, shape: int | tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def _padded(self, values: Tensor, filling: float) -> Tensor:
        """(B,) values as (B_pad,)."""
        return torch.nn.functional.pad(values, (0, self.plan.rows_pad - self.plan.rows), value=filling)

    @contextlib.contextmanager
    def _device(self) -> Iterator[None]:
        """Triton launches on the current device, which need not be the tensors'."""
        with torch.cuda.device(self.x.device) if self.x.is_cuda else contextlib.nullcontext():
            yield


def mm_f32(a: Tensor, b: Tensor) -> Tensor:
    """a·b in float32, accumulated in float32, whatever a and b are; 16-bit CPU products have no such mode."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _launch(kernel: Any, programs: int, tile: tuning.Tile, **arguments: Any) -> None:
    """Launch by keyword; a tile's blocks are passed on where the kernel has them."""
    names = kernel.arg_names
    sizes = {name: getattr(tile, name.lower()) for name in ("BM", "BN", "BK") if name in names}
    kernel[(programs,)](**arguments, **sizes, num_warps=tile.warps, num_stages=tile.stages)


def _combine(sums: Tensor, maxima: Tensor | None) -> Tensor:
    """log l (B_pad,) float64 from tiles (tiles, B_pad) (eq. 3); −inf where nothing was summed."""
    if maxima is None:
        return torch.log(sums.sum(0, dtype=torch.float64))
    highest = maxima.amax(0)
    highest = torch.where(highest == -torch.inf, 0.0, highest)
    total = (torch.exp2(maxima - highest) * sums).sum(0, dtype=torch.float64)
    return (torch.log2(total) + highest.double()) / LOG2_E


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
