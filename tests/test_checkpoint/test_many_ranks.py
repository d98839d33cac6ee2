"""Checkpoints written by four ranks and loaded by three, by two and by one.

Processes are slow to start, so each start runs many checks, those of test_ranks_that_fail.py too; a worker's
assertion is the test's.
"""

from __future__ import annotations

import contextlib
import pickle
import shutil
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed import distributed_c10d as c10d

from expface_kernels import ExpFace
from expface_kernels.checkpoint import (
    load_centres,
    load_sharded,
    open_centres,
    remap_classes,
    save_centres,
    save_sharded,
)
from expface_kernels.compat.insightface import PartialFC_V2
from expface_kernels.distributed.ranges import insightface_ranges, shard_ranges
from tests.distributed import run_ranks
from tests.test_checkpoint.test_ranks_that_fail import check_loads_that_fail, check_saves_that_fail
from tests.test_checkpoint.trained import (
    OPTIMIZERS,
    D,
    Head,
    assert_is_truth,
    backbone,
    fill_with_truth,
    model_of,
    truth,
)

CLASS_COUNTS = (10, 5, 1003)  # 5 on 4 ranks: 2, 2, 1 and none
CASES = [(count, kind) for count in CLASS_COUNTS for kind in OPTIMIZERS]


def save_all(group: dist.ProcessGroup, folder: Path) -> None:
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    for count, kind in CASES:
        start, size = shard_ranges(count, world_size)[rank]
        model = model_of(count, group)
        optimizer = OPTIMIZERS[kind](model.parameters())
        fill_with_truth(model["head"].weight, optimizer, start, count)
        save_centres(folder / f"{kind}-{count}.safetensors", model["head"].weight, optimizer)
        save_sharded(folder / f"{kind}-{count}", model, optimizer)

        start, size = insightface_ranges(count, world_size)[rank]
        plain = nn.Parameter(torch.zeros(size, D))
        optimizer = OPTIMIZERS[kind]([plain])
        fill_with_truth(plain, optimizer, start, count)
        # Metadata in another order is the same.
        metadata = dict(sorted({"epoch": "3", "longer": "b"}.items(), reverse=rank > 0))
        path = folder / f"{kind}-{count}-plain.safetensors"
        save_centres(path, plain, optimizer, process_group=group, metadata=metadata)
    check_an_idle_empty_rank(rank, group, folder)
    check_plain_shares(rank, group, folder)
    check_that_nothing_is_unpickled(group, folder)
    check_saves_that_fail(rank, group, folder)


def check_an_idle_empty_rank(rank: int, group: dist.ProcessGroup, folder: Path) -> None:
    """Five classes on four ranks, and the rank without any has never made a step with its head."""
    model = model_of(5, group)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    if rank < 3:
        fill_with_truth(model["head"].weight, optimizer, 2 * rank, 5)
    model["backbone"].weight.grad = torch.zeros(D, 3)
    optimizer.step()
    assert (model["head"].weight in optimizer.state) == (rank < 3)
    save_centres(folder / "idle.safetensors", model["head"].weight, optimizer)
    save_sharded(folder / "idle", model, optimizer)


def check_plain_shares(rank: int, group: dist.ProcessGroup, folder: Path) -> None:
    head = PartialFC_V2(ExpFace(), D, 10, process_group=group)
    optimizer = OPTIMIZERS["sgd"](head.parameters())
    fill_with_truth(head.weight, optimizer, head.class_start, 10)
    save_centres(folder / "plain", head.weight, optimizer, process_group=group)
    dist.barrier(group)
    assert torch.equal(load_file(folder / "plain")["weight"], truth("weight", 10))
    # Without the group nothing shows that there are others, but that some rank is not the first.
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        save_centres(folder / f"own-{rank}", head.weight)
        save_centres(folder / "plain", head.weight, process_group=group)
    expected = [f"process_group: rank {rank} saves a plain weight as one of all classes"] if rank else []
    assert [str(warning.message).split(";")[0] for warning in told] == expected


def check_that_nothing_is_unpickled(group: dist.ProcessGroup, folder: Path) -> None:
    """Neither from the file nor from the other ranks."""

    forbidden = AssertionError("something is unpickled")
    head = Head(10, group)
    optimizer = OPTIMIZERS["adamw"](head.parameters())
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (pickle, "loads"),
            (pickle, "Unpickler"),
            (c10d, "_tensor_to_object"),
            (c10d, "_unpickler"),
            (c10d, "all_gather_object"),
        ):
            stack.enter_context(mock.patch.object(owner, name, side_effect=forbidden))
        load_centres(folder / "adamw-10.safetensors", head.weight, optimizer)
        save_centres(folder / "again", head.weight, optimizer)
    assert (folder / "again").read_bytes() == (folder / "adamw-10.safetensors").read_bytes()


