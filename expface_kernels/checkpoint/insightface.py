"""InsightFace's checkpoints of a sharded head: one file a rank, each with its own rows.

C classes, all of them · D features
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expface_kernels.checkpoint.table import STATE_PREFIX, WEIGHT, CentreTable, RowSpec
from expface_kernels.distributed.ranges import insightface_ranges

FILE_NAME = re.compile(r"(softmax_fc_gpu|checkpoint_gpu)_(\d+)\.pt")
HEAD_KEY = "state_dict_softmax_fc"
OPTIMIZER_KEY = "state_optimizer"


def open_insightface(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, num_classes: int | None = None
) -> InsightFaceTable:
    """Open the files that the ranks of an InsightFace training wrote, as one table of all classes.

    Args:
        source: a directory with softmax_fc_gpu_{rank}.pt or checkpoint_gpu_{rank}.pt, or the files in order
            of ranks. Each holds a state dict {"weight": (num_local, D)}, bare or as "state_dict_softmax_fc"
            beside "state_optimizer", whose state of the head (SGD's momentum, Adam's moments) comes along.
        num_classes: C if you know it. The files do not: without it a missing last one shows when they are
            loaded into a head.

    Raises:
        FileNotFoundError, ValueError: a rank's file is missing; a file is damaged or holds something else;
            the rows are not InsightFace's split of C over so many ranks.
        pickle.UnpicklingError: a file holds code. Files are loaded with weights_only=True.

    Memory: the files are mapped, and read when their rows are asked for.
    """
    paths = _rank_files(source)
    parts = [_load(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        _check_same(parts[0], part, path)
    sizes = [part[WEIGHT].shape[0] for part in parts]
    total = sum(sizes)
    if num_classes is not None and total != num_classes:
        raise ValueError(
            f"{paths[0].parent}: expected {num_classes} classes, got {total} in {len(paths)} files"
        )
    expected = [part.size for part in insightface_ranges(total, len(paths))] if total else []
    if sizes != expected:
        raise ValueError(
            f"{paths[0].parent}: expected {expected} classes in the files, InsightFace's split of {total}, "
            f"got {sizes}: one is missing, of another training, or out of order"
        )
    return InsightFaceTable(str(paths[0].parent), parts)


class InsightFaceTable(CentreTable):
    """Reads the rows from all ranks' files; see `open_insightface`."""

    def __init__(self, origin: str, parts: list[dict[str, Tensor]]) -> None:
        self._parts = parts
        self._ranges = insightface_ranges(sum(part[WEIGHT].shape[0] for part in parts), len(parts))
        first = parts[0].items()
        super().__init__(
            origin,
            self._ranges[-1].stop,
            {name: RowSpec(value.dtype, tuple(value.shape[1:])) for name, value in first if value.dim()},
            {name: value for name, value in first if not value.dim()},
            "InsightFace's optimizer" if len(first) > 1 else None,
        )

    def take(self, name: str, classes: Tensor) -> Tensor:
        dtype, row = self.tensors[name]
        out = torch.empty((classes.numel(), *row), dtype=dtype)
        for part, held in zip(self._parts, self._ranges, strict=True):
            here = (classes >= held.start) & (classes < held.stop)
            out[here] = part[name][classes[here] - held.start]
        return out


def _rank_files(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    if not isinstance(source, (str, os.PathLike)):
        if not source:
            raise ValueError("source: expected a directory or at least one file, got an empty list")
        return [Path(path) for path in source]
    directory = Path(source)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: expected a directory, or a list of files in order of ranks")
    by_kind: dict[str, dict[int, Path]] = {}
    for path in directory.iterdir():
        if match := FILE_NAME.fullmatch(path.name):
            by_kind.setdefault(match[1], {})[int(match[2])] = path
    if len(by_kind) != 1:
        raise ValueError(
            f"{directory}: expected files softmax_fc_gpu_0.pt, … or checkpoint_gpu_0.pt, …, got "
            f"{'both' if by_kind else 'neither'}; pass a list of files"
        )
    ((kind, files),) = by_kind.items()
    missing = sorted(set(range(max(files) + 1)) - set(files))
    if missing:
        raise FileNotFoundError(
            f"{directory}: expected {kind}_0.pt to {kind}_{max(files)}.pt, got none for ranks {missing}"
        )
    return [files[rank] for rank in sorted(files)]


def _load(path: Path) -> dict[str, Tensor]:
    """Return one rank's tensors by our names."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: expected a file of torch.save, got one truncated or of another kind")
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    head = content.get(HEAD_KEY, content) if isinstance(content, dict) else None
    weight = head.get(WEIGHT) if isinstance(head, dict) else None
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        got = sorted(map(str, head)) if isinstance(head, dict) else type(content).__name__
        raise ValueError(f'{path}: expected a state dict {{"weight": (num_local, D)}}, got {got}')
    state = _head_state(content[OPTIMIZER_KEY], weight) if OPTIMIZER_KEY in content else {}
    return {WEIGHT: weight} | state


def _head_state(optimizer: dict[str, Any], weight: Tensor) -> dict[str, Tensor]:
    """Find the state of the head's parameter: the last alone in its group and of the weight's shape."""
    for group in reversed(optimizer["param_groups"]):
        indices = group["params"]
        state = optimizer["state"].get(indices[0], {}) if len(indices) == 1 else {}
        tensors = {
            name: value if isinstance(value, Tensor) else torch.tensor(value)
            for name, value in state.items()
            if value is not None
        }
        wide = [value.shape for value in tensors.values() if value.dim()]
        if wide and all(shape == weight.shape for shape in wide):
            return {STATE_PREFIX + name: value for name, value in tensors.items()}
    return {}


def _check_same(first: dict[str, Tensor], part: dict[str, Tensor], path: Path) -> None:
    """Check that D, dtypes, state and its numbers are those of rank 0's file."""

    def show(tensors: dict[str, Tensor]) -> dict[str, object]:
        return {
            name: (value.dtype, tuple(value.shape[1:])) if value.dim() else value.item()
            for name, value in sorted(tensors.items())
        }

    if show(part) != show(first):
        raise ValueError(f"{path}: expected {show(first)} as in the first file, got {show(part)}")
