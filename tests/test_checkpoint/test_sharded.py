"""torch.distributed.checkpoint in one process: nothing half-done, nothing lost, no code run."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from expface_kernels.checkpoint import load_sharded, save_sharded
from expface_kernels.checkpoint.sharded import Planner, Reader
from tests.test_checkpoint.trained import OPTIMIZERS, Exploit, Head, assert_is_truth, failing, fill_with_truth

C = 11


def trained(num_classes: int = C) -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
    model = nn.ModuleDict({"head": Head(num_classes)})
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    fill_with_truth(model["head"].weight, optimizer, 0, num_classes)
    return model, optimizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_sharded(tmp_path / "checkpoint", *trained())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    return tmp_path / "checkpoint"


def assert_refused_and_nothing_lost(
    checkpoint: Path, error: type[Exception], message: str, num_classes: int = C
) -> None:
    model, optimizer = trained(num_classes)
    weight = model["head"].weight
    weight.grad = torch.full_like(weight, 3.0)
    with pytest.raises(error, match=message):
        load_sharded(checkpoint, model, optimizer)
    assert_is_truth(weight, optimizer, "adamw", 0, num_classes)
    assert weight.grad is not None
    assert (weight.grad == 3).all()


def test_another_number_of_classes_or_state(checkpoint: Path) -> None:
    message = r"model.head.weight: expected shape \(12, 6\) as in the model, got \(11, 6\)"
    assert_refused_and_nothing_lost(checkpoint, ValueError, message, num_classes=12)
    head = Head(C)
    amsgrad = torch.optim.AdamW(head.parameters(), amsgrad=True)
    with pytest.raises(ValueError, match=r"without \['optimizer.state.head.weight.max_exp_avg_sq'\]"):
        load_sharded(checkpoint, nn.ModuleDict({"head": head}), amsgrad)
    assert not amsgrad.state


@pytest.mark.parametrize(
    ("saved", "ours", "message"),
    [
        (["head"], {"head": torch.float64}, "model.head.weight: expected torch.float64, got torch.float32"),
        (["head"], {"other": torch.float32}, r"without \['model.other.weight'\]"),
        (["head", "more"], {"head": torch.float32}, r"with the unknown \['model.more.weight'\]"),
    ],
)
def test_another_module(saved: list[str], ours: dict[str, torch.dtype], message: str, tmp_path: Path) -> None:
    theirs = nn.ModuleDict({name: Head(C) for name in saved})
    for head in theirs.values():
        nn.init.ones_(head.weight)
    save_sharded(tmp_path / "saved", theirs)
    model = nn.ModuleDict({name: Head(C, dtype=dtype) for name, dtype in ours.items()})
    with pytest.raises(ValueError, match=message):
        load_sharded(tmp_path / "saved", model)
    assert not any(parameter.any() for parameter in model.parameters())


def unlink_shard(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


def truncate_shard(folder: Path) -> None:
    shard = next(folder.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])


def truncate_index(folder: Path) -> None:
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:200])


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (unlink_shard, FileNotFoundError, "__0_0.distcp: a shard of the checkpoint is missing"),
        (truncate_shard, ValueError, "expected at least .* it is truncated"),
        (
            lambda folder: (folder / ".metadata").unlink(),
            FileNotFoundError,
            "expected a checkpoint directory, got one without .metadata",
        ),
        (truncate_index, ValueError, ".metadata: damaged or truncated"),
        (
            lambda folder: (folder / ".metadata").write_bytes(b"no pickle"),
            ValueError,
            ".metadata: damaged or truncated",
        ),
        (shutil.rmtree, FileNotFoundError, "checkpoint: no such directory"),
    ],
)
def test_a_damaged_checkpoint(
    harm: Callable[[Path], object], error: type[Exception], message: str, checkpoint: Path
) -> None:
    harm(checkpoint)
    assert_refused_and_nothing_lost(checkpoint, error, message)


def test_an_existing_directory_is_not_overwritten(checkpoint: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with pytest.raises(FileExistsError, match="expected a new directory, got one that exists"):
        save_sharded(checkpoint, *trained(7))
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with failing(dcp.FileSystemWriter, "finish"), pytest.raises(RuntimeError, match="No space left"):
        save_sharded(tmp_path / "checkpoint", *trained())
    assert not list(tmp_path.iterdir())


def test_the_names_are_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a power cut could take the directory, or the files in it, away again."""
    target, done, fsync = tmp_path / "checkpoint", [], os.fsync

    def noticed(file: int) -> None:
        done.append((os.fstat(file).st_ino, target.exists()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noticed)
    save_sharded(target, *trained())
    files = {(path.stat().st_ino, False) for path in [target, *target.iterdir()]}
    assert files < set(done)
    assert done[-1] == (tmp_path.stat().st_ino, True)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    """Torch's own makes up a state by a step of the optimizer, and drops gradients."""
    head = Head(C)
    optimizer = OPTIMIZERS["adamw"](head.parameters())
    head.weight.grad = torch.ones_like(head.weight)
    save_sharded(tmp_path / "checkpoint", head, optimizer)
    assert not optimizer.state
    assert (head.weight.grad == 1).all()
    assert not head.weight.any()
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_an_index_with_code_does_not_run_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Exploit()))
    message = r".metadata: expected a checkpoint's index, got pathlib"
    assert_refused_and_nothing_lost(checkpoint, pickle.UnpicklingError, message)
    assert not (checkpoint / "ran").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_value_with_code_does_not_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate, say, is stored by torch.save, and torch's own planner would run what is in it."""
    state = {"model": {}, "optimizer": {"state": {}, "param_groups": [{"lr": Exploit()}]}}
    dcp.save(state, checkpoint_id=tmp_path / "bad", no_dist=True)
    monkeypatch.chdir(tmp_path)
    planner = Planner()
    wanted: dict[str, Any] = {"model": {}, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    with pytest.raises(BaseException, match=r"weights_only|Weights only"):
        dcp.load(wanted, storage_reader=Reader(tmp_path / "bad"), planner=planner, no_dist=True)
    assert not (tmp_path / "ran").exists()
