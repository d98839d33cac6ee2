"""InsightFace's files, one a rank with its own ranges, merged and cut anew."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from expface_kernels.checkpoint import load_centres, open_insightface, save_centres
from expface_kernels.distributed.ranges import insightface_ranges
from tests.test_checkpoint.trained import (
    OPTIMIZERS,
    D,
    Exploit,
    Head,
    assert_is_truth,
    fill_with_truth,
    truth,
)


def write(folder: Path, num_classes: int, world_size: int) -> list[Path]:
    """Bare state dicts."""
    paths = []
    for rank, (start, size) in enumerate(insightface_ranges(num_classes, world_size)):
        paths.append(folder / f"softmax_fc_gpu_{rank}.pt")
        torch.save({"weight": truth("weight", num_classes)[start : start + size].clone()}, paths[-1])
    return paths


def write_with_state(folder: Path, kind: str, num_classes: int, world_size: int) -> None:
    """Everything, as their trainer does: backbone and head are two groups of one optimizer."""
    for rank, (start, size) in enumerate(insightface_ranges(num_classes, world_size)):
        backbone, weight = nn.Linear(3, D), nn.Parameter(torch.zeros(size, D))
        optimizer = OPTIMIZERS[kind]([{"params": backbone.parameters()}, {"params": [weight]}])
        for parameter in backbone.parameters():
            parameter.grad = torch.ones_like(parameter)
        fill_with_truth(weight, optimizer, start, num_classes)
        whole = {
            "epoch": 4,
            "global_step": 100,
            "state_dict_backbone": backbone.state_dict(),
            "state_dict_softmax_fc": {"weight": weight.detach()},
            "state_optimizer": optimizer.state_dict(),
            "state_lr_scheduler": {"last_epoch": 3, "base_lrs": [0.1, 0.1]},
        }
        torch.save(whole, folder / f"checkpoint_gpu_{rank}.pt")


@pytest.mark.parametrize(("num_classes", "world_size"), [(10, 4), (1003, 4), (5, 1), (3, 4), (24, 12)])
def test_files_of_all_ranks_are_one_table(num_classes: int, world_size: int, tmp_path: Path) -> None:
    paths = write(tmp_path, num_classes, world_size)
    for source in (tmp_path, paths):
        head = Head(num_classes)
        load_centres(open_insightface(source, num_classes=num_classes), head.weight)
        assert torch.equal(head.weight, truth("weight", num_classes))
    table = open_insightface(tmp_path)
    for start in range(0, num_classes, max(1, num_classes // 7)):
        stop = min(num_classes, start + 3)
        assert torch.equal(table.rows("weight", start, stop), truth("weight", num_classes)[start:stop])
    shuffled = torch.randperm(num_classes)
    assert torch.equal(table.take("weight", shuffled), truth("weight", num_classes)[shuffled])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_state_of_the_head_comes_along(kind: str, tmp_path: Path) -> None:
    write_with_state(tmp_path, kind, 10, 4)
    head = Head(10)
    optimizer = OPTIMIZERS[kind](head.parameters())
    load_centres(open_insightface(tmp_path), head.weight, optimizer)
    assert_is_truth(head.weight, optimizer, kind, 0, 10)
    save_centres(tmp_path / "merged.safetensors", open_insightface(tmp_path))
    assert torch.equal(load_file(tmp_path / "merged.safetensors")["weight"], truth("weight", 10))


def harmed(paths: list[Path], name: str) -> None:
    """What may happen to the four files of ten classes."""
    if name == "missing":
        paths[2].unlink()
    elif name == "last missing":
        paths[3].unlink()
    elif name == "wide":
        torch.save({"weight": torch.zeros(2, D + 1)}, paths[3])
    elif name == "truncated":
        paths[0].write_bytes(paths[0].read_bytes()[:-100])
    elif name == "both kinds":
        write_with_state(paths[0].parent, "sgd", 10, 1)
    elif name == "none":
        for path in paths:
            path.unlink()
    else:
        contents = {"key": {"weights": torch.zeros(2, D)}, "shape": {"weight": torch.zeros(2)}}
        torch.save(contents.get(name, torch.zeros(2, D)), paths[0])


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        ("missing", FileNotFoundError, r"gpu_0.pt to softmax_fc_gpu_3.pt, got none for ranks \[2"),
        ("last missing", ValueError, "expected 10 classes, got 8 in 3 files"),
        ("wide", ValueError, r"softmax_fc_gpu_3.pt: expected .*\(6,\).* got .*\(7,\)"),
        ("truncated", ValueError, "gpu_0.pt: .*got one truncated or of another kind"),
        ("both kinds", ValueError, "got both; pass a list of files"),
        ("none", ValueError, "got neither; pass a list of files"),
        ("key", ValueError, r"expected a state dict .* got \['weights'\]"),
        ("shape", ValueError, r"expected a state dict .* got \['weight'\]"),
        ("tensor", ValueError, "expected a state dict .* got Tensor"),
    ],
)
def test_a_damaged_directory_is_refused(
    harm: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    harmed(write(tmp_path, 10, 4), harm)
    with pytest.raises(error, match=message):
        open_insightface(tmp_path, num_classes=10)


def test_files_that_are_named_one_by_one(tmp_path: Path) -> None:
    paths = write(tmp_path, 10, 4)
    with pytest.raises(ValueError, match=r"expected \[3, 3, 2, 2\] .* got \[2, 2, 3, 3\]"):
        open_insightface(paths[::-1])
    head = Head(10)
    with pytest.raises(ValueError, match="expected 10 classes as in weight, got 8"):
        load_centres(open_insightface(paths[:3]), head.weight)
    assert not head.weight.any()
    paths[2].unlink()
    with pytest.raises(FileNotFoundError, match=r"softmax_fc_gpu_2.pt: no such file"):
        open_insightface(paths)
    with pytest.raises(FileNotFoundError, match="nowhere: expected a directory"):
        open_insightface(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="source: expected a directory or at least one file"):
        open_insightface([])


def test_a_file_with_code_does_not_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(2, D), "more": Exploit()}, tmp_path / "softmax_fc_gpu_0.pt")
    with pytest.raises(pickle.UnpicklingError):
        open_insightface(tmp_path)
    assert not (tmp_path / "ran").exists()
