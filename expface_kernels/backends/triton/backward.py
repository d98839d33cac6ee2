"""The backward: which launches it makes, and in which order.

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


class RowFactors(NamedTuple):
    """How much each row counts in the backward, (B_pad,) or (B,)."""

    log2_l: Tensor  # (B_pad,) float32, +inf where a row takes no part
    g: Tensor  # (B_pad,) float32, its share of dW's operand
    operand: Tensor  # (B_pad, D_pad) product dtype, xn·g
    coef: Tensor  # (2,) float32, from dW's product to dw
    row_factor: Tensor  # (B,) float64, from dX's product to Σ_j p_bj·wn_j


class Norms(NamedTuple):
    """What belongs to the centers as the products take them, (classes_pad,) each."""

    inv: Tensor
    shift: Tensor


class Chunk(NamedTuple):
    """Classes start..stop, with what the two products of the gradients read of them."""

    start: int
    stop: int
    p: Tensor  # (n or more, B_pad) P' or cached exponentials
    col: Tensor  # (parts, chunk) Σ_b g_b·P'·cos


class ChunkOutputs(NamedTuple):
    """Where the gradients of a chunk go; None where one is not asked for."""

    a: Tensor | None  # (B, D) float64: Σ_j p_bj·wn_j of all chunks
    dw: Tensor | None
    segment: Tensor | None  # (C + 1,) int32: row of `tangents` for each class, or −1
    tangents: Tensor | None  # (B, D) float32


class BackwardCall(Call):
    """Eqs. 9 to 11 in launches."""

    @property
    def scatters(self) -> bool:
        """Whether dw's rows are all of w's, of which only the subset's are written."""
        return self.subset is not None and not self.config.sparse_grad

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
            targets = self._tangents(h) if need_dw else (None, None)
            self._walk(rows, log_l, workspace, g, ChunkOutputs(a, dw, *targets))
            if dx is not None:
                self.launch_rows(
                    row_kernels.input_gradient,
                    p_h=h.contiguous(),
                    p_coef=self.config.scale * g,
                    p_a=a,
                    p_dx=dx,
                    **self.pair(),
                )
        return dx, dw

    def _walk(self, rows: Rows, log_l: Tensor, workspace: Tensor, g: Tensor, out: ChunkOutputs) -> None:
        """Go over the classes: those with cached exponentials, then those whose product is formed again."""
        plan = self.plan
        inv, shift, e = plan.split(workspace)
        norms = Norms(inv, shift)
        kept = 0 if self.maxima else plan.kept
        # A row without negatives has log l = −inf and G = 0, a row of NaN no log l: any finite shift does.
        log2_l = torch.where(torch.isfinite(log_l), log_l, 0.0) * LOG2_E
        if kept:
            factors = self._cached_factors(rows, log2_l, g)
            col = self.empty((1, plan.chunk))
            part = self._part_of(out.a)
            for start, stop in plan.chunks(0, kept):
                chunk = Chunk(start, stop, e[start:], col)
                if out.dw is not None:
                    self._cached_columns(chunk, factors, norms)
                self._gradients(chunk, factors, norms, part, out)
            _add_part(out.a, part, factors)
        if kept < plan.classes:
            factors = self._factors(rows, log2_l, g)
            p = self.empty((plan.chunk, plan.rows_pad), plan.product)
            col = self.empty((plan.rows_pad // self.blocks.probability.bm, plan.chunk))
            part = self._part_of(out.a)
            for start, stop in plan.chunks(kept, plan.classes):
                chunk = Chunk(start, stop, p, col)
                self._probabilities(chunk, rows, factors, norms)
                self._gradients(chunk, factors, norms, part, out)
            _add_part(out.a, part, factors)

    def _part_of(self, a: Tensor | None) -> Tensor | None:
        """Return zeros (B, D) float32, to which the library's products of several chunks are added."""
        return None if a is None else self.x.new_zeros(a.shape, dtype=torch.float32)

    def _factors(self, rows: Rows, log2_l: Tensor, g: Tensor) -> RowFactors:
        """Weigh rows by G/max|G| for P', so that a loss scaled by 65536 changes nothing in the products."""
        plan = self.plan
        p_bits, operand_bits = (0, 0) if plan.over_norm else (HALF_P, HALF_OPERAND)
        live = g != 0
        stored = log2_l.float()
        # What rounding log2 l to float32 would do to the whole row.
        rounding_correction = torch.exp2(stored.double() - log2_l)
        largest = g.abs().amax()
        largest = torch.where(largest == 0, 1.0, largest)
        share = torch.where(live, g / largest * rounding_correction, 0.0) * 2.0**operand_bits
        coef = torch.stack(
            [self.config.scale * largest, torch.full_like(largest, 0.5 ** (p_bits + operand_bits))]
        )
        return RowFactors(
            self.padded(torch.where(live, stored - p_bits, torch.inf), torch.inf),
            self.padded(share.float(), 0.0),
            self._weighted_operand(rows, share),
            coef.float(),
            rounding_correction * 0.5**p_bits,
        )

    def _cached_factors(self, rows: Rows, log2_l: Tensor, g: Tensor) -> RowFactors:
        """Weigh rows by G/l for cached exponentials.

        One row's l may be e^70 and another's e^−70: a common factor 2^k leaves room at both ends of float32.
        """
        live = g != 0
        log2_r = torch.log2(g.abs()) - log2_l
        largest = g.abs().amax()
        largest = torch.log2(torch.where(largest == 0, 1.0, largest))
        k = torch.minimum(30 - largest, 120 - log2_r.amax())
        share = torch.where(live, torch.sign(g) * torch.exp2(log2_r + k), 0.0)
        half = torch.floor(-k / 2)
        coef = torch.stack([self.config.scale * torch.exp2(-k - half), torch.exp2(half)])
        operand = self._weighted_operand(rows, share)
        nothing = self.empty(0)
        return RowFactors(
            nothing, self.padded(share.float(), 0.0), operand, coef.float(), torch.exp2(-log2_l)
        )

    def _weighted_operand(self, rows: Rows, share: Tensor) -> Tensor:
        """Return xn·share (B_pad, D_pad); 0 where the share is, whatever the row holds."""
        factor = torch.where(share == 0, 0.0, share * rows.inv[: self.plan.rows])
        return (rows.operand * self.padded(factor.float(), 0.0)[:, None]).to(self.plan.product)

    def _probabilities(self, chunk: Chunk, rows: Rows, factors: RowFactors, norms: Norms) -> None:
        """Write P' of a chunk and its column sums."""
        plan, tile = self.plan, self.blocks.probability
        launch(
            kernels.probability_tile,
            cdiv(chunk.stop - chunk.start, tile.bn) * (plan.rows_pad // tile.bm),
            tile,
            p_x=rows.operand,
            p_row_scale=(rows.inv * self.z_scale).float(),
            p_y=rows.labels,
            p_log2_l=factors.log2_l,
            p_g=factors.g,
            p_inv=norms.inv,
            p_shift=norms.shift,
            p_p=chunk.p,
            p_col=chunk.col,
            B_pad=plan.rows_pad,
            class_begin=chunk.start,
            class_end=chunk.stop,
            chunk=plan.chunk,
            inv_scale=1 / self.z_scale,
            OVER_NORM=plan.over_norm,
            **self.listed_centres(),
            **self.product(),
        )

    def _cached_columns(self, chunk: Chunk, factors: RowFactors, norms: Norms) -> None:
        """Read a chunk's column sums off its cached exponentials."""
        tile = tuning.KEPT_COLUMNS
        launch(
            kernels.kept_columns,
            cdiv(chunk.stop - chunk.start, tile.bm),
            tile,
            p_e=chunk.p,
            p_g=factors.g,
            p_inv=norms.inv[chunk.start :],
            p_col=chunk.col,
            B_pad=self.plan.rows_pad,
            classes=chunk.stop - chunk.start,
            inv_scale=1 / self.z_scale,
        )

    def _gradients(
        self, chunk: Chunk, factors: RowFactors, norms: Norms, part: Tensor | None, out: ChunkOutputs
    ) -> None:
        """Form both products of a chunk: part += P'ᵀ·w, dw = P'·operand, finished."""
        plan, tile = self.plan, self.blocks.weight
        if part is not None:
            centres = self._chunk_of_w(chunk.start, chunk.stop, norms)
            add_mm_f32(part, chunk.p[: chunk.stop - chunk.start, : plan.rows].T, centres)
        if out.dw is None:
            return
        launch(
            kernels.weight_gradient_tile,
            cdiv(chunk.stop - chunk.start, tile.bm) * (self.features_pad // tile.bn),
            tile,
            p_p=chunk.p,
            p_op=factors.operand,
            p_col=chunk.col,
            p_coef=factors.coef,
            p_inv=norms.inv,
            p_shift=norms.shift,
            p_segment=out.segment,
            p_tangents=out.tangents,
            p_dw=out.dw,
            B_pad=plan.rows_pad,
            class_begin=chunk.start,
            class_end=chunk.stop,
            chunk=chunk.col.shape[1],
            parts=chunk.col.shape[0],
            SCATTERS=self.scatters,
            OVER_NORM=plan.over_norm,
            **self.listed_centres(),
            **self.product(),
        )

    def _chunk_of_w(self, start: int, stop: int, norms: Norms) -> Tensor:
        """Return centers start..stop (n, D) for the library's product: w itself, or a chunk's copy."""
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
            p_inv=norms.inv,
            p_shift=norms.shift,
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
        """Sum H_b·v_b/|w_j| over the rows b of each label j: (row of the sums or −1 (C + 1,), sums (B, D)).

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


def _add_part(a: Tensor | None, part: Tensor | None, factors: RowFactors) -> None:
    if a is not None and part is not None:
        a.addcmul_(part, factors.row_factor[:, None])
