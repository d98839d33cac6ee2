"""The cpu backend: Python walks tiles of classes, a library multiplies, C++ does the rest in one pass each.

Never more than a tile of the logits is there at once, plus what `workspace_bytes` lets the forward keep
of their exponentials. float32 and float64 compute; 16-bit inputs are widened tile by tile, so autocast
changes nothing here.

B rows · C classes that take part · D features · T classes of a tile
x (B, D) · w (C_all, D) · y (B,) · xn (B, D) unit rows · dots, e (T, B) class-major · eqs.: docs/math.md
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from expface_kernels.backends import products
from expface_kernels.backends import workspace as pool
from expface_kernels.backends.base import Forward, OpConfig, TargetGeometry, compute_dtype, norms_and_units
from expface_kernels.backends.native import Kernels, load_error
from expface_kernels.reference import NORM_EPS

LOG2_E = math.log2(math.e)
TILE_CLASSES = (1024, 32768)


@dataclass(frozen=True)
class TilePlan:
    """Says how C classes are cut into tiles of T, and how many of them the forward keeps."""

    batch: int
    classes: int
    tile: int
    kept: int
    """Classes whose exponentials stay in the workspace: the first ones, whole tiles or all."""

    @classmethod
    def of(cls, batch: int, features: int, classes: int, dtype: torch.dtype, config: OpConfig) -> TilePlan:
        smallest, largest = TILE_CLASSES
        tile = max(smallest, min(largest, products.of(dtype).tile(batch, features)))
        kept = 0
        if config.keep:
            kept = config.workspace_bytes // (max(batch, 1) * dtype.itemsize)
            kept = classes if kept >= classes else kept // tile * tile
        return cls(batch, classes, tile, kept)

    @property
    def kept_tiles(self) -> int:
        return -(-self.kept // self.tile)

    @property
    def numel(self) -> int:
        """Count the workspace's elements: exponentials, their tiles' maxima, their classes' inverse norms."""
        return self.kept * self.batch + self.kept_tiles * self.batch + self.kept

    def split(self, workspace: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the workspace into e (kept, B), tile_max (kept_tiles, B), inv (kept,)."""
        sizes = [self.kept * self.batch, self.kept_tiles * self.batch, self.kept]
        e, tile_max, inv = workspace.split(sizes)
        return e.view(self.kept, self.batch), tile_max.view(self.kept_tiles, self.batch), inv

    def tiles(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.classes, self.tile):
            yield start, min(start + self.tile, self.classes)


class Centres:
    """Yields tiles of w as contiguous (T, D) matrices of the compute dtype, copied only where needed."""

    def __init__(self, w: Tensor, class_subset: Tensor | None, dtype: torch.dtype, tile: int) -> None:
        self.w = w
        self.class_subset = class_subset
        self.dtype = dtype
        self.direct = class_subset is None and w.dtype == dtype and w.is_contiguous()
        self.classes = w.shape[0] if class_subset is None else class_subset.shape[0]
        rows = 0 if self.direct else min(tile, self.classes)
        self._buffer = pool.allocate(rows * w.shape[1], dtype).view(rows, w.shape[1])

    def tile(self, start: int, stop: int) -> Tensor:
        if self.direct:
            return self.w[start:stop]
        buffer = self._buffer[: stop - start]
        if self.class_subset is None:
            return buffer.copy_(self.w[start:stop])
        chosen = self.class_subset[start:stop]
        if self.w.dtype == self.dtype:
            return torch.index_select(self.w, 0, chosen, out=buffer)
        return buffer.copy_(self.w[chosen])


class CpuBackend:
    """Serves tensors on the CPU in float64, float32, bfloat16 and float16."""

    name = "cpu"

    def unavailable(self) -> str | None:
        return load_error()

    def why_not(self, x: Tensor, w: Tensor) -> str | None:
        return None if x.device.type == "cpu" else f"it takes CPU tensors, got {x.device.type}"

    def workspace_numel(self, x: Tensor, w: Tensor, classes: int, config: OpConfig) -> int:
        return TilePlan.of(x.shape[0], x.shape[1], classes, compute_dtype(x, w), config).numel

    def effective_workspace_bytes(self, workspace_bytes: int, scale: float) -> int:
        return workspace_bytes

    def forward(
        self, x: Tensor, w: Tensor, y: Tensor, class_subset: Tensor | None, config: OpConfig
    ) -> Forward:
        """Compute eqs. 2 to 4. Peak extra memory: a tile + the workspace + O(B·D).

        A tile is at most 32 MB up to B = 8192.
        """
        dtype = compute_dtype(x, w)
        classes = w.shape[0] if class_subset is None else class_subset.shape[0]
        plan = TilePlan.of(x.shape[0], x.shape[1], classes, dtype, config)
        centres = Centres(w, class_subset, dtype, plan.tile)
        kernels, multiply = Kernels(dtype), products.of(dtype).mm
        pairs = TargetGeometry(x, w, y, class_subset)
        finite, xn = _product_rows(pairs.xn, dtype)

        workspace = pool.allocate(plan.numel, dtype)
        e, kept_max, kept_inv = plan.split(workspace)
        scratch, scratch_inv = _scratch(plan, dtype)
        tiles = list(plan.tiles())
        tile_max = x.new_empty((len(tiles), plan.batch), dtype=dtype)
        tile_sum = x.new_empty((len(tiles), plan.batch), dtype=torch.float64)
        hardest = y.new_empty((len(tiles), plan.batch)) if config.find_hardest else None
        for i, (start, stop) in enumerate(tiles):
            w_tile, keep = centres.tile(start, stop), stop <= plan.kept
            inv = kept_inv[start:stop] if keep else scratch_inv[: stop - start]
            dots = e[start:stop] if keep else scratch[: stop - start]
            kernels.inverse_norms(w_tile, inv)
            multiply(w_tile, xn.T, out=dots)
            found = None if hardest is None else hardest[i]
            kernels.forward_tile(dots, inv, config.scale, y - start, tile_max[i], tile_sum[i], found)
        kept_max.copy_(tile_max[: plan.kept_tiles])

        log_l = torch.where(finite, _combine(tile_max.double(), tile_sum), torch.nan)
        nothing = x.new_empty(0, dtype=torch.float64)
        hardest_cos, hardest_class = nothing, y.new_empty(0)
        if hardest is not None:
            hardest_cos, hardest_class = _hardest(tile_max, hardest, plan, config.scale, class_subset)
            hardest_cos = torch.where(finite, hardest_cos, torch.nan)
        saved = workspace if config.keep else x.new_empty(0, dtype=dtype)
        return Forward(log_l, pairs.theta(), saved, nothing.clone(), hardest_cos, hardest_class)

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
        """Compute eqs. 9 to 11. Peak extra memory beside dw: a tile of logits, O(B·D)."""
        dtype = compute_dtype(x, w)
        classes = w.shape[0] if class_subset is None else class_subset.shape[0]
        plan = TilePlan.of(x.shape[0], x.shape[1], classes, dtype, config)
        centres = Centres(w, class_subset, dtype, plan.tile)
        kernels, multiply = Kernels(dtype), products.of(dtype).mm
        pairs = TargetGeometry(x, w, y, class_subset)
        _, xn = _product_rows(pairs.xn, dtype)
        e, kept_max, kept_inv = plan.split(workspace)
        scratch, scratch_inv = _scratch(plan, dtype)

        # A row without negatives has log l = −inf and G = 0, a row of NaN no log l: any finite shift does.
        log2_l = torch.where(torch.isfinite(log_l), log_l, 0.0) * LOG2_E
        rounded = log2_l.to(dtype)
        live = g_log_l != 0
        g_theta = torch.where(y >= 0, g_theta, 0.0)
        g_max = _nonzero(g_log_l.abs().amax()) if plan.batch else torch.ones(())
        u, v = pairs.tangents()

        a = torch.zeros(x.shape, dtype=torch.float64)  # Σ_j p_bj·wn_j
        product = pool.allocate(x.numel(), dtype).view(x.shape)
        operand = pool.allocate(x.numel(), dtype).view(x.shape)
        out = (
            _WeightGradient(
                w, class_subset, config.sparse_grad, dtype, plan.tile, _tangent_sums(pairs, v, g_theta)
            )
            if need_dw
            else None
        )
        for i, (start, stop) in enumerate(plan.tiles()):
            w_tile = centres.tile(start, stop)
            if stop <= plan.kept:
                p, inv, shift = e[start:stop], kept_inv[start:stop], kept_max[i]
            else:
                p, inv, shift = scratch[: stop - start], scratch_inv[: stop - start], rounded
                kernels.inverse_norms(w_tile, inv)
                multiply(w_tile, xn.T, out=p)
                kernels.backward_tile(p, inv, config.scale, y - start, shift)
            # p holds 2^(exponent − shift)/|w|; in float64 this takes back what rounding did to the shift.
            row_factor = torch.where(live, torch.exp2(shift.double() - log2_l), 0.0)
            if need_dx:
                a.addcmul_(multiply(p.T, w_tile, out=product), row_factor[:, None])
            if out is not None:
                torch.mul(xn, (row_factor * (g_log_l / g_max))[:, None], out=operand)
                acc = multiply(p, operand, out=out.tile(start, stop))
                kernels.project(acc, w_tile, inv, config.scale * g_max.item())
                out.finish(start, stop)

        dx = None
        if need_dx:
            dx = _input_gradient(pairs, a, u, config.scale * g_log_l, g_theta).to(x.dtype)
        return dx, None if out is None else out.dw

    def topk(self, x: Tensor, w: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Stream over tiles; peak extra memory: two tiles of cosines + O(B·(k + D))."""
        dtype = compute_dtype(x, w)
        config = OpConfig(scale=1.0, keep=False, workspace_bytes=0, find_hardest=False, product_dtype=None)
        plan = TilePlan.of(x.shape[0], x.shape[1], w.shape[0], dtype, config)
        centres = Centres(w, None, dtype, plan.tile)
        xn = norms_and_units(x.double())[1].to(dtype)
        best = x.new_empty((plan.batch, 0), dtype=dtype)
        classes = x.new_empty((plan.batch, 0), dtype=torch.int64)
        for start, stop in plan.tiles():
            wn = norms_and_units(centres.tile(start, stop))[1]
            cos, found = torch.mm(xn, wn.T).topk(min(k, stop - start), dim=1)
            best, classes = torch.cat([best, cos], 1), torch.cat([classes, found + start], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            classes = classes.gather(1, order)
        return best, classes


def _scratch(plan: TilePlan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Allocate (T, B) logits and (T,) inverse norms for tiles that are not kept; empty where all are."""
    rows = min(plan.tile, plan.classes - plan.kept)
    return pool.allocate(rows * plan.batch, dtype).view(rows, plan.batch), pool.allocate(rows, dtype)


def _product_rows(xn: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (finite (B,), xn (B, D) in `dtype`); rows with NaN or Inf become 0, so that none meets them."""
    finite = torch.isfinite(xn).all(dim=1)
    return finite, torch.where(finite[:, None], xn, 0.0).to(dtype)


def _nonzero(largest: Tensor) -> Tensor:
    return torch.where(largest == 0, 1.0, largest)


def _combine(tile_max: Tensor, tile_sum: Tensor) -> Tensor:
    """Combine (tiles, B) maxima, in units of log 2, and sums to log l (B,); −inf where nothing was summed."""
    if not tile_max.shape[0]:
        return tile_max.new_full(tile_max.shape[1:], -torch.inf)
    highest = tile_max.amax(dim=0)
    highest = torch.where(highest == -torch.inf, 0.0, highest)
    total = (tile_sum * torch.exp2(tile_max - highest)).sum(dim=0)
    return (torch.log2(total) + highest) / LOG2_E


def _hardest(
    tile_max: Tensor, hardest: Tensor, plan: TilePlan, scale: float, class_subset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the largest negative cosine (B,) float64 and its class (B,), from each tile's."""
    best, tile = tile_max.double().max(dim=0)
    classes = hardest.gather(0, tile[None])[0]
    positions = classes + tile * plan.tile
    named = positions if class_subset is None else class_subset[positions.clamp_min(0)]
    return best / (scale * LOG2_E), torch.where(classes < 0, -1, named)


def _tangent_sums(pairs: TargetGeometry, v: Tensor, g_theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return sorted classes (K,) and Σ_{b: y_b=j} H_b·v_b/|w_j| (K, D), the targets' share of dw (eq. 11)."""
    rows = torch.nonzero(pairs.y >= 0)[:, 0]
    classes, group = torch.unique(pairs.y[rows], return_inverse=True)
    pull = _weighted(g_theta[rows, None], v[rows] / pairs.w_norm[rows].clamp_min(NORM_EPS))
    return classes, pull.new_zeros((classes.shape[0], v.shape[1])).index_add_(0, group, pull)


def _weighted(weight: Tensor, v: Tensor) -> Tensor:
    """Return weight·v, and 0 where the weight is 0, whatever v holds."""
    return torch.where(weight == 0, 0.0, weight * v)


def _input_gradient(pairs: TargetGeometry, a: Tensor, u: Tensor, s_g: Tensor, g_theta: Tensor) -> Tensor:
    """Return dx (B, D) float64 (eq. 10); rows shorter than eps get 0."""
    tangent = a - (a * pairs.xn).sum(1, keepdim=True) * pairs.xn
    pull = _weighted(s_g[:, None], tangent) - _weighted(g_theta[:, None], u)
    dx = pull / pairs.x_norm.clamp_min(NORM_EPS)
    # Nothing pulls an ignored row: it gets 0 even where its norm is NaN.
    return torch.where((pairs.x_norm < NORM_EPS) | (pull == 0), 0.0, dx)


class _WeightGradient:
    """Collects dw tile by tile: in place where dtype and layout allow, else through one tile's buffer.

    (C_all, D), 0 outside the subset; with `sparse_grad` the subset's rows alone, (S, D).
    """

    def __init__(
        self,
        w: Tensor,
        class_subset: Tensor | None,
        sparse_grad: bool,
        dtype: torch.dtype,
        tile: int,
        tangents: tuple[Tensor, Tensor],
    ) -> None:
        self.tangent_classes, self.tangents = tangents
        self.scattered_to = None if sparse_grad else class_subset
        self.direct = self.scattered_to is None and w.dtype == dtype
        # From the pool: the page faults of a fresh 205 MB buffer cost a twentieth of a step over all classes,
        # and half of one over a tenth of them.
        classes = w.shape[0] if class_subset is None or not sparse_grad else class_subset.shape[0]
        self.dw = pool.allocate(classes * w.shape[1], w.dtype).view(classes, w.shape[1])
        if self.scattered_to is not None:
            self.dw.zero_()
        rows = 0 if self.direct else min(tile, w.shape[0])
        self._buffer = pool.allocate(rows * w.shape[1], dtype).view(rows, w.shape[1])

    def tile(self, start: int, stop: int) -> Tensor:
        """Return where the (T, D) product of classes start..stop goes."""
        return self.dw[start:stop] if self.direct else self._buffer[: stop - start]

    def finish(self, start: int, stop: int) -> None:
        """Subtract the targets' tangents, after the projection (they are tangent already), and store."""
        tile = self.tile(start, stop)
        first, last = torch.searchsorted(self.tangent_classes, torch.tensor([start, stop])).tolist()
        if first < last:
            rows = self.tangent_classes[first:last] - start
            tile.index_add_(0, rows, self.tangents[first:last].to(tile.dtype), alpha=-1)
        if self.scattered_to is not None:
            self.dw[self.scattered_to[start:stop]] = tile.to(self.dw.dtype)
        elif not self.direct:
            self.dw[start:stop] = tile
