"""Saving and loading of whole models and optimizers through torch.distributed.checkpoint, on any ranks.

torch's engine reshards a DTensor for other ranks by itself. This module adds what it leaves open: a directory
appears whole or not at all, everything is checked before the first value changes, and no file's pickle can
run code.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from expface_kernels.checkpoint.files import written_whole
from expface_kernels.checkpoint.optimizer_state import (
    GROUPS,
    OPTIMIZER,
    STATE,
    Groups,
    check_count,
    optimizer_to_save,
    ordered_groups,
    put_back_on_failure,
    saved_groups,
    set_optimizer,
    state_to_fill,
)
from expface_kernels.distributed.group import Group
from expface_kernels.distributed.module import CentreModule
from expface_kernels.heads import STEP_KEY, MarginSoftmaxHead

MODEL = "model"
INDEX_FILE = ".metadata"
INDEX_TYPES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}
"""What an index is made of, by module, besides dtypes."""


def save_sharded(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Write a model and its optimizer into a new directory, each rank its shards; every rank calls this.

    The directory appears under its name when it is complete and on the disk.

    Args:
        directory: must not exist, so that no earlier checkpoint is lost to a failure; on a file system that
            all ranks share.
        model: for a backbone and a head `nn.ModuleDict({"backbone": backbone, "head": head})`; DDP may wrap
            the backbone.
        optimizer: of parameters of `model` only.
        process_group: who takes part; None is the group of the model's DTensors, this process alone if it has
            none.

    Raises:
        FileExistsError: there is such a directory. ValueError: DTensors of several groups, and none named; a
            PartialFC_V2 of several ranks, whose plain weight the engine would take for the same everywhere;
            a parameter of another model. RuntimeError: another rank failed, and its error.
    """
    target = Path(directory)
    _refuse_plain_shards(model)
    group = Group(_process_group_of(model, process_group))
    with group.all_or_none("to save"):
        _refuse_existing(target)
    with group.all_or_none("to save"):  # apart, since wrapped modules may talk to other ranks here
        state = _model_and_optimizer_to_save(model, optimizer)
    with written_whole(target, group) as temporary, group.all_or_none("to save"):
        _engine(dcp.save, state, group, storage_writer=dcp.FileSystemWriter(temporary))


