"""Train the glyph embedding on several processes, each with a share of the classes; save, resume on others.

    torchrun --nproc-per-node 2 examples/train_ddp.py             # some minutes; out/ddp/epoch-1, …
    torchrun --nproc-per-node 3 examples/train_ddp.py --resume    # goes on where it was stopped, on any
    torchrun --nproc-per-node 2 examples/train_ddp.py --toy --out out/ddp-toy     # some seconds: does it run?

On CPUs the processes talk through gloo, with GPUs (one for each process) through NCCL. Without torchrun it is
one process. The exit status of each process is 2 for arguments, data or checkpoints that do not fit, 1 where
training cannot go on; torchrun's own is then 1.

B rows of this rank in a step · N images · C classes
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DistributedSampler, TensorDataset
from tqdm import tqdm

from examples.glyphs.augment import augment
from examples.glyphs.dataset import COMPACT_FILE, DataError, Glyphs, load
from examples.glyphs.model import EMBEDDING_SIZE, embed, make_net
from examples.glyphs.training import Recipe, TrainingError, learning_rate
from examples.glyphs.verification import verify_glyphs
from expface_kernels import ExpFace, MarginSoftmaxHead, clip_grad_norm_
from expface_kernels.checkpoint import load_sharded, save_sharded

SCALE = 32.0


class UsageError(ValueError):
    """Arguments that do not fit."""


@dataclass(frozen=True)
class Training:
    """What is trained, the same on every rank but for the head's rows, and where."""

    backbone: DistributedDataParallel
    head: MarginSoftmaxHead
    model: nn.ModuleDict  # both, by the names they have in a checkpoint
    optimizer: torch.optim.Optimizer
    group: dist.ProcessGroup
    device: torch.device

    @property
    def first(self) -> bool:
        """This rank is the one that prints."""
        return dist.get_rank(self.group) == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status. Every rank does the same; the first one prints."""
    device = join()
    first = dist.get_rank() == 0
    status = 0
    try:
        run(dist.group.WORLD, device, _parse(arguments, first))
    except (UsageError, DataError, TrainingError) as error:
        status = 1 if isinstance(error, TrainingError) else 2
        if first:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        dist.barrier()  # torchrun stops all as soon as one has failed: not before the line is out
    finally:
        dist.destroy_process_group()
    return status


def join() -> torch.device:
    """Enter the default group, torchrun's or one of this process alone; the device of this rank."""
    cuda = torch.cuda.is_available()
    if cuda:
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            sys.exit(f"error: --nproc-per-node: expected at most {gpus}, one process a GPU, got {local + 1}")
        torch.cuda.set_device(local)
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if cuda else "gloo", **({} if "RANK" in os.environ else alone))
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def run(group: Any, device: torch.device, options: argparse.Namespace) -> None:
    """Train, from the start or from the last checkpoint, and verify; every rank of the group calls it."""
    done, checkpoint = _last_checkpoint(options.out)
    if checkpoint is not None and not options.resume:
        raise UsageError(
            f"--out: {checkpoint} is of an earlier run; --resume goes on with it, another folder starts anew"
        )
    if checkpoint is None and options.resume:
        raise UsageError(f"--resume: expected a checkpoint epoch-1, … in {options.out}, found none")
    if done >= options.epochs:
        raise UsageError(f"--epochs: expected more than the {done} of {checkpoint}, got {options.epochs}")
    glyphs = load(options.data)
    if options.toy:
        glyphs = Glyphs(glyphs.train.subset(64, 6), glyphs.validation, glyphs.test.subset(40, 4))
    training = build(options, len(glyphs.train.characters), group, device)
    if checkpoint is not None:
        try:
            load_sharded(checkpoint, training.model, training.optimizer)
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            raise UsageError(f"--resume: {error}") from error
    if training.first:
        options.out.mkdir(parents=True, exist_ok=True)
        where = f"{dist.get_world_size(group)} process(es) on {device.type}"
        print(f"{where}: {'from ' + str(checkpoint) if checkpoint else 'from the start'}", flush=True)
    images, labels = glyphs.train.samples()
    for epoch in range(done + 1, options.epochs + 1):
        train_epoch(training, images, labels, epoch, options)
        save_sharded(options.out / f"epoch-{epoch}", training.model, training.optimizer)
    if training.first:
        _verify(training, glyphs)


def build(options: argparse.Namespace, classes: int, group: Any, device: torch.device) -> Training:
    """A fresh backbone, the same on every rank, and this rank's share of a fresh head's C classes."""
    net = make_net(options.seed).to(device)
    backbone = DistributedDataParallel(net, process_group=group)
    head = MarginSoftmaxHead(
        EMBEDDING_SIZE,
        classes,
        ExpFace(),
        scale=SCALE,
        sample_rate=options.sample_rate,
        process_group=group,
        equal_rows=True,
        seed=options.seed,
        device=device,
    )
    model = nn.ModuleDict({"backbone": backbone, "head": head})
    recipe = Recipe()
    # The head's weight is a DTensor. On GPUs optimizers update a group in one call, and that refuses plain
    # tensors and DTensors together.
    optimizer = torch.optim.SGD(
        [{"params": backbone.parameters()}, {"params": head.parameters()}],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=True,
        weight_decay=recipe.weight_decay,
    )
    return Training(backbone, head, model, optimizer, group, device)


