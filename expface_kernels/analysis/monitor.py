"""Where a training set lies: angles to the own and to the nearest other class, epoch by epoch.

B rows of a batch · bins a side of the 2-D histogram
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from expface_kernels.analysis.angle_counts import FINE, AngleCounts, numel
from expface_kernels.analysis.checks import check_keys, check_state_tensor, check_stats
from expface_kernels.checks import check_integer, check_margin, check_process_group
from expface_kernels.distributed.group import Group
from expface_kernels.margins import MarginFunction
from expface_kernels.stats import BatchStats


class AngularMonitor:
    """Counts each batch's target angles against the angles to the nearest other class.

        monitor = AngularMonitor()
        for x, y in …:
            loss, stats = head(net(x), y, return_stats=True)
            monitor.update(stats)
        angles = monitor.end_epoch()          # AngleCounts: histogram, percentiles, accuracy

    Rows that were ignored, are not finite or have no other class are left out. An update reads nothing back
    from the device; `end_epoch`, and whatever looks at the running epoch, does. Memory: 8·(bins² + 3605)
    bytes for each epoch kept, 94 kB with 90 bins, and O(B) in an update, however many rows there are.

    Args:
        bins: a side of the 2-D histogram; divides 1800. 90 are 2 degrees each.
        keep: how many finished epochs `epochs` holds; the oldest goes first.
        process_group: of torch.distributed, if each rank sees other rows: `end_epoch` then adds the ranks'
            counts with one all_reduce and must be called on all of them. None: this process alone.
    """

    def __init__(self, bins: int = 90, *, keep: int = 100, process_group: Any = None) -> None:
        check_integer("bins", bins, least=1)
        check_integer("keep", keep, least=1)
        if process_group is not None:
            check_process_group(process_group)
        if FINE % bins:
            raise ValueError(f"bins: expected a divisor of {FINE}, got {bins}")
        self.bins = bins
        self.keep = keep
        self.process_group = process_group
        self.epoch = 1
        self.epochs: list[AngleCounts] = []
        self._counts = torch.zeros(numel(bins), dtype=torch.float64, device="cpu")

    @torch.no_grad()
    def update(self, stats: BatchStats) -> None:
        """Count the rows of one batch, on the device they are on. TypeError, ValueError: no BatchStats."""
        check_stats(stats)
        target = stats.target_angle.double()
        other = torch.arccos(stats.hardest_negative_cos.double().clamp(-1, 1))
        counted = torch.isfinite(target + other) & (stats.hardest_negative_class >= 0)
        angles = torch.stack((target, other)).where(counted, 0.0)
        fine = (angles * (FINE / math.pi)).long().clamp_(max=FINE - 1)
        coarse = fine // (FINE // self.bins)
        cells = torch.cat(
            (coarse[0] * self.bins + coarse[1], fine[0] + self.bins**2, fine[1] + (self.bins**2 + FINE))
        )
        ones = counted.double()
        tail = torch.stack((ones, 1 - ones, ones * stats.correct, angles[0], angles[1])).sum(1)
        if self._counts.device != target.device:
            self._counts = self._counts.to(target.device)
        self._counts.index_add_(0, cells, ones.repeat(3))
        self._counts[-len(tail) :] += tail

    def running(self) -> AngleCounts:
        """The epoch under way, as far as this process has seen it."""
        return AngleCounts(self.epoch, self.bins, self._counts.cpu().clone())

    def end_epoch(self) -> AngleCounts:
        """Close the running epoch (over all ranks of the process group), keep it and return it."""
        counts = Group(self.process_group).sum(self._counts)
        done = AngleCounts(self.epoch, self.bins, counts.cpu().clone())
        self.epochs = [*self.epochs, done][-self.keep :]
        self.epoch += 1
        self._counts = torch.zeros_like(self._counts)
        return done

    def latest(self) -> AngleCounts:
        """The epoch that was closed last; the running one if none was."""
        return self.epochs[-1] if self.epochs else self.running()

    def merge(self, other: AngularMonitor) -> None:
        """Add what another monitor saw of the same epochs (of another rank, saved without a process group).

        ValueError, and nothing added, where bins or epochs differ.
        """
        if not isinstance(other, AngularMonitor):
            raise TypeError(f"other: expected an AngularMonitor, got {type(other).__name__}")
        mine, theirs = ([angles.epoch for angles in m.epochs] for m in (self, other))
        if (self.bins, self.epoch, mine) != (other.bins, other.epoch, theirs):
            raise ValueError(
                f"other: expected {self.bins} bins, epoch {self.epoch} and kept epochs {mine}, "
                f"got {other.bins} bins, epoch {other.epoch} and kept epochs {theirs}"
            )
        self.epochs = [a + b for a, b in zip(self.epochs, other.epochs, strict=True)]
        self._counts = self._counts + other._counts.to(self._counts.device)

    def write(self, writer: Any, tag: str = "angles") -> None:
        """Write `latest()` to a TensorBoard-like writer; see AngleCounts.write."""
        self.latest().write(writer, tag)

    def draw(self, file: str | Path, margins: Sequence[MarginFunction] = ()) -> None:
        """Save `latest()` as a PNG, with the decision boundary of each margin drawn over it.

        Needs matplotlib: ImportError without it names the extra that installs it. ValueError without rows.
        """
        for margin in margins:
            check_margin(margin)
        angles = self.latest()
        if not angles.rows:
            raise ValueError(f"monitor: expected rows to draw, got none in epoch {angles.epoch}")
        try:
            from expface_kernels.analysis import plots  # matplotlib only where it is drawn
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("expface_kernels"):
                raise
            raise ImportError(f"draw needs {error.name}: pip install 'expface_kernels[analysis]'") from error
        plots.save(plots.distribution_figure(angles, margins), Path(file))

    def state_dict(self) -> dict[str, Any]:
        """Numbers and CPU tensors; the running counts are this process's own."""
        return {
            "bins": self.bins,
            "epoch": self.epoch,
            "counts": self._counts.cpu().clone(),
            "kept_epochs": [angles.epoch for angles in self.epochs],
            "kept_counts": [angles.counts.clone() for angles in self.epochs],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state_dict.

        ValueError, and nothing changed, where it has other bins, a key is missing or counts have another
        shape, dtype or number.
        """
        check_keys(state, ("bins", "epoch", "counts", "kept_epochs", "kept_counts"))
        if state["bins"] != self.bins:
            raise ValueError(f"state: expected {self.bins} bins, got {state['bins']}")
        kept_epochs, kept_counts = state["kept_epochs"], state["kept_counts"]
        if len(kept_counts) != len(kept_epochs):
            raise ValueError(
                f"state: expected kept_counts of {len(kept_epochs)} epochs, as kept_epochs, "
                f"got {len(kept_counts)}"
            )
        for name, counts in (("counts", state["counts"]), *(("kept_counts", kept) for kept in kept_counts)):
            check_state_tensor(name, counts, self._counts)
        pairs = zip(kept_epochs, kept_counts, strict=True)
        self.epochs = [AngleCounts(epoch, self.bins, counts.clone()) for epoch, counts in pairs][-self.keep :]
        self.epoch = state["epoch"]
        self._counts = state["counts"].clone()
