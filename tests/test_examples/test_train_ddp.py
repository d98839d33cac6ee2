"""The example under torchrun: trains at toy size, goes on exactly where it was, on other ranks too."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from examples import train_ddp
from examples.glyphs.model import EMBEDDING_SIZE, make_net
from examples.glyphs.training import Recipe, learning_rate
from expface_kernels import ExpFace, MarginSoftmaxHead
from expface_kernels.checkpoint import load_sharded
from tests.distributed import run_ranks

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


State = dict[str, torch.Tensor]


def whole(tensor: Any) -> torch.Tensor:
    """A copy, of a DTensor over all ranks."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def state_of(model: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> State:
    """All that goes on: what the model holds, and each parameter's momentum."""
    found = {
        name.replace("backbone.module.", "backbone."): whole(t) for name, t in model.state_dict().items()
    }
    for name, parameter in model.named_parameters():
        momentum = optimizer.state[parameter]["momentum_buffer"]
        found["momentum of " + name.replace("backbone.module.", "backbone.")] = whole(momentum)
    return found


def saved(checkpoint: Path, **options: Any) -> tuple[State, torch.optim.Optimizer]:
    """All that a checkpoint of the toy holds, read by one process without a group."""
    head = MarginSoftmaxHead(EMBEDDING_SIZE, 64, ExpFace(), seed=9, **options)
    model = nn.ModuleDict({"backbone": make_net(9), "head": head})
    groups = [{"params": part.parameters()} for part in model.values()]
    optimizer = torch.optim.SGD(groups, lr=9.0, momentum=0.9)
    load_sharded(checkpoint, model, optimizer)
    return state_of(model, optimizer), optimizer


def resumed(group: Any, arguments: argparse.Namespace) -> State:
    """Go on from the last checkpoint; what this rank began its first epoch with."""
    began: State = {}
    train_epoch = train_ddp.train_epoch

    def watched(training: train_ddp.Training, *others: Any) -> None:
        if not began:
            began.update(state_of(training.model, training.optimizer))
        train_epoch(training, *others)

    with mock.patch.object(train_ddp, "train_epoch", watched):
        train_ddp.run(group, CPU, arguments)
    return began


def differ(one: State, other: State) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def options(out: Path, epochs: int) -> argparse.Namespace:
    text = ["--toy", "--resume", "--epochs", str(epochs), "--out", str(out)]
    return train_ddp._parse(text, first=True)


def shards(checkpoint: Path) -> int:
    return len(list(checkpoint.glob("*.distcp")))


def test_torchrun_on_two_processes_then_resume_on_three_and_on_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    example = ["examples/train_ddp.py", "--toy", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, *example], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "2 process(es) on cpu: from the start"
    assert lines[1].startswith("epoch 1 of 1: loss ")
    assert lines[2].startswith("40 kanji never seen, in 4 fonts never seen: TAR@FAR 0.01 ")
    assert len(lines) == 3
    assert done.stderr.count("epoch 1:   0%") == 1, "one progress bar, on the first rank"
    assert shards(tmp_path / "epoch-1") == 2

    began = run_ranks(3, resumed, options(tmp_path, 2))
    assert shards(tmp_path / "epoch-2") == 3
    assert train_ddp.main(["--toy", "--resume", "--epochs", "3", "--out", str(tmp_path)]) == 0
    assert f"1 process(es) on cpu: from {tmp_path}/epoch-2" in capsys.readouterr().out
    one, two, three = (saved(tmp_path / f"epoch-{epoch}")[0] for epoch in (1, 2, 3))
    assert [differ(found, one) for found in began] == [[], [], []], "begun from the checkpoint, bit by bit"
    assert len(differ(one, two)) == len(one)
    assert len(differ(two, three)) == len(one)
    steps = [int(found["backbone.norm.num_batches_tracked"]) for found in (one, two, three)]
    assert steps == [6, 12, 18], "384 images, 64 a step, however many processes share it"


def test_what_is_resumed_is_what_would_have_been(tmp_path: Path) -> None:
    """Bit by bit, with a sampled head, whose drawn classes follow the steps that it has done."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    arguments = ["--toy", "--epochs", "2", "--sample-rate", "0.5", "--out"]
    assert train_ddp.main([*arguments, str(straight)]) == 0
    shutil.copytree(straight / "epoch-1", stopped / "epoch-1")
    assert train_ddp.main([*arguments, str(stopped), "--resume"]) == 0
    read = []
    for out in (straight, stopped):
        state, optimizer = saved(out / "epoch-2", sample_rate=0.5)
        last = learning_rate(11, 12, Recipe(epochs=2))
        assert [group["lr"] for group in optimizer.param_groups] == [last, last]
        read.append(state)
    assert differ(*read) == []
    assert int(read[0]["head.sampling_step"]) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: expected at least 1, got 0"),
        (["--batch", "many"], "argument --batch: invalid"),
        (["--sample-rate", "2"], "argument --sample-rate: expected above 0 and at most 1, got 2.0"),
        (["--clip", "-1"], "argument --clip: expected a number above 0, got -1.0"),
        (["--margin", "0.5"], "unrecognized arguments: --margin"),
        (["--resume"], "--resume: expected a checkpoint epoch-1, … in"),
        (["--data", "nowhere.npz"], "no glyph data: nowhere.npz does not exist"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_ddp.main(["--toy", "--out", str(tmp_path / "new"), *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "new").exists()


def test_checkpoints_that_do_not_fit_are_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "epoch-2").mkdir()
    for arguments, message in (
        (
            ["--epochs", "3"],
            f"error: --out: {tmp_path}/epoch-2 is of an earlier run; --resume goes on with it",
        ),
        (
            ["--resume", "--epochs", "2"],
            f"error: --epochs: expected more than the 2 of {tmp_path}/epoch-2, got 2",
        ),
        (
            ["--resume", "--epochs", "3"],
            f"error: --resume: {tmp_path}/epoch-2: expected a checkpoint directory",
        ),
    ):
        assert train_ddp.main(["--toy", "--out", str(tmp_path), *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(message)


def test_a_batch_larger_than_the_data_cannot_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_ddp.main(["--toy", "--batch", "1000", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: --batch: expected at most the 384 images, got 1000\n"


def test_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        train_ddp.main(["--help"])
    assert left.value.code == 0
    assert "--resume" in capsys.readouterr().out