def load_all(group: dist.ProcessGroup, folder: Path) -> None:
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    for count, kind in CASES:
        check_loads_of(rank, world_size, count, kind, folder, group)
    if world_size == 3:
        check_loads_that_fail(rank, group, folder)
        check_a_table_that_is_saved_by_many(rank, group, folder)


def check_loads_of(
    rank: int, world_size: int, count: int, kind: str, folder: Path, group: dist.ProcessGroup | None
) -> None:
    start, _ = shard_ranges(count, world_size)[rank]
    for name in (f"{kind}-{count}.safetensors", f"{kind}-{count}-plain.safetensors"):
        head = Head(count, group)
        optimizer = OPTIMIZERS[kind](head.parameters())
        load_centres(folder / name, head.weight, optimizer)
        assert_is_truth(head.weight, optimizer, kind, start, count)
        head.weight.grad = torch.ones_like(head.weight)
        optimizer.step()  # what was loaded is of use
    model = model_of(count, group)
    nn.init.zeros_(model["backbone"].weight)
    optimizer = OPTIMIZERS[kind](model.parameters())
    optimizer.param_groups[0]["lr"] = 123.0
    load_sharded(folder / f"{kind}-{count}", model, optimizer)
    assert_is_truth(model["head"].weight, optimizer, kind, start, count)
    assert torch.equal(model["backbone"].weight, backbone().weight)
    expected = OPTIMIZERS[kind]([nn.Parameter(torch.zeros(1))]).param_groups[0]
    for key in ("lr", "weight_decay", "betas", "momentum"):
        assert optimizer.param_groups[0].get(key) == expected.get(key), key


def check_a_table_that_is_saved_by_many(rank: int, group: dist.ProcessGroup, folder: Path) -> None:
    """Classes are remapped from file to file, each rank making a part of the new one."""
    mapping = [4, -1, 0, -1, 9, 2, 1]
    with open_centres(folder / "adamw-10.safetensors") as table:
        save_centres(folder / "many.safetensors", remap_classes(table, mapping, seed=3), process_group=group)
        if rank == 0:
            save_centres(folder / "one.safetensors", remap_classes(table, mapping, seed=3))
        other = remap_classes(table, mapping[: 6 if rank == 1 else 7])
        message = r"tensors: expected the same .* weight torch.float32 \(6, 6\) on rank 1$"
        with pytest.raises(ValueError, match=message):
            save_centres(folder / "other.safetensors", other, process_group=group)
    dist.barrier(group)
    assert (folder / "many.safetensors").read_bytes() == (folder / "one.safetensors").read_bytes()


@pytest.fixture(scope="module")
def saved_by_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    run_ranks(4, save_all, folder)
    assert len(list((folder / "adamw-10").glob("__?_0.distcp"))) == 4
    for harm in ("missing", "truncated"):
        shutil.copytree(folder / "adamw-10", folder / f"{harm}-shard")
        shard = folder / f"{harm}-shard" / "__2_0.distcp"
        content = shard.read_bytes()
        shard.unlink()
        if harm == "truncated":
            shard.write_bytes(content[:-1])
    return folder


@pytest.mark.parametrize("world_size", [3, 2])
def test_what_four_ranks_saved_loads_on_fewer(world_size: int, saved_by_four: Path) -> None:
    """Where users of InsightFace are stuck: what four saved three cannot load, or a wrong C loads."""
    run_ranks(world_size, load_all, saved_by_four)


@pytest.mark.parametrize(("count", "kind"), CASES)
def test_what_four_ranks_saved_loads_in_one_process_and_by_the_plain_library(
    count: int, kind: str, saved_by_four: Path
) -> None:
    check_loads_of(0, 1, count, kind, saved_by_four, None)
    for name in (f"{kind}-{count}.safetensors", f"{kind}-{count}-plain.safetensors"):
        tensors = load_file(saved_by_four / name)
        assert torch.equal(tensors.pop("weight"), truth("weight", count))
        assert len(tensors) == (1 if kind == "sgd" else 3)
        for key, value in tensors.items():
            if value.dim():
                assert torch.equal(value, truth(key.removeprefix("optimizer."), count))


def test_a_rank_without_classes_may_have_no_state(saved_by_four: Path) -> None:
    head = Head(5)
    optimizer = OPTIMIZERS["adamw"](head.parameters())
    load_centres(saved_by_four / "idle.safetensors", head.weight, optimizer)
    assert_is_truth(head.weight, optimizer, "adamw", 0, 5)
    model = model_of(5, None)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    load_sharded(saved_by_four / "idle", model, optimizer)
    assert_is_truth(model["head"].weight, optimizer, "adamw", 0, 5)
    assert model["backbone"].bias not in optimizer.state  # it had no gradient yet, and no state
