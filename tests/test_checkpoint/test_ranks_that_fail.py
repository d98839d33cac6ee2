"""One of the ranks that share a checkpoint disagrees, fails or dies: all raise, and what was there stays.

SAVES and LOADS are tables of faults, which test_many_ranks.py goes through with what four ranks saved.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from expface_kernels import ExpFace
from expface_kernels.checkpoint import (
    CentreTable,
    centres_of,
    load_centres,
    load_sharded,
    remap_classes,
    save_centres,
    save_sharded,
)
from expface_kernels.checkpoint.files import Layout
from expface_kernels.checkpoint.sharded import Reader
from expface_kernels.compat.insightface import PartialFC_V2
from expface_kernels.distributed.ranges import shard_ranges
from tests.distributed import RankFailed, run_ranks
from tests.test_checkpoint.trained import (
    OPTIMIZERS,
    D,
    Head,
    assert_is_truth,
    failing,
    fill_with_truth,
    model_of,
)


class Ranks(NamedTuple):
    """This rank, its group, and the folder that all share."""

    rank: int
    group: dist.ProcessGroup
    folder: Path

    def save(self, metadata: Any = None, name: str = "new") -> None:
        save_centres(self.folder / name, Head(10, self.group).weight, metadata=metadata)

    def save_share(self, width: int = D, steps: int = 0) -> None:
        """Two plain rows of this rank."""
        weight = nn.Parameter(torch.zeros(2, width))
        optimizer = OPTIMIZERS["adamw"]([weight])
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        save_centres(self.folder / "new", weight, optimizer, process_group=self.group)

    def save_sharded(self, name: str = "new") -> None:
        save_sharded(self.folder / name, model_of(10, self.group))

    def live(self) -> CentreTable:
        return centres_of(nn.Parameter(torch.zeros(2, D)), process_group=self.group)

    def plain_head(self) -> nn.Module:
        """The engine takes a plain weight for the same on every rank, and would save the first one's."""
        return nn.ModuleDict({"fc": PartialFC_V2(ExpFace(), D, 10, process_group=self.group)})

    def load(self, name: str, model: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
        # Missing for one rank only, as on a disk that is not shared: the others may not go on without it.
        path = self.folder / (name.replace("nowhere", "adamw-10") if self.rank != 2 else name)
        if path.suffix:
            load_centres(path, model["head"].weight, optimizer)
        else:
            load_sharded(path, model, optimizer)


class Fault(NamedTuple):
    """An error of every rank, or of one, about which the others are told; and what leads to it in a save."""

    message: str
    error: type[Exception] = ValueError
    rank: int | None = None
    save: Callable[[Ranks], object] | None = None


def save_on_a_full_disk(ranks: Ranks) -> None:
    with failing(Layout, "write", ranks.rank == 1):
        ranks.save(name="adamw-10.safetensors")


def save_a_directory_on_a_full_disk(ranks: Ranks) -> None:
    with failing(dcp.FileSystemWriter, "write_data", ranks.rank == 1):
        ranks.save_sharded()


PLAIN = r"PartialFC_V2 'fc' with a plain share on each of 4 ranks.*save_centres\(path, module.weight"
FULL = "No space left on device"
SAVES = [
    Fault(
        r"weight: expected the same .* rows of shape \(6,\) on ranks 0, 1, 3, .*\(7,\) on rank 2$",
        save=lambda ranks: ranks.save_share(width=D + (ranks.rank == 2)),
    ),
    Fault(
        r"optimizer.step: expected .* 1.0 on ranks 0, 2, 3, .* 2.0 on rank 1$",
        save=lambda ranks: ranks.save_share(steps=1 + (ranks.rank == 1)),
    ),
    Fault(
        r"optimizer: expected .* state \[\] on ranks 0, 2, 3, state \['optimizer.exp_avg', .* rank 1$",
        save=lambda ranks: ranks.save_share(steps=int(ranks.rank == 1)),
    ),
    Fault(
        "this rank's 2; save the centers, then remap",
        save=lambda ranks: remap_classes(ranks.live(), [0]),
    ),
    Fault(
        "expected a table with the classes 0 to 7, got . to . in this process",
        save=lambda ranks: save_centres(ranks.folder / "new", ranks.live()),
    ),
    # A longer header on one rank would put its rows where another's belong.
    Fault(
        "metadata: expected the same on every rank.*'host': 'a'} on ranks 0, 1, 3, .*'aaa.* on rank 2$",
        save=lambda ranks: ranks.save({"epoch": "3", "host": "a" * (50 if ranks.rank == 2 else 1)}),
    ),
    Fault(
        "metadata: expected strings.*{'epoch': 3}",
        TypeError,
        rank=2,
        save=lambda ranks: ranks.save({"epoch": 3 if ranks.rank == 2 else "3"}),
    ),
    Fault(FULL, OSError, rank=1, save=save_on_a_full_disk),
    Fault(FULL, RuntimeError, save=save_a_directory_on_a_full_disk),
    Fault("expected a new directory", FileExistsError, save=lambda ranks: ranks.save_sharded("adamw-10")),
    Fault("no/such", FileNotFoundError, save=lambda ranks: ranks.save_sharded("no/such/place")),
    Fault("no/such", FileNotFoundError, rank=0, save=lambda ranks: ranks.save(name="no/such/place")),
    Fault(PLAIN, save=lambda ranks: save_sharded(ranks.folder / "new", ranks.plain_head())),
    Fault(PLAIN, save=lambda ranks: load_sharded(ranks.folder / "new", ranks.plain_head())),
]
LOADS = {  # by what is loaded; one file of a directory is enough that no rank may begin
    "adamw-1003.safetensors": Fault("expected 10 classes as in weight, got 1003"),
    "nowhere.safetensors": Fault("nowhere.safetensors: no such file", FileNotFoundError, rank=2),
    "adamw-1003": Fault(r"head.weight: expected shape \(10, 6\) .*, got \(1003, 6\)"),
    "nowhere": Fault("nowhere: no such directory", FileNotFoundError, rank=2),
    "missing-shard": Fault("__2_0.distcp: a shard of the checkpoint is missing", FileNotFoundError),
    "truncated-shard": Fault(r"__2_0.distcp: expected at least \d+ bytes, got \d+: it is truncated"),
}


@contextlib.contextmanager
def expected(fault: Fault, rank: int) -> Iterator[None]:
    here = fault.rank in (None, rank)
    message = fault.message if here else f"rank {fault.rank} of process_group refused.*{fault.message}"
    with pytest.raises(fault.error if here else RuntimeError, match=message):
        yield


def check_saves_that_fail(rank: int, group: dist.ProcessGroup, folder: Path) -> None:
    before = contents(folder)
    for fault in SAVES:
        assert fault.save is not None
        dist.barrier(group)
        with expected(fault, rank):
            fault.save(Ranks(rank, group, folder))
        dist.barrier(group)
        assert contents(folder) == before, fault


def check_loads_that_fail(rank: int, group: dist.ProcessGroup, folder: Path) -> None:
    ranks = Ranks(rank, group, folder)
    for name, fault in LOADS.items():
        training = trained_model(ranks)
        with expected(fault, rank):
            ranks.load(name, *training)
        assert_unchanged(ranks, *training)
    # The disk fails on one rank, and after all checks: the first read is of hyperparameters, before anything
    # changes, the second of rows, of which everybody learns and may load again.
    for at_call in (1, 2):
        model, optimizer = trained_model(ranks)
        with (
            failing(Reader, "read_data", rank == 1, at_call),
            pytest.raises(RuntimeError, match=FULL),
        ):
            ranks.load("adamw-10", model, optimizer)
        if at_call == 1:
            assert_unchanged(ranks, model, optimizer)
        assert optimizer.param_groups[0]["lr"] == 123.0
        ranks.load("adamw-10", model, optimizer)
        assert optimizer.param_groups[0]["lr"] == 0.01
        assert_is_truth(model["head"].weight, optimizer, "adamw", shard_ranges(10, 3)[rank].start, 10)


def trained_model(ranks: Ranks) -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
    """With the known rows and state, with gradients, and a learning rate of its own."""
    model = model_of(10, ranks.group)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    fill_with_truth(model["head"].weight, optimizer, shard_ranges(10, 3)[ranks.rank].start, 10)
    model["head"].weight.grad = torch.full_like(model["head"].weight, 3.0)
    optimizer.param_groups[0]["lr"] = 123.0
    return model, optimizer


def assert_unchanged(ranks: Ranks, model: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    start = shard_ranges(10, 3)[ranks.rank].start
    assert_is_truth(model["head"].weight, optimizer, "adamw", start, 10)
    assert (model["head"].weight.grad.to_local() == 3).all()
    assert optimizer.param_groups[0]["lr"] == 123.0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


DEATHS: dict[str, tuple[Any, str, Callable[..., None]]] = {
    "file": (Layout, "_put", lambda path, group: save_centres(path, Head(10, group).weight)),
    "directory": (
        dcp.FileSystemWriter,
        "write_data",
        lambda path, group: save_sharded(path, model_of(10, group)),
    ),
}


def save_while_one_dies(group: dist.ProcessGroup, path: Path, what: str, dying: int) -> None:
    """It goes when its rows are written, and the header and the other rank's may be, too."""
    owner, method, save = DEATHS[what]
    write = getattr(owner, method)

    def die(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        path.with_name("died").touch()
        os._exit(1)

    if dist.get_rank(group) == dying:
        setattr(owner, method, die)
    with pytest.raises(RuntimeError):
        save(path, group)


@pytest.mark.parametrize("dying", [0, 1])
@pytest.mark.parametrize("what", DEATHS)
def test_when_a_rank_dies_the_others_raise_and_what_was_there_stays(
    what: str, dying: int, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    if what == "file":
        path.write_bytes(b"of yesterday")
    before = contents(tmp_path)
    with pytest.raises(RankFailed) as caught:
        run_ranks(2, save_while_one_dies, path, what, dying)
    # The other had nothing to complain of.
    assert str(caught.value) == f"rank {dying}: its process ended"
    (tmp_path / "died").unlink()
    # A temporary one stays if it is the first rank that has died; it removes what cannot be finished.
    left = list(tmp_path.glob(".checkpoint.*.tmp"))
    assert len(left) == (dying == 0)
    for temporary in left:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
    assert contents(tmp_path) == before
    assert path.exists() == (what == "file")
