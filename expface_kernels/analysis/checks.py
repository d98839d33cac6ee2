"""What is wrong with statistics and states that are handed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

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


def check_keys(state: Mapping[str, Any], keys: Sequence[str]) -> None:
    """A state_dict that has all `keys`."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a state_dict, got {type(state).__name__}")
    missing = [key for key in keys if key not in state]
    if missing:
        got = ", ".join(map(str, state)) or "none"
        raise ValueError(f"state: expected {', '.join(missing)} among its keys, got {got}")


def check_state_tensor(name: str, value: Any, like: Tensor) -> None:
    """What a state_dict holds under `name`: a tensor of the shape and dtype of `like`, on any device."""
    expected, got = _described(like), _described(value)
    if got != expected:
        raise ValueError(f"state: expected {name} of {expected}, got {got}")


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"shape {tuple(value.shape)} and dtype {value.dtype}"