def train_epoch(
    training: Training, images: Tensor, labels: Tensor, epoch: int, options: argparse.Namespace
) -> None:
    """One pass over images (N, 1, 32, 32) uint8 and labels (N,); each rank takes its part of every batch."""
    rank, ranks = dist.get_rank(training.group), dist.get_world_size(training.group)
    data = TensorDataset(images, labels)
    sampler: Any = DistributedSampler(data, ranks, rank, shuffle=True, seed=options.seed, drop_last=True)
    sampler.set_epoch(epoch)
    batches = BatchSampler(sampler, max(1, options.batch // ranks), drop_last=True)
    if not len(batches):
        raise TrainingError(f"--batch: expected at most the {len(images)} images, got {options.batch}")
    generator = torch.Generator().manual_seed((options.seed * 1000 + epoch) * 1000 + rank)
    steps, recipe = len(batches) * options.epochs, Recipe(epochs=options.epochs)
    start, total = time.perf_counter(), 0.0
    training.model.train()
    with tqdm(total=len(batches), desc=f"epoch {epoch}", disable=not training.first, leave=False) as bar:
        for number, rows in enumerate(batches):
            step = (epoch - 1) * len(batches) + number
            for group in training.optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, recipe)
            x = augment(images[rows].float() / 255, generator)
            loss = _step(training, x.to(training.device), labels[rows].to(training.device), options.clip)
            if not math.isfinite(loss):  # the same on every rank
                raise TrainingError(f"the loss is {loss} in step {number} of epoch {epoch}: it diverged")
            total += loss
            bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
            bar.update()
    if training.first:
        rate = len(batches) * batches.batch_size * ranks / (time.perf_counter() - start)
        print(
            f"epoch {epoch} of {options.epochs}: loss {total / len(batches):.2f}, {rate:,.0f} images/s",
            flush=True,
        )


def _step(training: Training, x: Tensor, labels: Tensor, clip: float) -> float:
    """One update from this rank's x (B, 1, 32, 32) and labels (B,); the loss over all ranks' rows."""
    loss = training.head(training.backbone(x), labels)
    training.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    # The head's gradient is spread over ranks, and so torch's own would see another norm on each.
    clip_grad_norm_(training.model.parameters(), clip)
    training.optimizer.step()
    return float(loss.detach())


def _verify(training: Training, glyphs: Glyphs) -> None:
    e = embed(training.backbone.module, glyphs.test.images.to(training.device)).cpu()
    result = verify_glyphs(e, glyphs.test.fonts)
    tars = ", ".join(f"TAR@FAR {far:g} {tar:.3f}" for far, tar in result.tar.items())
    print(
        f"{len(glyphs.test.characters)} kanji never seen, in {len(glyphs.test.fonts)} fonts never seen: "
        f"{tars}, AUC {result.auc:.4f}, rank-1 {result.rank1:.3f}"
    )


def _last_checkpoint(out: Path) -> tuple[int, Path | None]:
    """(its epoch, its directory), or (0, None)."""
    found = {}
    for path in out.iterdir() if out.is_dir() else ():
        match = re.fullmatch(r"epoch-(\d+)", path.name)
        if match is not None:
            found[int(match[1])] = path
    last = max(found, default=0)
    return last, found.get(last)


class _Parser(argparse.ArgumentParser):
    """Raises UsageError instead of leaving, and prints help on the first rank alone."""

    prints = True

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def print_help(self, file: Any = None) -> None:
        if self.prints:
            super().print_help(file)


def _parse(arguments: Sequence[str] | None, first: bool) -> argparse.Namespace:
    parser = _Parser(description="Glyph training over processes, with a margin-softmax head that they share.")
    parser.prints = first
    default = Recipe()
    parser.add_argument("--epochs", type=_count, help=f"default {default.epochs}")
    parser.add_argument("--batch", type=_count, help=f"rows of all ranks, default {default.batch}")
    parser.add_argument("--sample-rate", type=_rate, default=1.0, help="share of classes a step, default 1")
    parser.add_argument("--clip", type=_norm, default=5.0, help="largest norm of a gradient, default 5")
    parser.add_argument(
        "--seed", type=int, default=0, help="of network, head, order, augmentation; default 0"
    )
    parser.add_argument("--out", type=Path, default=Path("out/ddp"), help="checkpoints, default out/ddp")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--data", type=Path, default=COMPACT_FILE, help="another .npz of build_dataset.py")
    parser.add_argument("--toy", action="store_true", help="64 kanji, 1 epoch, batches of 64: does it run?")
    options = parser.parse_args(arguments)
    options.epochs = options.epochs or (1 if options.toy else default.epochs)
    options.batch = options.batch or (64 if options.toy else default.batch)
    return options


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected above 0 and at most 1, got {value}")
    return value


def _norm(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {value}")
    return value


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # The group is gone and all is written. torch 2.13 aborts now and then when a process that had a gloo
    # group tears down its C++ objects ("terminate called without an active exception").
    os._exit(status)
