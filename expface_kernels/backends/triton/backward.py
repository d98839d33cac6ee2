"""The backward: order of launches.

B rows, padded to B_pad · C classes that take part · D features, padded to D_pad
G, H (B,) float64, gradients of log l and θ · P' eq. 9 · E kept exponentials · eqs.: docs/math.md
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from expface_kernels.backends.triton import kernels, row_kernels, tuning
from expface_kernels.backends.triton.calls import add_mm_f32, launch
from expface_kernels.backends.triton.launch import LOG2_E, Call, Rows, cdiv

SEGMENT = 32  # rows of one label that one program adds up
# float16 has 5 bits of exponent: P' and the rows' operand are moved to where its precision is full.
HALF_P, HALF_OPERAND = 15, 14


class Weights(NamedTuple):
    """How much each row weighs in the backward, (B_pad,) or (B,)."""

    log2_l: Tensor  # (B_pad,) float32, +inf where a row takes no part
    g: Tensor  # (B_pad,) float32, its share of dW's operand
    operand: Tensor  # (B_pad, D_pad) product dtype, xn·g
    coef: Tensor  # (2,) float32, from dW's product to dw
    row_factor: Tensor  # (B,) float64, from dX's product to Σ_j p_bj·wn_j


class BackwardCall(Call):
    """Eqs. 9 to 11 in launches."""

    @property
    def scatters(self) -> bool:
        """Whether dw's rows are all of w's, of which only the subset's are written."""
        return self.subset is not None and not self.request.sparse_grad

    def backward(
        self, log_l: Tensor, workspace: Tensor, g: Tensor, h: Tensor, need_dx: bool, need_dw: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dx, dw), eqs. 9 to 11, from G and H."""
        plan = self.plan
        dx = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device) if need_dx else None
        dw = None
        if need_dw:  # rows that are not in the subset keep their 0
            make = torch.zeros if self.scatters or not plan.rows else torch.empty
            classes = self.w.shape[0] if self.scatters else plan.classes
            dw = make((classes, self.features), dtype=self.w.dtype, device=self.w.device)
        if not (plan.rows and plan.classes):
            return (None if dx is None else dx.zero_()), dw
        with self.device():
            rows = self.rows()
            a = self.x.new_zeros(self.x.shape, dtype=torch.float64) if need_dx else None
            targets = self._tangents(h) if need_dw else None
            self._walk(rows, log_l, workspace, g, a, dw, targets)
            if dx is not None:
                self.launch_rows(
                    row_kernels.input_gradient,
                    p_h=h.contiguous(),
                    p_coef=self.request.scale * g,
                    p_a=a,
                    p_dx=dx,
                    **self.pair(),
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
            col = self.empty((1, plan.chunk))
            part = self._part_of(a)
            for start, stop in plan.chunks(0, kept):
                if dw is not None:
                    self._kept_columns(e[start:], weights, inv[start:], col, stop - start)
                self._gradients(e[start:], col, start, stop, weights, inv, shift, part, dw, targets)
            _add_part(a, part, weights)
        if kept < plan.classes:
            weights = self._weights(rows, log2_l, g)
            tile = self.blocks.probability
            p = self.empty((plan.chunk, plan.rows_pad), plan.product)
            col = self.empty((plan.rows_pad // tile.bm, plan.chunk))
            part = self._part_of(a)
            for start, stop in plan.chunks(kept, plan.classes):
                self._probabilities(rows, weights, inv, shift, p, col, start, stop)
                self._gradients(p, col, start, stop, weights, inv, shift, part, dw, targets)
            _add_part(a, part, weights)

    def _part_of(self, a: Tensor | None) -> Tensor | None:
        """Zeros (B, D) float32, to which the library's products of several chunks are added."""
        return None if a is None else self.x.new_zeros(a.shape, dtype=torch.float32)

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
        coef = torch.stack(
            [self.request.scale * largest, torch.full_like(largest, 0.5 ** (p_bits + operand_bits))]
        )
        return Weights(
            self.padded(torch.where(live, stored - p_bits, torch.inf), torch.inf),
            self.padded(share.float(), 0.0),
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
        nothing = self.empty(0)
        return Weights(nothing, self.padded(share.float(), 0.0), operand, coef.float(), torch.exp2(-log2_l))

    def _weighted_operand(self, rows: Rows, share: Tensor) -> Tensor:
        """xn·share (B_pad, D_pad); 0 where the share is, whatever the row holds."""
        factor = torch.where(share == 0, 0.0, share * rows.inv[: self.plan.rows])
        return (rows.operand * self.padded(factor.float(), 0.0)[:, None]).to(self.plan.product)

    def _probabilities(
        self,
        rows: Rows,
        weights: Weights,
        inv: Tensor,
        shift: Tensor,
        p: Tensor,
        col: Tensor,
        start: int,
        stop: int,
    ) -> None:
        plan, tile = self.plan, self.blocks.probability
        launch(
            kernels.probability_tile,
            cdiv(stop - start, tile.bn) * (plan.rows_pad // tile.bm),
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
            **self.centres(),
            **self.product(),
        )

    def _kept_columns(self, e: Tensor, weights: Weights, inv: Tensor, col: Tensor, classes: int) -> None:
        tile = tuning.KEPT_COLUMNS
        launch(
            kernels.kept_columns,
            cdiv(classes, tile.bm),
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
        part: Tensor | None,
        dw: Tensor | None,
        targets: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Both products of classes start..stop: part += P'ᵀ·w, dw = P'·operand, finished."""
        plan, tile = self.plan, self.blocks.weight
        if part is not None:
            centres = self._chunk_of_w(start, stop, inv, shift)
            add_mm_f32(part, p[: stop - start, : plan.rows].T, centres)
        if dw is None or targets is None:
            return
        segment, tangents = targets
        launch(
            kernels.weight_gradient_tile,
            cdiv(stop - start, tile.bm) * (self.features_pad // tile.bn),
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
            SCATTERS=self.scatters,
            OVER_NORM=plan.over_norm,
            **self.centres(),
            **self.product(),
        )

    def _chunk_of_w(self, start: int, stop: int, inv: Tensor, shift: Tensor) -> Tensor:
        """Centres start..stop (n, D) for the library's product: w itself, or a chunk's copy."""
        plan = self.plan
        if not plan.copied:
            return self.w[start:stop]
        copy = self.empty((stop - start, self.features), plan.product)
        blocks = self.row_blocks()
        launch(
            row_kernels.copy_centres,
            cdiv(stop - start, blocks["BR"]),
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
        """Σ_{b: y_b=j} H_b·v_b/|w_j| as (row of the second for each class, or −1, (C + 1,); sums (B, D)).

        Sorted segments: each label's sum stands at its first row in sorted order; no float atomics.
        """
        labels, order = torch.sort(self.y, stable=True)
        start, stop = (torch.searchsorted(labels, labels, right=right) for right in (False, True))
        position = torch.arange(self.plan.rows, device=self.y.device)
        leads = (position == start) & (labels >= 0)
        segment = torch.full((self.classes + 1,), -1, dtype=torch.int32, device=self.y.device)
        # Rows that lead nothing all write to the slot past the end, which nobody reads.
        segment.scatter_(0, torch.where(leads, labels, self.classes), position.int())
        pulls = self.empty((self.plan.rows, self.features))
        self.launch_rows(
            row_kernels.target_pulls, p_h=h.contiguous(), p_order=order, p_out=pulls, **self.pair()
        )
        step = 1
        while step < self.plan.rows:
            sums = torch.empty_like(pulls)
            self.launch_rows(
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


def _add_part(a: Tensor | None, part: Tensor | None, weights: Weights) -> None:
    if a is not None and part is not None:
        a.addcmul_(part, weights.row_factor[:, None])
