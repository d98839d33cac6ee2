"""Checkpoints written by four ranks and loaded by three, by two and by one; failures of one rank.

Processes are slow to start, so each start runs many checks; a worker's assertion is the test's.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed import distributed_c10d as c10d

from expface_kernels import ExpFace
from expface_kernels.checkpoint import (
    centres_of,
    load_centres,
    load_sharded,
    open_centres,
    remap_classes,
    save_centres,
    save_sharded,
)
from expface_kernels.checkpoint.dcp_files import Reader
from expface_kernels.checkpoint.safetensors_file import Layout
from expface_kernels.compat.insightface import PartialFC_V2
from expface_kernels.partial_fc.ranges import insightface_ranges, shard_ranges
from tests.distributed import RankFailed, run_ranks
from tests.test_checkpoint.trained import (
    OPTIMIZERS,
    D,
    Head,
    assert_is_truth,
    fill_with_truth,
    truth,
)

CLASS_COUNTS = (10, 5, 1003)  # 5 on 4 ranks: 2, 2, 1 and none
CASES = [(count, kind) for count in CLASS_COUNTS for kind in OPTIMIZERS]


def backbone() -> nn.Module:
    made = nn.Linear(3, D)
    with torch.no_grad():
        made.weight.copy_(torch.arange(3.0 * D).reshape(D, 3) / 7)
    return made


def model_of(num_classes: int, group: dist.ProcessGroup | None) -> nn.ModuleDict:
    return nn.ModuleDict({"backbone": backbone(), "head": Head(num_classes, group)})


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
        save_centres(folder / f"{kind}-{count}-plain.safetensors", plain, optimizer, process_group=group)
    check_an_idle_empty_rank(rank, group, folder)
    check_ranks_that_disagree(rank, group, folder)
    check_metadata_that_differs(rank, group, folder)
    check_a_rank_that_fails(rank, group, folder)
    check_a_rank_that_fails_in_the_engine(rank, group, folder)
    check_plain_shares(rank, group, folder)
    check_that_nothing_is_unpickled(group, folder)


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


def check_ranks_that_disagree(rank: int, group: dist.ProcessGroup, folder: Path) -> None:
    wide = nn.Parameter(torch.zeros(2, D + (rank == 2)))
    with pytest.raises(
        ValueError, match=r"rank 0 has torch.float32 rows of shape \(6,\), rank 2 has .*\(7,\)"
    ):
        save_centres(folder / "disagree.safetensors", wide, process_group=group)
    parameter = nn.Parameter(torch.zeros(2, D))
    optimizer = OPTIMIZERS["adamw"]([parameter])
    for _ in range(1 + (rank == 1)):
        parameter.grad = torch.ones(2, D)
        optimizer.step()
    with pytest.raises(ValueError, match=r"optimizer.step: rank 0 has .* 1.0, rank 1 has .* 2.0"):
        save_centres(folder / "disagree.safetensors", parameter, optimizer, process_group=group)
    with pytest.raises(ValueError, match="this rank's 2; save the centres, then remap the file"):
        remap_classes(centres_of(parameter, process_group=group), [0])
    with pytest.raises((ValueError, RuntimeError), match="expected a table with the classes"):
        save_centres(folder / "disagree.safetensors", centres_of(parameter, process_group=group))
    assert not (folder / "disagree.safetensors").exists()


def check_metadata_that_differs(rank: int, group: dist.ProcessGroup, folder: Path) -> None:
    """A longer header on one rank would put its rows where another's belong."""
    head = Head(10, group)
    fill_with_truth(head.weight, OPTIMIZERS["sgd"](head.parameters()), shard_ranges(10, 4)[rank].start, 10)
    said = {"epoch": "3", "host": "a" * (50 if rank == 2 else 1)}
    message = "metadata: expected the same on every rank.*'host': 'a'} on ranks 0, 1, 3, .*'aaa.* on rank 2$"
    with pytest.raises(ValueError, match=message):
        save_centres(folder / "differs", head.weight, metadata=said)
    odd: Any = {"epoch": 3 if rank == 2 else "3"}
    with pytest.raises((TypeError, RuntimeError), match=r"metadata: expected strings.*{'epoch': 3}"):
        save_centres(folder / "differs", head.weight, metadata=odd)
    assert not (folder / "differs").exists()
    assert not list(folder.glob(".*.tmp"))
    said = {"epoch": "3", "longer": "b"}
    save_centres(folder / "same", head.weight, metadata=said if rank else dict(reversed(said.items())))
    dist.barrier(group)
    assert torch.equal(load_file(folder / "same")["weight"], truth("weight", 10))


