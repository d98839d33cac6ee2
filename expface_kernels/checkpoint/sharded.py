"""Whole models and optimizers through torch.distributed.checkpoint, for any other number of ranks.

torch's engine cuts a DTensor anew for other ranks by itself. Around it stand here what it leaves open: a
directory that is there whole or not at all, everything checked before the first value changes, and no
file's pickle that could run code.
"""

from __future__ import annotations

import os
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
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from expface_kernels.checkpoint.dcp_files import Planner, Reader, check_files, read_index
from expface_kernels.checkpoint.members import Members
from expface_kernels.checkpoint.optimizer_state import (
    GROUPS,
    OPTIMIZER,
    STATE,
    Groups,
    check_count,
    in_order,
    optimizer_to_save,
    put_back_on_failure,
    saved_groups,
    set_optimizer,
    state_to_fill,
)
from expface_kernels.checkpoint.publish import publish
from expface_kernels.distributed.module import CentreModule
from expface_kernels.heads import STEP_KEY, MarginSoftmaxHead

MODEL = "model"


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
    members = Members(_group_of(model, process_group))
    token = members.gather(uuid.uuid4().hex)[0]
    temporary = target.with_name(f".{target.name}.{token}.tmp")
    members.together(lambda: _refuse_existing(target))
    state = members.together(lambda: _state_to_save(model, optimizer))
    try:
        members.together(
            lambda: _engine(dcp.save, state, members, storage_writer=dcp.FileSystemWriter(temporary))
        )
        members.together(lambda: publish(temporary, target) if members.first else None)
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
    members = Members(_group_of(model, process_group))
    metadata = members.together(lambda: read_index(source))
    members.together(lambda: check_files(source, metadata))
    with put_back_on_failure(optimizer):
        groups = None if optimizer is None else _read_groups(source, metadata, model, optimizer, members)
        state = members.together(lambda: _state_to_fill(metadata, model, optimizer))
        members.together(lambda: _check(source, metadata, state))
    _fill(state, source, members)
    _set_model(model, state[MODEL])
    if optimizer is not None and groups is not None:
        set_optimizer(model, optimizer, state[OPTIMIZER][STATE], groups)


def _refuse_plain_shards(model: nn.Module) -> None:
    """ValueError for a module whose weight is one rank's share and does not say so, as a DTensor does."""
    for name, module in model.named_modules():
        ranks = module._group if isinstance(module, CentreModule) else None
        if ranks is not None and ranks.size > 1 and not hasattr(module.weight, "device_mesh"):
            raise ValueError(
                f"model: expected centres as a DTensor, got the {type(module).__name__} {name!r} with a "
                f"plain share on each of {ranks.size} ranks, of which one alone would be saved; save them by "
                "save_centres(path, module.weight, optimizer, process_group=…), or a file of each rank as "
                "InsightFace does, which open_insightface reads"
            )


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


def _fill(state: dict[str, Any], source: Path, members: Members) -> None:
    """Read into `state` what it has room for."""
    reader = Reader(source)
    members.together(lambda: _engine(dcp.load, state, members, storage_reader=reader, planner=Planner()))


def _state_to_save(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    state: dict[str, Any] = {MODEL: get_model_state_dict(model)}
    if optimizer is not None:
        state[OPTIMIZER] = optimizer_to_save(model, optimizer)
    return state


def _read_groups(
    source: Path,
    metadata: Metadata,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    members: Members,
) -> Groups:
    """The checkpoint's groups of parameters with their hyperparameters; they must be those of `optimizer`."""
    saved = saved_groups(metadata)
    members.together(lambda: check_count(source, saved, optimizer))
    ours = members.together(lambda: optimizer_to_save(model, optimizer)[GROUPS])
    _fill({OPTIMIZER: {GROUPS: saved}}, source, members)
    return members.together(lambda: in_order(source, saved, ours, metadata, optimizer))


def _state_to_fill(
    metadata: Metadata, model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> dict[str, Any]:
    """The model's tensors, and the optimizer's state by parameter, for the engine to write into."""
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
    """torch gives parameters and buffers the names that they have inside DDP and torch.compile, no others."""
    for name, inside in _sampling_steps(model).items():
        if name in state:
            state[inside] = state.pop(name)
    set_model_state_dict(model, state)


def _sampling_steps(model: nn.Module) -> dict[str, str]:
    """What the sampling_step of each head is called in a checkpoint, and what in the model's state_dict."""
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
    """Names, shapes and dtypes against the checkpoint's index."""
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
