"""Whole models and optimizers through torch.distributed.checkpoint, for any other number of ranks.

torch's engine cuts a DTensor anew for other ranks by itself. Around it stand here what it leaves open: a
directory that is there whole or not at all, everything checked before the first value changes, and no
pickle that could run code.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import uuid
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
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from expface_kernels.checkpoint.members import Members

MODEL = "model"
OPTIMIZER = "optimizer"
INDEX_FILE = ".metadata"


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
        FileExistsError: there is such a directory. ValueError: DTensors of several groups, and none named.
        RuntimeError: another rank failed, and its error.
    """
    target = Path(directory)
    members = Members(_group_of(model, process_group))
    token = members.gather(uuid.uuid4().hex)[0]
    temporary = target.with_name(f".{target.name}.{token}.tmp")
    members.together(lambda: _refuse_existing(target))
    state = members.together(lambda: _state_to_save(model, optimizer))
    try:
        members.together(
            lambda: _engine(dcp.save, state, members, storage_writer=dcp.FileSystemWriter(temporary))
        )
        members.together(lambda: os.rename(temporary, target) if members.first else None)
    except BaseException:
        if members.first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_sharded(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Load what `save_sharded` wrote on any number of ranks, in place; every rank calls this.

    Names, shapes, dtypes and files are checked on every rank before the first value changes. With an
    optimizer, gradients are set to None, and its hyperparameters become those of the checkpoint.

    Args:
        directory, model, optimizer, process_group: as in `save_sharded`; the same names of parameters.

    Raises:
        FileNotFoundError, ValueError: no or an incomplete checkpoint, a file missing or truncated, another
            num_classes, D, dtype or kind of optimizer; both sides are named.
        pickle.UnpicklingError: it holds code. RuntimeError: another rank failed, and its error.
    """
    source = Path(directory)
    members = Members(_group_of(model, process_group))
    metadata = members.together(lambda: _read_index(source))
    kept = {} if optimizer is None else dict(optimizer.state)
    gradients = [] if optimizer is None else _gradients(optimizer)
    try:
        state = members.together(lambda: _state_to_fill(metadata, model, optimizer))
        members.together(lambda: _check(source, metadata, state))
    except BaseException:
        if optimizer is not None:
            optimizer.state.clear()
            optimizer.state.update(kept)
            _set_gradients(gradients)
        raise
    kept.clear()
    gradients.clear()
    reader = _Reader(source)
    members.together(lambda: _engine(dcp.load, state, members, storage_reader=reader, planner=_Planner()))
    set_model_state_dict(model, state[MODEL])
    if optimizer is not None:
        if state[OPTIMIZER]["state"]:
            lenient = StateDictOptions(strict=False)  # not all need have state; _check was strict
            set_optimizer_state_dict(model, optimizer, state[OPTIMIZER], options=lenient)
        else:
            optimizer.state.clear()
            _set_hyperparameters(optimizer, state[OPTIMIZER]["param_groups"])


def _group_of(model: nn.Module, process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    if process_group is not None:
        return process_group
    meshes = {p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")}
    if any(mesh.ndim != 1 for mesh in meshes):
        raise ValueError(
            "process_group: expected the group to save with, since a mesh has several dimensions"
        )
    groups = {mesh.get_group() for mesh in meshes}
    if len(groups) > 1:
        raise ValueError(
            f"process_group: expected the group to save with, since DTensors are in {len(groups)}"
        )
    return groups.pop() if groups else None


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise FileExistsError(f"{target}: expected a new directory, got one that exists")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such directory")


def _engine(function: Any, state: dict[str, Any], members: Members, **options: Any) -> None:
    """torch's save or load within the group; alone, without one that other code may have started."""
    with warnings.catch_warnings():
        if members.group is None:
            warnings.filterwarnings("ignore", message="torch.distributed is")
        try:
            function(state, process_group=members.group, no_dist=members.group is None, **options)
        except CheckpointException as error:  # no Exception, but a BaseException
            raise RuntimeError(f"torch.distributed.checkpoint: {error}") from error


def _state_to_save(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    state: dict[str, Any] = {MODEL: get_model_state_dict(model)}
    if optimizer is not None:
        stepped = bool(optimizer.state)
        gradients = _gradients(optimizer)
        optimizer.zero_grad(set_to_none=True)  # or torch would make up no state
        state[OPTIMIZER] = get_optimizer_state_dict(model, optimizer)
        _set_gradients(gradients)
        if not stepped:  # torch has made up a state by a step at learning rate 0
            optimizer.state.clear()
            state[OPTIMIZER]["state"] = {}
    return state


def _state_to_fill(
    metadata: Metadata, model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> dict[str, Any]:
    """The model's tensors, and an optimizer state of every parameter, for the engine to write into."""
    state: dict[str, Any] = {MODEL: get_model_state_dict(model)}
    if optimizer is not None:
        optimizer.state.clear()
        optimizer.zero_grad(set_to_none=True)
        state[OPTIMIZER] = get_optimizer_state_dict(model, optimizer)
        made_up = state[OPTIMIZER]["state"]
        for name in [name for name in made_up if not _has_state(metadata, name)]:
            del made_up[name]  # had none when it was saved: before the first step, or never trained
    return state


def _has_state(metadata: Metadata, name: str) -> bool:
    return any(key.startswith(f"{OPTIMIZER}.state.{name}.") for key in metadata.state_dict_metadata)


def _gradients(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor | None]]:
    return [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]


def _set_gradients(gradients: list[tuple[Tensor, Tensor | None]]) -> None:
    for parameter, gradient in gradients:
        parameter.grad = gradient


def _set_hyperparameters(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})


def _read_index(source: Path) -> Metadata:
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such directory")
    if not (source / INDEX_FILE).is_file():
        raise FileNotFoundError(f"{source}: expected a checkpoint directory, got one without {INDEX_FILE}")
    return _Reader(source).read_metadata()


def _check(source: Path, metadata: Metadata, state: dict[str, Any]) -> None:
    """Names, shapes and dtypes against the checkpoint's index, and its files against the disk."""
    saved = metadata.state_dict_metadata
    wanted = {f"{MODEL}.{name}": value for name, value in state[MODEL].items()}
    parts = [MODEL]
    if OPTIMIZER in state:
        parts.append(f"{OPTIMIZER}.state")
        for name, values in state[OPTIMIZER]["state"].items():
            wanted |= {f"{OPTIMIZER}.state.{name}.{key}": value for key, value in values.items()}
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
    _check_files(source, metadata)


def _check_files(source: Path, metadata: Metadata) -> None:
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source / name}: a shard of the checkpoint is missing")
        size = (source / name).stat().st_size
        if size < end:
            raise ValueError(f"{source / name}: expected at least {end} bytes, got {size}: it is truncated")


class _Reader(dcp.FileSystemReader):
    """torch's reader, whose index may hold nothing but the types of an index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / INDEX_FILE, "rb") as file:
            metadata = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{self.path}: expected Metadata in {INDEX_FILE}, got {type(metadata).__name__}")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    """Looks up the types of a checkpoint's index and no others, so that loading one runs no code."""

    allowed = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("collections", "OrderedDict"),
        }
        | {
            (module, name)
            for module in ("pathlib", "pathlib._local")
            for name in ("PosixPath", "WindowsPath")
        }
        | {
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "_MEM_FORMAT_ENCODING",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
            )
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"{INDEX_FILE}: expected a checkpoint's index, got {module}.{name}")
        return super().find_class(module, name)


class _Planner(DefaultLoadPlanner):
    """torch's planner, but values that are no tensors are read with weights_only=True."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        *path, last = self.mappings[read_item.dest_index.fqn]
        inside: Any = self.original_state_dict
        for key in path:
            inside = inside[key]
        inside[last] = torch.load(value, weights_only=True)