def load_sharded(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Load what `save_sharded` wrote on any number of ranks, in place; every rank calls this.

    Names, shapes, dtypes, groups of parameters and files are checked on every rank before the first value
    changes; until then a failure leaves all as it was. With an optimizer, gradients are set to None, and its
    hyperparameters become those of the checkpoint. A head's sampling_step does, too, where it was saved with
    sample_rate < 1, whether it samples now or not.

    Args:
        directory, model, optimizer, process_group: as in `save_sharded`; the same names of parameters, in the
            same groups.

    Raises:
        FileNotFoundError, ValueError: no or an incomplete checkpoint, a file missing or truncated, another
            num_classes, D, dtype, kind of optimizer or grouping of parameters; both sides are named. What
            `save_sharded` refuses.
        pickle.UnpicklingError: it holds code. RuntimeError: another rank failed, and its error.
    """
    source = Path(directory)
    _refuse_plain_shards(model)
    group = Group(_process_group_of(model, process_group))
    with group.all_or_none("to load"):
        metadata = _read_index(source)
        _check_files(source, metadata)
    with contextlib.nullcontext() if optimizer is None else put_back_on_failure(optimizer):
        groups = None if optimizer is None else _read_groups(source, metadata, model, optimizer, group)
        with group.all_or_none("to load"):
            state = _state_to_fill(metadata, model, optimizer)
            _check(source, metadata, state)
    _fill(state, source, group)
    _set_model(model, state[MODEL])
    if optimizer is not None and groups is not None:
        set_optimizer(model, optimizer, state[OPTIMIZER][STATE], groups)


def _refuse_plain_shards(model: nn.Module) -> None:
    """Refuse a module whose weight is one rank's share and does not say so, as a DTensor does."""
    for name, module in model.named_modules():
        ranks = module._group if isinstance(module, CentreModule) else None
        if ranks is not None and ranks.size > 1 and not hasattr(module.weight, "device_mesh"):
            raise ValueError(
                f"model: expected centers as a DTensor, got the {type(module).__name__} {name!r} with a "
                f"plain share on each of {ranks.size} ranks, of which one alone would be saved; save them by "
                "save_centres(path, module.weight, optimizer, process_group=…), or a file of each rank as "
                "InsightFace does, which open_insightface reads"
            )


def _process_group_of(model: nn.Module, process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    if process_group is not None:
        return process_group
    meshes = {p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")}
    wanted = "process_group: expected the group to save with, since"
    if any(mesh.ndim != 1 for mesh in meshes):
        raise ValueError(f"{wanted} a mesh has several dimensions")
    groups = {mesh.get_group() for mesh in meshes}
    if len(groups) > 1:
        raise ValueError(f"{wanted} DTensors are in {len(groups)}")
    return groups.pop() if groups else None


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise FileExistsError(f"{target}: expected a new directory, got one that exists")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such directory")


def _engine(function: Any, state: dict[str, Any], group: Group, **options: Any) -> None:
    """Run torch's save or load within the group; alone, without one that other code may have started."""
    with warnings.catch_warnings():
        if group.process_group is None:
            warnings.filterwarnings("ignore", message="torch.distributed is")
        try:
            function(state, process_group=group.process_group, no_dist=group.process_group is None, **options)
        except CheckpointException as error:  # no Exception, but a BaseException
            raise RuntimeError(f"torch.distributed.checkpoint: {error}") from error


def _fill(state: dict[str, Any], source: Path, group: Group) -> None:
    """Read into `state` what it has room for."""
    with group.all_or_none("to load"):
        _engine(dcp.load, state, group, storage_reader=Reader(source), planner=Planner())


def _model_and_optimizer_to_save(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    state: dict[str, Any] = {MODEL: get_model_state_dict(model)}
    if optimizer is not None:
        state[OPTIMIZER] = optimizer_to_save(model, optimizer)
    return state


def _read_groups(
    source: Path,
    metadata: Metadata,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: Group,
) -> Groups:
    """Read the checkpoint's groups of parameters with hyperparameters, which must be those of `optimizer`."""
    saved = saved_groups(metadata)
    with group.all_or_none("to load"):
        check_count(source, saved, optimizer)
    with group.all_or_none("to load"):
        ours = optimizer_to_save(model, optimizer)[GROUPS]
    _fill({OPTIMIZER: {GROUPS: saved}}, source, group)
    with group.all_or_none("to load"):
        return ordered_groups(source, saved, ours, metadata, optimizer)


def _state_to_fill(
    metadata: Metadata, model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> dict[str, Any]:
    """Return the model's tensors and the optimizer's state by parameter, for the engine to write into."""
    state: dict[str, Any] = {MODEL: get_model_state_dict(model)}
    for name in _sampling_steps(model):
        # A head that samples has this entry; it may do so again or no longer.
        if f"{MODEL}.{name}" in metadata.state_dict_metadata:
            state[MODEL].setdefault(name, torch.tensor(0))
        else:
            state[MODEL].pop(name, None)
    if optimizer is not None:
        state[OPTIMIZER] = {STATE: state_to_fill(metadata, model, optimizer)}
    return state


def _set_model(model: nn.Module, state: dict[str, Any]) -> None:
    """Load the model; torch strips the names of DDP and torch.compile from parameters and buffers only."""
    for name, inside in _sampling_steps(model).items():
        if name in state:
            state[inside] = state.pop(name)
    set_model_state_dict(model, state)


def _sampling_steps(model: nn.Module) -> dict[str, str]:
    """Map the name of each head's sampling_step in a checkpoint to that in the model's state_dict."""
    steps = {}
    for path, module in model.named_modules():
        if isinstance(module, MarginSoftmaxHead):
            plain, around = [], model
            parts = [part for part in path.split(".") if part]
            for part in parts:
                if not (isinstance(around, nn.parallel.DistributedDataParallel) or part == "_orig_mod"):
                    plain.append(part)
                around = getattr(around, part)
            steps[".".join([*plain, STEP_KEY])] = ".".join([*parts, STEP_KEY])
    return steps


def _check(source: Path, metadata: Metadata, state: dict[str, Any]) -> None:
    """Check names, shapes and dtypes against the checkpoint's index."""
    saved = metadata.state_dict_metadata
    wanted = {f"{MODEL}.{name}": value for name, value in state[MODEL].items()}
    parts = [MODEL]
    if OPTIMIZER in state:
        parts.append(f"{OPTIMIZER}.{STATE}")
        for name, values in state[OPTIMIZER][STATE].items():
            wanted |= {f"{OPTIMIZER}.{STATE}.{name}.{key}": value for key, value in values.items()}
    present = {key for key in saved if any(key.startswith(f"{part}.") for part in parts)}
    for what, keys in (("without", set(wanted) - present), ("with the unknown", present - set(wanted))):
        if keys:
            raise ValueError(
                f"{source}: expected the {len(wanted)} entries of this model and optimizer, got a checkpoint "
                f"{what} {sorted(keys)[:4]}"
            )
    for key, value in wanted.items():
        entry = saved[key]
        if isinstance(value, Tensor) and isinstance(entry, TensorStorageMetadata):
            if value.shape != entry.size:
                raise ValueError(
                    f"{source}: {key}: expected shape {tuple(value.shape)} as in the model, got "
                    f"{tuple(entry.size)}"
                )
            if value.dtype != entry.properties.dtype:
                raise ValueError(f"{source}: {key}: expected {value.dtype}, got {entry.properties.dtype}")


def _read_index(source: Path) -> Metadata:
    """Read what is in a checkpoint directory; FileNotFoundError where there is none."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such directory")
    if not (source / INDEX_FILE).is_file():
        raise FileNotFoundError(f"{source}: expected a checkpoint directory, got one without {INDEX_FILE}")
    return Reader(source).read_metadata()


def _check_files(source: Path, metadata: Metadata) -> None:
    """Check that every file is there that the index names, and is long enough."""
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source / name}: a shard of the checkpoint is missing")
        size = (source / name).stat().st_size
        if size < end:
            raise ValueError(f"{source / name}: expected at least {end} bytes, got {size}: it is truncated")


class Reader(dcp.FileSystemReader):
    """Reads as torch's reader does, but the index may hold nothing but the types of an index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = Path(self.path) / INDEX_FILE
        with open(index, "rb") as file:
            try:
                metadata = _IndexUnpickler(file).load()
            except _ForbiddenType:
                raise
            except Exception as error:  # a damaged pickle may raise anything
                raise ValueError(f"{index}: damaged or truncated: {type(error).__name__}: {error}") from error
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{self.path}: expected Metadata in {INDEX_FILE}, got {type(metadata).__name__}")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _ForbiddenType(pickle.UnpicklingError):
    """Says that an index names something that no index is made of."""


class _IndexUnpickler(pickle.Unpickler):
    """Looks up the types of a checkpoint's index and no others, so that loading one runs no code."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in INDEX_TYPES.get(module, ()):
            raise _ForbiddenType(f"{INDEX_FILE}: expected a checkpoint's index, got {module}.{name}")
        return super().find_class(module, name)


class Planner(DefaultLoadPlanner):
    """Plans as torch's planner does, but reads values that are no tensors with weights_only=True."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        *path, last = self.mappings[read_item.dest_index.fqn]
        inside: Any = self.original_state_dict
        for key in path:
            inside = inside[key]
        inside[last] = torch.load(value, weights_only=True)
