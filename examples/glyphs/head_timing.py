"""One step of the same loss head, fused and eager, at many classes: seconds and peak extra memory.

B rows, C classes, D features. A step is forward and backward to both inputs, with the weight gradient (C, D)
read inside the timing: memory that the system has only promised is not paid for yet. The two heads take
turns, so that whatever else the machine does falls on both. Memory is measured in a process of its own each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expface_kernels import ExpFace, MarginSoftmaxHead

SCALE = 32.0
KINDS = ("fused", "eager")
_ROOT = Path(__file__).resolve().parents[2]
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Size:
    """A problem size; `rounds` is how many steps of each head are timed."""

    rows: int = 256
    classes: int = 100_000
    features: int = 512
    rounds: int = 5

    @property
    def weight_bytes(self) -> int:
        """Of the centres, and of their gradient, in float32."""
        return self.classes * self.features * 4


@dataclass(frozen=True)
class HeadCost:
    """Timed steps in seconds, median and all; peak memory that a step adds, the weight gradient apart."""

    seconds: float
    all_seconds: tuple[float, ...]
    extra_bytes: int | None


class EagerHead(nn.Module):
    """The head as one writes it in plain PyTorch: (B, C) cosines, margin on the target, cross-entropy."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.margin = ExpFace()
        self.weight = nn.Parameter(torch.randn(classes, features) * 0.01)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D), labels (B,) to the mean loss, with the detached target gradient."""
        cosines = F.linear(F.normalize(embeddings), F.normalize(self.weight))
        target = cosines.gather(1, labels[:, None])
        with torch.no_grad():
            shift = self.margin(torch.acos(target.clamp(-1, 1))) - target
        logits = cosines.scatter(1, labels[:, None], target + shift)
        return F.cross_entropy(SCALE * logits, labels)


def measure(size: Size) -> dict[str, HeadCost]:
    """Both heads by name: first the memory of each (a process apiece), then turns of timed steps."""
    extra = extra_bytes_in_subprocesses(size)
    heads = {kind: _make(kind, size) for kind in KINDS}
    embeddings, labels = _batch(size)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for i in range(size.rounds + 1):
        for kind, head in heads.items():
            took = step_seconds(head, embeddings, labels)
            if i > 0:  # the first round warms up
                seconds[kind].append(took)
    return {kind: HeadCost(median(seconds[kind]), tuple(seconds[kind]), extra[kind]) for kind in KINDS}


def step_seconds(head: nn.Module, embeddings: Tensor, labels: Tensor) -> float:
    """One forward and backward, and one read of the weight gradient; gradients are dropped afterwards."""
    start = time.perf_counter()
    head(embeddings, labels).backward()
    weight = head.get_parameter("weight")
    assert weight.grad is not None
    read = weight.grad.sum().item()
    seconds = time.perf_counter() - start
    if not math.isfinite(read):
        raise RuntimeError(f"the weight gradient of {type(head).__name__} sums to {read}")
    weight.grad = embeddings.grad = None
    return seconds


def _make(kind: str, size: Size) -> nn.Module:
    if kind == "fused":
        return MarginSoftmaxHead(size.features, size.classes, ExpFace(), scale=SCALE, backend="cpu")
    return EagerHead(size.features, size.classes)


def _batch(size: Size) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn((size.rows, size.features), generator=generator).requires_grad_()
    return embeddings, torch.randint(size.classes, (size.rows,), generator=generator)


def extra_bytes_in_subprocesses(size: Size) -> dict[str, int | None]:
    """Of both heads; the processes may run at once, since memory does not depend on who else runs."""
    values = [str(value) for value in (size.rows, size.classes, size.features)]
    command = [sys.executable, "-m", "examples.glyphs.head_timing"]
    running = {
        kind: subprocess.Popen(
            [*command, kind, *values], cwd=_ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for kind in KINDS
    }
    printed = {kind: process.communicate() for kind, process in running.items()}
    for kind, process in running.items():
        if process.returncode != 0:
            raise RuntimeError(
                f"measuring the {kind} head's memory failed:\n{printed[kind][1].strip()[-2000:]}"
            )
    return {kind: json.loads(out) for kind, (out, _) in printed.items()}


def extra_bytes(kind: str, size: Size) -> int | None:
    """Peak resident memory that a first step adds, less the weight gradient; None where it can't be told.

    Linux only. Not by getrusage: a child process starts with its parent's peak there.
    """
    if not _STATUS.is_file() or not os.access(_RESET, os.W_OK):
        return None
    small = Size(size.rows, classes=min(size.classes, 1000), features=size.features)
    step_seconds(_make(kind, small), *_batch(small))  # loads libraries and starts threads
    head, (embeddings, labels) = _make(kind, size), _batch(size)
    _RESET.write_text("5")  # the peak falls to what is resident now
    before = _peak_resident()
    step_seconds(head, embeddings, labels)
    return max(0, _peak_resident() - before - size.weight_bytes)


def _peak_resident() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _main() -> None:
    parser = argparse.ArgumentParser(
        description="Print the peak extra memory in bytes of one step of one head."
    )
    parser.add_argument("kind", choices=KINDS)
    for name in ("rows", "classes", "features"):
        parser.add_argument(name, type=int)
    options = parser.parse_args()
    print(json.dumps(extra_bytes(options.kind, Size(options.rows, options.classes, options.features))))


if __name__ == "__main__":
    _main()