def check_a_rank_that_fails(rank: int, group: dist.ProcessGroup, folder: Path) -> None:
    """Its disk is full in the middle: everybody raises, the old file stays, the new one is gone."""
    old = folder / "adamw-10.safetensors"
    before = old.read_bytes()
    write = Layout.write

    def fail(self: Layout, path: Path, *args: object, **kwargs: object) -> None:
        write(self, path, *args, **kwargs)
        if rank == 1:
            raise OSError(28, "No space left on device")

    Layout.write = fail  # type: ignore[method-assign]
    try:
        with pytest.raises((OSError, RuntimeError), match=r"No space left") as caught:
            save_centres(old, Head(10, group).weight)
    finally:
        Layout.write = write  # type: ignore[method-assign]
    assert rank == 1 or "rank 1 failed: OSError" in str(caught.value)
    dist.barrier(group)
    assert old.read_bytes() == before
    assert not list(folder.glob(".*.tmp"))
    with pytest.raises((FileExistsError, RuntimeError), match="expected a new directory"):
        save_sharded(folder / "adamw-10", model_of(10, group))
    with pytest.raises((OSError, RuntimeError), match="no/such"):
        save_sharded(folder / "no/such/place", model_of(10, group))
    with pytest.raises((OSError, RuntimeError), match="no/such"):
        save_centres(folder / "no/such/place", Head(10, group).weight)


def check_a_rank_that_fails_in_the_engine(rank: int, group: dist.ProcessGroup, folder: Path) -> None:
    """The same of a directory, of which the others have written their shards."""
    write = dcp.FileSystemWriter.write_data

    def fail(self: dcp.FileSystemWriter, *args: Any, **kwargs: Any) -> Any:
        written = write(self, *args, **kwargs)
        assert list(Path(self.path).glob(f"__{rank}_*"))
        if rank == 1:
            raise OSError(28, "No space left on device")
        return written

    dcp.FileSystemWriter.write_data = fail
    try:
        with pytest.raises(RuntimeError, match="No space left on device"):
            save_sharded(folder / "full", model_of(10, group))
    finally:
        dcp.FileSystemWriter.write_data = write
    dist.barrier(group)
    assert not (folder / "full").exists()
    assert not list(folder.glob(".*.tmp"))


def check_plain_shares(rank: int, group: dist.ProcessGroup, folder: Path) -> None:
    """The engine takes a plain weight for the same on every rank, and would save the first one's."""
    head = PartialFC_V2(ExpFace(), D, 10, process_group=group)
    optimizer = OPTIMIZERS["sgd"](head.parameters())
    fill_with_truth(head.weight, optimizer, head.class_start, 10)
    model = nn.ModuleDict({"backbone": backbone(), "fc": head})
    message = r"PartialFC_V2 'fc' with a plain share on each of 4 ranks.*save_centres\(path, module.weight"
    for call in (save_sharded, load_sharded):
        with pytest.raises(ValueError, match=message):
            call(folder / "plain", model)
    assert not (folder / "plain").exists()
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

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something is unpickled")

    loads, unpickler = pickle.loads, pickle.Unpickler
    kept = {name: getattr(c10d, name) for name in ("_tensor_to_object", "_unpickler", "all_gather_object")}
    pickle.loads, pickle.Unpickler = refuse, refuse  # type: ignore[assignment, misc]
    for name in kept:
        setattr(c10d, name, refuse)
    try:
        head = Head(10, group)
        optimizer = OPTIMIZERS["adamw"](head.parameters())
        load_centres(folder / "adamw-10.safetensors", head.weight, optimizer)
        save_centres(folder / "again", head.weight, optimizer)
    finally:
        pickle.loads, pickle.Unpickler = loads, unpickler  # type: ignore[misc]
        for name, value in kept.items():
            setattr(c10d, name, value)
    assert (folder / "again").read_bytes() == (folder / "adamw-10.safetensors").read_bytes()


