"""One of the ranks that share a checkpoint disagrees, fails or dies: all raise, and what was there stays.

Checks in which no process ends are called by the tests of test_many_ranks.py, on what four ranks saved there.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn

from expface_kernels.checkpoint import (
    centres_of,
    load_centres,
    load_sharded,
    remap_classes,
    save_centres,
    save_sharded,
)
from expface_kernels.checkpoint.files import Layout
from expface_kernels.checkpoint.sharded import Reader
from expface_kernels.distributed.ranges import shard_ranges
from tests.distributed import RankFailed, run_ranks
from tests.test_checkpoint.trained import (
    OPTIMIZERS,
    D,
    Head,
    assert_is_truth,
    fill_with_truth,
    model_of,
    truth,
)


def check_ranks_that_disagree(rank: int, group: dist.ProcessGroup, folder: Path) -> None:
    wide = nn.Parameter(torch.zeros(2, D + (rank == 2)))
    message = r"weight: expected the same .* rows of shape \(6,\) on ranks 0, 1, 3, .*\(7,\) on rank 2$"
    with pytest.raises(ValueError, match=message):
        save_centres(folder / "disagree.safetensors", wide, process_group=group)
    parameter = nn.Parameter(torch.zeros(2, D))
    optimizer = OPTIMIZERS["adamw"]([parameter])
    for _ in range(1 + (rank == 1)):
        parameter.grad = torch.ones(2, D)
        optimizer.step()
    with pytest.raises(
        ValueError, match=r"optimizer.step: expected .* 1.0 on ranks 0, 2, 3, .* 2.0 on rank 1$"
    ):
        save_centres(folder / "disagree.safetensors", parameter, optimizer, process_group=group)
    with pytest.raises(ValueError, match="this rank's 2; save the centers, then remap the file"):
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
    assert rank == 1 or "rank 1 of process_group refused to save: OSError" in str(caught.value)
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
