"""The forward and topk: which launches they make, and in which order.

B rows, padded to B_pad · C classes that take part · D features, padded to D_pad
tiles: of classes, each leaving a sum (and a maximum) per row · eqs.: docs/math.md
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from expface_kernels.backends.base import INVALID_TARGET, Forward
from expface_kernels.backends.triton import kernels, row_kernels
from expface_kernels.backends.triton.calls import launch
from expface_kernels.backends.triton.launch import LOG2_E, Call, Rows, cdiv
from expface_kernels.backends.triton.tuning import Tile

SUMMED = 16
"""Tiles whose sums, of at most 256 classes each, are added in float32."""


class Span(NamedTuple):
    """Consecutive classes that one launch goes over."""

    start: int
    stop: int
    keep: bool
    """Whether their exponentials go into the workspace."""
    tile: Tile
    first_tile: int
    """Where the sums of their tiles begin."""

    @property
    def tiles(self) -> int:
        return cdiv(self.stop - self.start, self.tile.bn)


class ForwardCall(Call):
    """Launches the forward (eqs. 2 to 4) and the search for the nearest centers."""

    def forward(self) -> Forward:
        """Return the op's outputs."""
        plan, config = self.plan, self.config
        workspace = self.empty(plan.numel if config.keep else self.scratch_numel())
        hardest = self.empty(plan.rows if config.find_hardest else 0, torch.float64)
        found = self.empty(plan.rows if config.find_hardest else 0, torch.int64)
        nothing = self.empty(0, torch.float64)
        if not (plan.rows and plan.classes):
            log_l = self.x.new_full((plan.rows,), -torch.inf, dtype=torch.float64)
            theta = torch.zeros_like(log_l)
            return Forward(log_l, theta, workspace, nothing, hardest.fill_(-torch.inf), found.fill_(-1))
        with self.device():
            rows = self.rows()
            log_l, best = self._negatives(rows, workspace)
            theta = self._angles()
        if best is not None:
            hardest, found = best
        if not config.keep:
            workspace = self.empty(0)
        return Forward(log_l, theta, workspace, nothing, hardest, found)

    def _negatives(self, rows: Rows, workspace: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return log l (B,) float64, and the hardest negative's cosine and class if asked for."""
        plan, find_hardest = self.plan, self.config.find_hardest
        inv, shift, e = self.split(workspace)
        spans = self._spans(0 if self.maxima else min(plan.kept, e.shape[0]))
        tiles = sum(span.tiles for span in spans)
        more = self.maxima or find_hardest
        sums = self.empty((tiles, plan.rows_pad))
        maxima = self.empty((tiles, plan.rows_pad)) if more else sums
        args = self.empty((tiles, plan.rows_pad), torch.int32) if find_hardest else sums
        row_scale = (rows.inv * self.z_scale).float()
        for span in spans:
            launch(
                kernels.forward_tile,
                span.tiles * (plan.rows_pad // span.tile.bm),
                span.tile,
                p_x=rows.operand,
                p_row_scale=row_scale,
                p_y=rows.labels,
                p_inv=inv,
                p_shift=shift,
                p_sum=sums,
                p_max=maxima,
                p_arg=args,
                p_e=e if span.keep else sums,
                B_pad=plan.rows_pad,
                class_begin=span.start,
                class_end=span.stop,
                tile_begin=span.first_tile,
                MAXIMA=self.maxima,
                HARDEST=find_hardest,
                KEEP=span.keep,
                **self.listed_centres(),
                **self.product(),
            )
        best = self._hardest(maxima, args, rows) if find_hardest else None
        return _combine(sums, maxima if self.maxima else None)[: plan.rows], best

    def _spans(self, kept: int) -> list[Span]:
        """Split the classes into those whose exponentials are kept and the rest."""
        plain = not (self.maxima or self.config.find_hardest)
        spans: list[Span] = []
        for start, stop, keep in ((0, kept, True), (kept, self.plan.classes, False)):
            if start < stop:
                tile = self.blocks.forward if plain and not keep else self.blocks.forward_more
                spans.append(Span(start, stop, keep, tile, sum(span.tiles for span in spans)))
        return spans

    def _hardest(self, maxima: Tensor, args: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        best, tile = maxima[:, : self.plan.rows].max(dim=0)
        found = args[:, : self.plan.rows].gather(0, tile[None])[0].long()
        named = found if self.subset is None else self.subset[found.clamp_min(0)]
        cos = torch.where(rows.inv[: self.plan.rows].isnan(), torch.nan, best.double() / self.z_scale)
        return cos, torch.where(found < 0, -1, named)

    def _angles(self) -> Tensor:
        """Return the target angles (B,) float64, radians (eq. 4)."""
        apart, together = self.empty(self.plan.rows, torch.float64), self.empty(self.plan.rows, torch.float64)
        self.launch_rows(row_kernels.pair_lengths, p_apart=apart, p_together=together, **self.pair())
        theta = torch.where(self.y >= 0, 2 * torch.atan2(apart, together), 0.0)
        return torch.where(self.y == INVALID_TARGET, torch.nan, theta)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest cosines (B, k) float32 and their classes; a chunk of cosines at a time."""
        plan, tile = self.plan, self.blocks.forward_more
        best = self.empty((plan.rows, 0))
        classes = self.empty((plan.rows, 0), torch.int64)
        if not plan.rows:
            return self.empty((0, k)), self.empty((0, k), torch.int64)
        with self.device():
            rows = self.rows()
            inv, shift, _ = self.split(self.empty(self.scratch_numel()))
            chunk = max(plan.chunk // 8 // tile.bn, 1) * tile.bn  # float32, two alive at once
            for start in range(0, plan.classes, chunk):
                stop = min(start + chunk, plan.classes)
                cos = self.empty((plan.rows, stop - start))
                launch(
                    kernels.cosine_tile,
                    cdiv(stop - start, tile.bn) * (plan.rows_pad // tile.bm),
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
                    **self.centres(),
                    **self.product(),
                )
                found_cos, found = cos.topk(min(k, stop - start), dim=1)
                best, classes = torch.cat([best, found_cos], 1), torch.cat([classes, found + start], 1)
                best, order = best.topk(min(k, best.shape[1]), dim=1)
                classes = classes.gather(1, order)
        return best, classes


def _combine(sums: Tensor, maxima: Tensor | None) -> Tensor:
    """Combine tiles (tiles, B_pad) to log l (B_pad,) float64 (eq. 3); −inf where nothing was summed.

    It works in the memory of the tiles, whose values are lost.
    """
    if maxima is None:
        return torch.log(_total(sums))
    highest = maxima.amax(0)
    highest = torch.where(highest == -torch.inf, 0.0, highest)
    total = _total(maxima.sub_(highest).exp2_().mul_(sums))
    return (torch.log2(total) + highest.double()) / LOG2_E


def _total(sums: Tensor) -> Tensor:
    """Add up tiles (tiles, B_pad) float32 to (B_pad,) float64, SUMMED of them in float32 first.

    torch's own sum in float64 would begin with a float64 copy of all tiles.
    """
    groups = sums.shape[0] // SUMMED
    whole = sums[: groups * SUMMED].view(groups, SUMMED, sums.shape[1]).sum(1)
    return whole.double().sum(0) + sums[groups * SUMMED :].double().sum(0)
