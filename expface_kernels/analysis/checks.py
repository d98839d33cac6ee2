"""What is wrong with statistics that are handed in."""

from __future__ import annotations

from typing import Any

from expface_kernels.stats import BatchStats


def check_stats(stats: Any, rows: int | None = None) -> None:
    """BatchStats whose fields all have (B,) rows; B is `rows`, where given."""
    if not isinstance(stats, BatchStats):
        raise TypeError(
            f"stats: expected BatchStats, as head(…, return_stats=True) gives, got {type(stats).__name__}"
        )
    expected = tuple(stats.target_angle.shape) if rows is None else (rows,)
    for name, value in stats._asdict().items():
        if value.dim() != 1 or tuple(value.shape) != expected:
            raise ValueError(
                f"stats: expected {name} of shape {expected if len(expected) == 1 else '(B,)'}, "
                f"got {tuple(value.shape)}"
            )