def save_while_one_dies(group: dist.ProcessGroup, path: Path, dying: int) -> None:
    """It goes in the middle of its rows, when the header and the other rank's rows may be there already."""
    weight = Head(10, group).weight
    before = path.read_bytes()

    def die(self: Layout, file: BinaryIO, offset: int, values: torch.Tensor) -> None:
        file.seek(len(self.header) + offset)
        file.write(bytes(values.nbytes // 2))
        file.flush()
        path.with_name("died").touch()
        os._exit(1)

    if dist.get_rank(group) == dying:
        Layout._put = die  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        save_centres(path, weight)
    assert path.read_bytes() == before


def save_sharded_while_one_dies(group: dist.ProcessGroup, path: Path, dying: int) -> None:
    write = dcp.FileSystemWriter.write_data

    def die(self: dcp.FileSystemWriter, *args: Any, **kwargs: Any) -> Any:
        write(self, *args, **kwargs)
        path.with_name("died").touch()
        os._exit(1)

    if dist.get_rank(group) == dying:
        dcp.FileSystemWriter.write_data = die
    with pytest.raises(RuntimeError):
        save_sharded(path, model_of(10, group))
    assert not path.exists()


def load_all(group: dist.ProcessGroup, folder: Path) -> None:
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    for count, kind in CASES:
        check_loads_of(rank, world_size, count, kind, folder, group)
    if world_size == 3:
        check_loads_that_fail(rank, group, folder)
        check_a_damaged_shard(rank, group, folder)
        check_a_disk_that_fails(rank, group, folder)
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


def check_loads_that_fail(rank: int, group: dist.ProcessGroup, folder: Path) -> None:
    head = Head(10, group)
    optimizer = OPTIMIZERS["adamw"](head.parameters())
    start = shard_ranges(10, 3)[rank].start
    fill_with_truth(head.weight, optimizer, start, 10)
    with pytest.raises(ValueError, match="expected 10 classes as in weight, got 1003"):
        load_centres(folder / "adamw-1003.safetensors", head.weight, optimizer)
    # Missing for one rank only, as on a disk that is not shared: the others may not go on without it.
    there = folder / ("adamw-10.safetensors" if rank != 2 else "not-here.safetensors")
    with pytest.raises((FileNotFoundError, RuntimeError), match=r"not-here.safetensors: no such file"):
        load_centres(there, head.weight, optimizer)
    assert_is_truth(head.weight, optimizer, "adamw", start, 10)

    model = model_of(10, group)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    fill_with_truth(model["head"].weight, optimizer, start, 10)
    with pytest.raises(ValueError, match=r"head.weight: expected shape \(10, 6\) .*, got \(1003, 6\)"):
        load_sharded(folder / "adamw-1003", model, optimizer)
    there = folder / ("adamw-10" if rank != 2 else "not-here")
    with pytest.raises((FileNotFoundError, RuntimeError), match="not-here: no such directory"):
        load_sharded(there, model, optimizer)
    assert_is_truth(model["head"].weight, optimizer, "adamw", start, 10)


def check_a_damaged_shard(rank: int, group: dist.ProcessGroup, folder: Path) -> None:
    """One file of four: no rank may begin, whether it wants that one's rows or not."""
    names = sorted(file.name for file in (folder / "adamw-10").glob("__*"))
    assert names == [f"__{rank}_0.distcp" for rank in range(4)]
    start = shard_ranges(10, 3)[rank].start
    for harm, error, message in (
        ("missing", FileNotFoundError, "__2_0.distcp: a shard of the checkpoint is missing"),
        ("truncated", ValueError, r"__2_0.distcp: expected at least \d+ bytes, got \d+: it is truncated"),
    ):
        damaged = folder / f"{harm}-shard"
        if rank == 0:
            shutil.copytree(folder / "adamw-10", damaged)
            shard = damaged / "__2_0.distcp"
            if harm == "missing":
                shard.unlink()
            else:
                shard.write_bytes(shard.read_bytes()[:-1])
        dist.barrier(group)
        model, optimizer = trained_model(10, "adamw", start, group)
        with pytest.raises(error, match=message):
            load_sharded(damaged, model, optimizer)
        assert_is_truth(model["head"].weight, optimizer, "adamw", start, 10)
        assert (model["head"].weight.grad.to_local() == 3).all()


def check_a_disk_that_fails(rank: int, group: dist.ProcessGroup, folder: Path) -> None:
    """On one rank and after all checks: when hyperparameters are read nothing has changed yet, and when rows
    are read everybody learns of it and may load again."""
    start = shard_ranges(10, 3)[rank].start
    read = Reader.read_data
    for failing in (1, 2):
        model, optimizer = trained_model(10, "adamw", start, group)
        optimizer.param_groups[0]["lr"] = 123.0
        calls = 0

        def fail(self: Reader, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if rank == 1 and calls == failing:  # noqa: B023
                raise OSError(5, "Input/output error")
            return read(self, *args, **kwargs)

        Reader.read_data = fail  # type: ignore[method-assign]
        try:
            with pytest.raises(RuntimeError, match="Input/output error"):
                load_sharded(folder / "adamw-10", model, optimizer)
        finally:
            Reader.read_data = read  # type: ignore[method-assign]
        assert calls == failing
        assert optimizer.param_groups[0]["lr"] == 123.0
        if failing == 1:
            assert_is_truth(model["head"].weight, optimizer, "adamw", start, 10)
            assert (model["head"].weight.grad.to_local() == 3).all()
        load_sharded(folder / "adamw-10", model, optimizer)
        assert_is_truth(model["head"].weight, optimizer, "adamw", start, 10)
        assert optimizer.param_groups[0]["lr"] == 0.01


def trained_model(
    num_classes: int, kind: str, start: int, group: dist.ProcessGroup
) -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
    """With the known rows and state, and with gradients."""
    model = model_of(num_classes, group)
    optimizer = OPTIMIZERS[kind](model.parameters())
    fill_with_truth(model["head"].weight, optimizer, start, num_classes)
    model["head"].weight.grad = torch.full_like(model["head"].weight, 3.0)
    return model, optimizer


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
    return folder


@pytest.mark.parametrize("world_size", [3, 2])
def test_what_four_ranks_saved_loads_on_fewer(world_size: int, saved_by_four: Path) -> None:
    """Where users of InsightFace are stuck: what four saved three cannot load, or a wrong C loads."""
    run_ranks(world_size, load_all, saved_by_four)


@pytest.mark.parametrize(("count", "kind"), CASES)
def test_what_four_ranks_saved_loads_in_one_process(count: int, kind: str, saved_by_four: Path) -> None:
    check_loads_of(0, 1, count, kind, saved_by_four, None)


@pytest.mark.parametrize(("count", "kind"), CASES)
def test_the_plain_library_opens_what_four_ranks_saved(count: int, kind: str, saved_by_four: Path) -> None:
    for name in (f"{kind}-{count}.safetensors", f"{kind}-{count}-plain.safetensors"):
        tensors = load_file(saved_by_four / name)
        assert torch.equal(tensors.pop("weight"), truth("weight", count))
        for key, value in tensors.items():
            if value.dim():
                assert torch.equal(value, truth(key.removeprefix("optimizer."), count))
    assert len(tensors) == (1 if kind == "sgd" else 3)


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


@pytest.mark.parametrize("dying", [0, 1])
def test_when_a_rank_dies_the_others_raise_and_the_old_file_stays(dying: int, tmp_path: Path) -> None:
    path = tmp_path / "centres.safetensors"
    path.write_bytes(b"of yesterday")
    with pytest.raises(RankFailed) as caught:
        run_ranks(2, save_while_one_dies, path, dying)
    # The other checked the rest, and had nothing to complain of.
    assert str(caught.value) == f"rank {dying}: its process ended"
    assert path.read_bytes() == b"of yesterday"
    assert_left_behind(tmp_path, {path.name}, dying)


@pytest.mark.parametrize("dying", [0, 1])
def test_when_a_rank_dies_no_directory_appears(dying: int, tmp_path: Path) -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(2, save_sharded_while_one_dies, tmp_path / "step-1", dying)
    assert str(caught.value) == f"rank {dying}: its process ended"
    assert_left_behind(tmp_path, set(), dying)


def assert_left_behind(folder: Path, names: set[str], dying: int) -> None:
    """A temporary one, if it is the first rank that has died; it removes what cannot be finished."""
    left = {path.name for path in folder.iterdir()} - {"died", *names}
    assert (folder / "died").exists()
    assert len(left) == (dying == 0)
    assert all(name.endswith(".tmp") for name in left)
